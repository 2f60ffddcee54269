//! Arrow IPC out: a schema and record batches to frames.
//!
//! The stock encoder hands out the arrays' own buffers, uncopied, and so they leave.

use std::collections::VecDeque;

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteOptions, StreamEncoder};
use arrow_schema::{ArrowError, Schema};
use bytes::Bytes;

/// One message to be sent, however it goes.
#[derive(Debug, Clone, Default)]
pub struct FrameOut {
    /// A `FlightDescriptor` as protobuf, where the message opens a call.
    pub descriptor: Bytes,
    /// An Arrow IPC message.
    pub header: Bytes,
    /// What `app_metadata` is.
    pub metadata: Bytes,
    /// Its body, in pieces.
    pub body: Vec<Buffer>,
}

/// Makes the frames of one request or response.
pub struct Encoder {
    encoder: StreamEncoder,
    /// The stock encoder puts the schema before its first batch; ours went ahead.
    schema_pending: bool,
}

impl Encoder {
    /// For batches of a schema.
    ///
    /// # Errors
    /// What arrow-ipc says of the schema.
    pub fn new(schema: &Schema) -> Result<Encoder, ArrowError> {
        Ok(Encoder { encoder: StreamEncoder::try_new(schema)?, schema_pending: true })
    }

    /// The frames of a batch: dictionaries that the other end does not have yet, and last of all itself, with the metadata.
    ///
    /// # Errors
    /// What arrow-ipc says of the batch.
    pub fn batch(&mut self, batch: &RecordBatch, metadata: impl Into<Bytes>) -> Result<Vec<FrameOut>, ArrowError> {
        let mut frames = split(self.encoder.encode(batch)?)?;
        if std::mem::take(&mut self.schema_pending) {
            frames.pop_front();
        }
        let batch = frames.back_mut().ok_or_else(|| malformed("no batch"))?;
        batch.metadata = metadata.into();
        Ok(frames.into())
    }
}

/// The frame that goes first.
pub fn schema_frame(schema: &Schema) -> FrameOut {
    let mut tracker = DictionaryTracker::new(false);
    let options = IpcWriteOptions::default();
    let encoded = IpcDataGenerator::default().schema_to_bytes_with_dictionary_tracker(schema, &mut tracker, &options);
    FrameOut { header: Bytes::from(encoded.ipc_message), ..Default::default() }
}

/// Cuts an encapsulated IPC stream (continuation, length, header, body) into frames, without copying bodies.
fn split(buffers: Vec<Buffer>) -> Result<VecDeque<FrameOut>, ArrowError> {
    let mut rest: VecDeque<Buffer> = buffers.into_iter().filter(|buffer| !buffer.is_empty()).collect();
    let mut frames = VecDeque::new();
    while !rest.is_empty() {
        let prefix = take(&mut rest, 8)?;
        let prefix: Vec<u8> = prefix.iter().flat_map(|piece| piece.as_slice()).copied().collect();
        let length = prefix.last_chunk::<4>().map_or(0, |bytes| u32::from_le_bytes(*bytes)) as usize;
        if length == 0 {
            break; // the end of the stream
        }
        let header = take(&mut rest, length)?;
        let header: Bytes = header.iter().flat_map(|piece| piece.as_slice()).copied().collect::<Vec<u8>>().into();
        let body_length = {
            let message = arrow_ipc::root_as_message(&header).map_err(|error| malformed(&error.to_string()))?;
            usize::try_from(message.bodyLength()).map_err(|error| malformed(&error.to_string()))?
        };
        let body = take(&mut rest, body_length)?;
        frames.push_back(FrameOut { header, body, ..FrameOut::default() });
    }
    Ok(frames)
}

/// The next `length` bytes, in as many pieces as they lie in.
fn take(rest: &mut VecDeque<Buffer>, mut length: usize) -> Result<Vec<Buffer>, ArrowError> {
    let mut taken = Vec::new();
    while length > 0 {
        let buffer = rest.pop_front().ok_or_else(|| malformed("it is too short"))?;
        if buffer.len() > length {
            rest.push_front(buffer.slice(length));
            taken.push(buffer.slice_with_length(0, length));
            length = 0;
        } else {
            length -= buffer.len();
            taken.push(buffer);
        }
    }
    Ok(taken)
}

fn malformed(what: &str) -> ArrowError {
    ArrowError::IpcError(format!("arrow-ipc wrote a message that cannot be cut: {what}"))
}
