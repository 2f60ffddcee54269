//! Parquet, row by row: whatever a file claims, one row and the pages that it lies in are in memory.

mod codec;
mod footer;
mod header;
mod pages;
mod thrift;

use std::{path::PathBuf, sync::Arc};

use arrow_array::{Array, RecordBatch, RecordBatchReader};
use arrow_buffer::Buffer;
use arrow_schema::{Schema, SchemaRef};
use base64::{Engine, prelude::BASE64_STANDARD};
use parquet::{
    arrow::{
        ARROW_SCHEMA_META_KEY, FieldLevels, ProjectionMask,
        arrow_reader::{ParquetRecordBatchReader, RowGroups},
        parquet_to_arrow_field_levels,
    },
    column::page::{PageIterator, PageReader},
    errors::{ParquetError, Result as ParquetResult},
    file::metadata::{ParquetMetaData, ParquetMetaDataReader, RowGroupMetaData},
};
use quarrel_engine::{Decoded, Decoder, Limits, contained, shorten};

use self::pages::{Meter, Pages};
use crate::{error::CheckpointError, storage::Opened};

const MAGIC: &[u8; 4] = b"PAR1";
/// Of the length and the magic at the end.
const TAIL_BYTES: u64 = 8;
/// In memory it is some twenty times as large.
const FOOTER_BYTES_MAX: u64 = 16 << 20;
/// Rows of more bytes are read if the file has bytes for them.
const ROW_BYTES: u64 = 256 << 20;
/// Codecs and encodings make a file smaller, but weights not by more than that.
const SHRUNK_MAX: u64 = 16;

/// A file's rows, each a batch.
pub(super) struct Parquet {
    path: PathBuf,
    file: Arc<Opened>,
    metadata: Arc<ParquetMetaData>,
    columns: FieldLevels,
    schema: SchemaRef,
    meter: Meter,
    /// The row group whose rows are read.
    group: usize,
    rows: Option<ParquetRecordBatchReader>,
}

impl Parquet {
    /// Reads the footer. A row of more bytes than `message_bytes_max`, or than the file can well hold, is an error.
    pub(super) fn open(path: PathBuf, file: Opened, limits: Limits) -> Result<Parquet, CheckpointError> {
        let wrong = |detail: String| malformed(&path, &detail);
        let footer = footer(&file).map_err(|error| match error {
            Footer::Io(error) => CheckpointError::Io { what: "cannot read", path: path.clone(), error },
            Footer::Wrong(detail) => wrong(detail),
        })?;
        footer::check(&footer).map_err(wrong)?;
        let metadata = guarded(|| ParquetMetaDataReader::decode_metadata(&footer)).map_err(wrong)?;
        let hint = arrow_schema(&metadata, limits).map_err(wrong)?;
        let tree = metadata.file_metadata().schema_descr();
        let columns =
            guarded(|| parquet_to_arrow_field_levels(tree, ProjectionMask::all(), hint.as_ref().map(Schema::fields)))
                .map_err(wrong)?;
        let row_bytes_max = (limits.message_bytes_max as u64).min(ROW_BYTES.max(SHRUNK_MAX * file.bytes()));
        let mut parquet = Parquet {
            schema: SchemaRef::new(Schema::empty()),
            meter: Meter::new(row_bytes_max),
            file: Arc::new(file),
            metadata: Arc::new(metadata),
            group: 0,
            rows: None,
            columns,
            path,
        };
        // The crate tells the schema of a reader alone.
        match parquet.group()? {
            Some(rows) => parquet.schema = rows.schema(),
            None => return Err(malformed(&parquet.path, "it has no rows")),
        }
        Ok(parquet)
    }

    pub(super) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The next row; none at the end.
    pub(super) fn next_batch(&mut self) -> Result<Option<RecordBatch>, CheckpointError> {
        loop {
            let meter = self.meter.clone();
            let Some(rows) = self.group()? else { return Ok(None) };
            meter.next_row();
            let batch = guarded(|| rows.next().map(|batch| batch.map_err(ParquetError::from)).transpose())
                .and_then(|batch| batch.map(valid).transpose())
                .map_err(|detail| malformed(&self.path, &detail))?;
            match batch {
                Some(batch) => return Ok(Some(batch)),
                None => (self.rows, self.group) = (None, self.group + 1),
            }
        }
    }

    /// The reader of the row group whose turn it is; none after the last.
    fn group(&mut self) -> Result<Option<&mut ParquetRecordBatchReader>, CheckpointError> {
        if self.rows.is_none() && self.group < self.metadata.num_row_groups() {
            let group = Group {
                file: Arc::clone(&self.file),
                metadata: Arc::clone(&self.metadata),
                meter: self.meter.clone(),
                group: self.group,
            };
            let rows = guarded(|| ParquetRecordBatchReader::try_new_with_row_groups(&self.columns, &group, 1, None));
            self.rows = Some(rows.map_err(|detail| malformed(&self.path, &detail))?);
        }
        Ok(self.rows.as_mut())
    }
}

enum Footer {
    Io(std::io::Error),
    Wrong(String),
}

/// The bytes of a file's footer.
fn footer(file: &Opened) -> Result<bytes::Bytes, Footer> {
    let Some(end) = file.bytes().checked_sub(TAIL_BYTES) else {
        return Err(Footer::Wrong(format!("it has {} bytes, fewer than any file of Parquet", file.bytes())));
    };
    let tail = file.read(end..file.bytes()).map_err(Footer::Io)?;
    let (length, magic) = tail.split_at(4);
    if magic != MAGIC {
        return Err(Footer::Wrong("it does not end as a file of Parquet does, with `PAR1`".to_owned()));
    }
    let bytes = length.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    let most = FOOTER_BYTES_MAX.min(end);
    if bytes > most {
        return Err(Footer::Wrong(format!("its footer claims {bytes} bytes: expected at most {most}")));
    }
    file.read(end - bytes..end).map_err(Footer::Io)
}

/// The Arrow schema that a writer keeps beside Parquet's: which lists are large, and which have a fixed size.
fn arrow_schema(metadata: &ParquetMetaData, limits: Limits) -> Result<Option<Schema>, String> {
    let pairs = metadata.file_metadata().key_value_metadata().into_iter().flatten();
    let kept = pairs.filter(|pair| pair.key == ARROW_SCHEMA_META_KEY).find_map(|pair| pair.value.as_deref());
    let Some(text) = kept else { return Ok(None) };
    let wrong = |detail: &str| format!("its `{ARROW_SCHEMA_META_KEY}` is none: {detail}");
    let message = BASE64_STANDARD.decode(text).map_err(|error| wrong(&error.to_string()))?;
    // As in a stream: a mark and a length come before it, but for old writers.
    let header = match message.split_at_checked(8) {
        Some((prefix, header)) if prefix.starts_with(&[0xff; 4]) => header,
        _ => &message,
    };
    match Decoder::new(limits).decode(header, &Buffer::default()) {
        Ok(Decoded::Schema(schema)) => Ok(Some(schema.as_ref().clone())),
        Ok(_) => Err(wrong("it is another message")),
        Err(error) => Err(wrong(&error.to_string())),
    }
}

/// What the `parquet` crate makes of the file's bytes, at which it may panic.
fn guarded<T>(read: impl FnOnce() -> ParquetResult<T>) -> Result<T, String> {
    match contained(read) {
        Some(Ok(read)) => Ok(read),
        Some(Err(error)) => Err(shorten(&error.to_string(), 500)),
        None => Err("its lengths or levels do not fit its pages".to_owned()),
    }
}

/// A batch whose offsets and strings are as they must be: the crate builds some without a look at them.
fn valid(batch: RecordBatch) -> Result<RecordBatch, String> {
    for column in batch.columns() {
        column.to_data().validate_full().map_err(|error| shorten(&error.to_string(), 500))?;
    }
    Ok(batch)
}

fn malformed(path: &std::path::Path, detail: &str) -> CheckpointError {
    CheckpointError::Columns { path: path.to_owned(), format: "Parquet", detail: detail.to_owned() }
}

/// One row group of a file.
struct Group {
    file: Arc<Opened>,
    metadata: Arc<ParquetMetaData>,
    meter: Meter,
    group: usize,
}

impl RowGroups for Group {
    fn num_rows(&self) -> usize {
        usize::try_from(self.metadata.row_group(self.group).num_rows()).unwrap_or(0)
    }

    fn column_chunks(&self, column: usize) -> ParquetResult<Box<dyn PageIterator>> {
        let chunk = self.metadata.row_group(self.group).column(column);
        let pages = Pages::new(Arc::clone(&self.file), chunk, self.meter.clone())?;
        Ok(Box::new(Chunk(Some(Box::new(pages)))))
    }

    fn row_groups(&self) -> Box<dyn Iterator<Item = &RowGroupMetaData> + '_> {
        Box::new(std::iter::once(self.metadata.row_group(self.group)))
    }

    fn metadata(&self) -> &ParquetMetaData {
        &self.metadata
    }
}

/// A column's one chunk within a row group.
struct Chunk(Option<Box<dyn PageReader>>);

impl Iterator for Chunk {
    type Item = ParquetResult<Box<dyn PageReader>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.take().map(Ok)
    }
}

impl PageIterator for Chunk {}
