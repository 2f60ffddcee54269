//! Frames to a response's bytes.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use http_body::{Body, Frame};
use quarrel_wire::{FrameOut, pieces};
use tonic::Status;

use crate::status::{Fault, trailers};

/// The body of a response: a stream of messages, each in pieces.
pub(super) struct Reply<S> {
    messages: S,
    /// Of the message that goes out.
    pieces: VecDeque<Bytes>,
    is_over: bool,
}

/// Frames as such messages.
pub(super) fn messages(
    frames: impl Stream<Item = Result<FrameOut, Fault>> + Unpin,
) -> impl Stream<Item = Result<VecDeque<Bytes>, Fault>> + Unpin {
    frames.map(|frame| Ok(pieces(frame?)?))
}

impl<S> Reply<S> {
    pub(super) fn new(messages: S) -> Reply<S> {
        Reply { messages, pieces: VecDeque::new(), is_over: false }
    }
}

impl<S: Stream<Item = Result<VecDeque<Bytes>, Fault>> + Unpin> Body for Reply<S> {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if let Some(piece) = self.pieces.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            if self.is_over {
                return Poll::Ready(None);
            }
            let ended = match ready!(Pin::new(&mut self.messages).poll_next(context)) {
                Some(Ok(pieces)) => {
                    self.pieces = pieces;
                    continue;
                }
                Some(Err(fault)) => Err(fault),
                None => Ok(()),
            };
            self.is_over = true;
            return Poll::Ready(Some(trailers(ended).map(Frame::trailers)));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.is_over && self.pieces.is_empty()
    }
}
