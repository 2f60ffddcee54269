//! Parquet, row by row: whatever a file claims, one row and the pages that it lies in are in memory.

mod codec;
mod footer;
mod header;
mod pages;
mod thrift;

use std::{path::PathBuf, sync::Arc};

use arrow_array::{Array, RecordBatch, RecordBatchReader};
use arrow_buffer::Buffer;
use arrow_schema::{DataType, Schema, SchemaRef};
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
const FOOTER_BYTES_MAX: u64 = 4 << 20;
/// Rows of more bytes are read if the file has bytes for them.
const ROW_BYTES: u64 = 64 << 20;
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
    /// The row group whose rows are read, and how many of them have been.
    group: usize,
    read: i64,
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
        let footer = footer::anew(&footer).map_err(wrong)?;
        let metadata = guarded(|| ParquetMetaDataReader::decode_metadata(&footer)).map_err(wrong)?;
        check_groups(&metadata, file.bytes()).map_err(wrong)?;
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
            read: 0,
            rows: None,
            columns,
            path,
        };
        // The crate tells the schema of a reader alone.
        parquet.schema = parquet.reader(None)?.schema();
        let widest = parquet.schema.fields().iter().map(|field| fixed_values(field.data_type())).max().unwrap_or(0);
        if widest.saturating_mul(8) > row_bytes_max {
            // A null is as large as any other.
            let detail = format!(
                "a column has lists of a fixed size of {widest}: expected rows of at most {row_bytes_max} bytes"
            );
            return Err(malformed(&parquet.path, &detail));
        }
        Ok(parquet)
    }

    pub(super) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The next row; none at the end.
    pub(super) fn next_batch(&mut self) -> Result<Option<RecordBatch>, CheckpointError> {
        while self.group < self.metadata.num_row_groups() {
            let expected = self.metadata.row_group(self.group).num_rows();
            // Some writers leave groups of nothing, without pages.
            if expected > 0 {
                let mut rows = match self.rows.take() {
                    Some(rows) => rows,
                    None => self.reader(Some(self.group))?,
                };
                self.meter.next_row();
                let batch = guarded(|| rows.next().transpose().map_err(ParquetError::from))
                    .and_then(|batch| batch.map(valid).transpose())
                    .map_err(|detail| self.fault(&detail))?;
                if let Some(batch) = batch {
                    (self.rows, self.read) = (Some(rows), self.read + batch.num_rows() as i64);
                    return Ok(Some(batch));
                }
                if self.read != expected {
                    let detail = format!("a row group says that it has {expected} rows, and has {}", self.read);
                    return Err(malformed(&self.path, &detail));
                }
            }
            (self.group, self.read) = (self.group + 1, 0);
        }
        Ok(None)
    }

    /// A reader of the rows of a row group, or of none.
    fn reader(&self, group: Option<usize>) -> Result<ParquetRecordBatchReader, CheckpointError> {
        let group = Group {
            file: Arc::clone(&self.file),
            metadata: Arc::clone(&self.metadata),
            meter: self.meter.clone(),
            group,
        };
        guarded(|| ParquetRecordBatchReader::try_new_with_row_groups(&self.columns, &group, 1, None))
            .map_err(|detail| self.fault(&detail))
    }

    /// What is wrong: with the disk or the store, if reading failed, and else with the file.
    fn fault(&self, detail: &str) -> CheckpointError {
        match self.meter.unread() {
            Some(error) => CheckpointError::Io { what: "cannot read", path: self.path.clone(), error },
            None => malformed(&self.path, detail),
        }
    }
}

/// Looks at how many rows and bytes there are said to be.
fn check_groups(metadata: &ParquetMetaData, file_bytes: u64) -> Result<(), String> {
    let said = metadata.file_metadata().num_rows();
    let rows = metadata.row_groups().iter().map(RowGroupMetaData::num_rows).fold(0, i64::saturating_add);
    if rows != said || metadata.row_groups().iter().any(|group| group.num_rows() < 0) {
        return Err(format!("it says that it has {said} rows, and its row groups have {rows}"));
    }
    // Groups that share their pages would be work without end.
    let chunks = metadata.row_groups().iter().flat_map(RowGroupMetaData::columns);
    let bytes = chunks.map(|chunk| u64::try_from(chunk.compressed_size()).unwrap_or(0)).fold(0, u64::saturating_add);
    if bytes > file_bytes {
        return Err(format!("its columns claim {bytes} bytes, of {file_bytes} of the file"));
    }
    Ok(())
}

/// Values of a row that its type fixes.
fn fixed_values(data_type: &DataType) -> u64 {
    match data_type {
        DataType::FixedSizeList(item, size) => {
            fixed_values(item.data_type()).saturating_mul(u64::try_from(*size).unwrap_or(0))
        }
        DataType::FixedSizeBinary(size) => u64::try_from(*size).unwrap_or(0),
        DataType::List(item) | DataType::LargeList(item) => fixed_values(item.data_type()),
        DataType::Struct(fields) => {
            fields.iter().map(|field| fixed_values(field.data_type())).fold(0, u64::saturating_add)
        }
        _ => 1,
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
        Ok(Decoded::Schema(schema)) => Ok(Some(plain(&schema))),
        Ok(_) => Err(wrong("it is another message")),
        Err(error) => Err(wrong(&error.to_string())),
    }
}

/// The schema with what dictionaries stand for: each row would bring all of its column's.
fn plain(schema: &Schema) -> Schema {
    let fields = schema.fields().iter().map(|field| match field.data_type() {
        DataType::Dictionary(_, values) => field.as_ref().clone().with_data_type(values.as_ref().clone()),
        _ => field.as_ref().clone(),
    });
    Schema::new(fields.collect::<Vec<_>>())
}

/// What the `parquet` crate makes of the file's bytes, at which it may panic.
fn guarded<T>(read: impl FnOnce() -> ParquetResult<T>) -> Result<T, String> {
    match contained(read) {
        Some(Ok(read)) => Ok(read),
        Some(Err(error)) => Err(shorten(sentence(&error.to_string()), 500)),
        None => Err("its lengths or levels do not fit its pages".to_owned()),
    }
}

/// What an error says, without whose errors it has passed through.
fn sentence(mut said: &str) -> &str {
    while let Some(rest) = WRAPPED.iter().find_map(|wrapped| said.strip_prefix(wrapped)) {
        said = rest;
    }
    said
}

const WRAPPED: [&str; 4] = ["External: ", "Arrow: ", "Parquet argument error: ", "Parquet error: "];

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
    /// None of a group of nothing.
    group: Option<usize>,
}

impl RowGroups for Group {
    fn num_rows(&self) -> usize {
        self.row_groups().map(|group| usize::try_from(group.num_rows()).unwrap_or(0)).sum()
    }

    fn column_chunks(&self, column: usize) -> ParquetResult<Box<dyn PageIterator>> {
        let Some(group) = self.row_groups().next() else { return Ok(Box::new(Chunk(None))) };
        let pages = Pages::new(Arc::clone(&self.file), group.column(column), self.meter.clone())?;
        Ok(Box::new(Chunk(Some(Box::new(pages)))))
    }

    fn row_groups(&self) -> Box<dyn Iterator<Item = &RowGroupMetaData> + '_> {
        Box::new(self.group.map(|group| self.metadata.row_group(group)).into_iter())
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::fs;

    use arrow_array::{ArrayRef, Int32Array};
    use parquet::arrow::ArrowWriter;

    use super::*;
    use crate::storage::Location;

    #[test]
    fn a_file_that_cannot_be_read_is_no_file_of_another_kind() {
        let numbers: ArrayRef = Arc::new(Int32Array::from_iter_values(0..1_000));
        let batch = RecordBatch::try_from_iter([("n", numbers)]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("n.parquet");
        let mut writer = ArrowWriter::try_new(fs::File::create(&path).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        let mut parquet = Parquet::open(path.clone(), Location::disk(&path).open().unwrap(), Limits::NONE).unwrap();
        // Cut short between the footer and the pages: that is the disk's.
        fs::File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        let error = parquet.next_batch().unwrap_err();
        assert!(matches!(&error, CheckpointError::Io { what: "cannot read", .. }), "{error}");
    }
}
