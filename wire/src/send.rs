//! Frames to bytes: the message that prost would write, with large buffers handed on as they lie.

use std::collections::VecDeque;

use arrow_buffer::Buffer;
use bytes::{BufMut, Bytes};
use prost::encoding::{WireType, encode_key, encode_varint};

use crate::{BODY_TAG, PREFIX_BYTES, encode::FrameOut};

/// Shorter buffers are copied together, since each piece becomes an HTTP/2 frame of its own.
const PIECE_BYTES: usize = 4 << 10;
/// Fields of `FlightData`.
const DESCRIPTOR_TAG: u32 = 1;
const HEADER_TAG: u32 = 2;
const METADATA_TAG: u32 = 3;

/// A frame that is no gRPC message: its length has 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes, which is no gRPC message")]
pub struct TooLong(usize);

/// A frame as a gRPC message.
///
/// # Errors
/// [`TooLong`] for 4 GiB and more.
pub fn pieces(frame: FrameOut) -> Result<VecDeque<Bytes>, TooLong> {
    let body_bytes: usize = frame.body.iter().map(Buffer::len).sum();
    let mut open = vec![0; PREFIX_BYTES];
    let fields = [(DESCRIPTOR_TAG, &frame.descriptor), (HEADER_TAG, &frame.header), (METADATA_TAG, &frame.metadata)];
    for (tag, field) in fields {
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
    let length = open.len() - PREFIX_BYTES + body_bytes;
    let length = u32::try_from(length).map_err(|_| TooLong(length))?;
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
