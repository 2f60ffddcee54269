//! Arrow IPC of a file: the format for files, whose footer is not needed, and that for streams.

use std::path::PathBuf;

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_schema::SchemaRef;
use quarrel_engine::{Decoded, Decoder, Limits, body_bytes};

use crate::{error::CheckpointError, storage::Opened};

/// How a file begins that is no stream; behind it a stream is all that is read.
const MAGIC: &[u8; 8] = b"ARROW1\0\0";
/// Before the length of a header, since version 0.15 of Arrow.
const CONTINUES: [u8; 4] = [0xff; 4];
/// As on the wire.
const HEADER_BYTES_MAX: u64 = 4 << 20;

/// A file's batches. Only one of them is in memory.
#[derive(Debug)]
pub(super) struct Ipc {
    path: PathBuf,
    file: Opened,
    /// Where the next message begins.
    at: u64,
    decoder: Decoder,
    schema: SchemaRef,
    message_bytes_max: u64,
}

impl Ipc {
    /// Reads the schema. A batch of more bytes than `message_bytes_max` is an error.
    pub(super) fn open(path: PathBuf, file: Opened, limits: Limits) -> Result<Ipc, CheckpointError> {
        let mut columns = Ipc {
            path,
            file,
            at: 0,
            decoder: Decoder::new(limits),
            schema: SchemaRef::new(arrow_schema::Schema::empty()),
            message_bytes_max: limits.message_bytes_max as u64,
        };
        let bytes = columns.file.bytes();
        if bytes >= 8 && columns.read(0..8)?.as_slice() == MAGIC {
            columns.at = 8;
        }
        match columns.message()? {
            Some(Decoded::Schema(schema)) => columns.schema = schema,
            _ => return Err(columns.malformed("it does not begin with a schema")),
        }
        Ok(columns)
    }

    /// The schema of its batches.
    pub(super) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The next batch; none at the end.
    pub(super) fn next_batch(&mut self) -> Result<Option<RecordBatch>, CheckpointError> {
        loop {
            match self.message()? {
                Some(Decoded::Batch(batch)) => return Ok(Some(batch)),
                Some(Decoded::Nothing) => {}
                Some(Decoded::Schema(_)) => return Err(self.malformed("it has a second schema")),
                None => return Ok(None),
            }
        }
    }

    fn message(&mut self) -> Result<Option<Decoded>, CheckpointError> {
        let left = self.file.bytes() - self.at;
        // A stream may end without a word.
        if left == 0 {
            return Ok(None);
        }
        if left < 8 {
            return Err(self.malformed("it is cut short"));
        }
        let prefix = self.read(self.at..self.at + 8)?;
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        if prefix[..4] != CONTINUES {
            return Err(self.malformed("it has no message where one is expected"));
        }
        let header = number(&prefix[4..]);
        if header == 0 {
            return Ok(None);
        }
        if header > HEADER_BYTES_MAX.min(left - 8) {
            return Err(
                self.malformed(&format!("a message's header claims {header} bytes, of {} that are left", left - 8))
            );
        }
        let start = self.at + 8;
        let header = self.read(start..start + header)?;
        let start = start + header.len() as u64;
        let body = body_bytes(&header)?;
        if body > self.file.bytes() - start {
            return Err(self
                .malformed(&format!("a message claims {body} bytes, of {} that are left", self.file.bytes() - start)));
        }
        if body > self.message_bytes_max {
            let most = self.message_bytes_max;
            return Err(
                self.malformed(&format!("a batch has {body} bytes: expected at most {most} (`message_bytes_max`)"))
            );
        }
        let data = self.read(start..start + body)?;
        self.at = start + body;
        Ok(Some(self.decoder.decode(&header, &data)?))
    }

    fn read(&self, range: std::ops::Range<u64>) -> Result<Buffer, CheckpointError> {
        let bytes = self.file.read(range).map_err(CheckpointError::io("cannot read", &self.path))?;
        Ok(Buffer::from(bytes))
    }

    fn malformed(&self, detail: &str) -> CheckpointError {
        CheckpointError::Columns { path: self.path.clone(), format: "Arrow IPC", detail: detail.to_owned() }
    }
}
