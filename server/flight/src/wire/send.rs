//! Frames to a response's bytes: the message that prost would write, with large buffers handed on as they lie.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, ready},
};

use arrow_buffer::Buffer;
use bytes::{BufMut, Bytes};
use futures::Stream;
use http_body::{Body, Frame};
use prost::encoding::{WireType, encode_key, encode_varint};
use quarrel_proto::Reason;
use tonic::Status;

use super::receive::{BODY_TAG, PREFIX_BYTES};
use crate::{
    encode::FrameOut,
    outbox::Responses,
    status::{Fault, trailers},
};

/// Shorter buffers are copied together, since each piece becomes an HTTP/2 frame of its own.
const PIECE_BYTES: usize = 4 << 10;
/// Fields of `FlightData`.
const HEADER_TAG: u32 = 2;
const METADATA_TAG: u32 = 3;

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
                    self.pieces = pieces(frame)?;
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

/// A frame as a gRPC message.
fn pieces(frame: FrameOut) -> Result<VecDeque<Bytes>, Fault> {
    let body_bytes: usize = frame.body.iter().map(Buffer::len).sum();
    let mut open = vec![0; PREFIX_BYTES];
    for (tag, field) in [(HEADER_TAG, &frame.header), (METADATA_TAG, &frame.metadata)] {
        if !field.is_empty() {
            encode_key(tag, WireType::LengthDelimited, &mut open);
            encode_varint(field.len() as u64, &mut open);
            open.put_slice(field);
        }
    }
    if body_bytes > 0 {
        encode_key(BODY_TAG, WireType::LengthDelimited, &mut open);
        encode_varint(body_bytes as u64, &mut open);
    }
    let length = u32::try_from(open.len() - PREFIX_BYTES + body_bytes).map_err(|_| {
        Fault::new(Reason::Internal, format!("an answer of {body_bytes} bytes, which is no gRPC message"))
    })?;
    open[1..PREFIX_BYTES].copy_from_slice(&length.to_be_bytes());

    let mut pieces = VecDeque::new();
    for buffer in frame.body {
        if buffer.len() < PIECE_BYTES {
            open.put_slice(&buffer);
            continue;
        }
        if !open.is_empty() {
            pieces.push_back(Bytes::from(std::mem::take(&mut open)));
        }
        pieces.push_back(Bytes::from_owner(buffer));
    }
    if !open.is_empty() {
        pieces.push_back(Bytes::from(open));
    }
    Ok(pieces)
}
