//! Frames to a response's bytes.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use futures::Stream;
use http_body::{Body, Frame};
use quarrel_wire::pieces;
use tonic::Status;

use crate::{
    outbox::Responses,
    status::{Fault, trailers},
};

/// The body of a response.
pub(super) struct Reply {
    responses: Responses,
    /// Of the frame that goes out.
    pieces: VecDeque<Bytes>,
    is_over: bool,
}

impl Reply {
    pub(super) fn new(responses: Responses) -> Reply {
        Reply { responses, pieces: VecDeque::new(), is_over: false }
    }
}

impl Body for Reply {
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
            let ended = match ready!(Pin::new(&mut self.responses).poll_next(context)) {
                Some(Ok(frame)) => {
                    self.pieces = pieces(frame).map_err(Fault::from)?;
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
