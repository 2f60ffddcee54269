//! A file of columns to write: complete under its name, or not there at all.

use std::{fs::File, io, path::Path};

use arrow_array::RecordBatch;
use arrow_ipc::writer::FileWriter;
use arrow_schema::{ArrowError, SchemaRef};
use parquet::{
    arrow::ArrowWriter,
    errors::ParquetError,
    file::properties::{EnabledStatistics, WriterProperties},
    schema::types::ColumnPath,
};
use quarrel_proto::column;

use super::Format;
use crate::{
    error::CheckpointError,
    target::{Making, Stop, Target},
};

/// Of a row group of Parquet, which is in memory until it is written.
const GROUP_BYTES: usize = 32 << 20;

/// A file in the making.
pub(crate) struct ColumnsFile {
    target: Target,
    making: Making,
    writer: Writer,
}

enum Writer {
    Ipc(Box<FileWriter<File>>),
    Parquet(Box<ArrowWriter<File>>),
}

impl ColumnsFile {
    /// Begins a file of the format that its name says, with that schema.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn new(target: Target, schema: &SchemaRef) -> Result<ColumnsFile, CheckpointError> {
        let mut making = target.begin()?;
        let file = making.file().try_clone().map_err(target.writing())?;
        let path = target.path();
        let writer = match Format::of(&path) {
            Some(Format::Parquet) => {
                let writer = ArrowWriter::try_new(file, SchemaRef::clone(schema), Some(properties()));
                Writer::Parquet(Box::new(writer.map_err(|error| unwritten(&path, of_parquet(error)))?))
            }
            Some(Format::Ipc) | None => {
                Writer::Ipc(Box::new(FileWriter::try_new(file, schema).map_err(|error| unwritten(&path, error))?))
            }
        };
        Ok(ColumnsFile { target, making, writer })
    }

    /// Adds rows.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn write(&mut self, batch: &RecordBatch) -> Result<(), CheckpointError> {
        let written = match &mut self.writer {
            Writer::Ipc(writer) => writer.write(batch),
            Writer::Parquet(writer) => write(writer, batch).map_err(of_parquet),
        };
        written.map_err(|error| unwritten(&self.target.path(), error))
    }

    /// Gives the file its name; its bytes.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], `Interrupted` if `stop` was first.
    pub(crate) fn seal(mut self, stop: &Stop) -> Result<u64, CheckpointError> {
        let finished = match &mut self.writer {
            Writer::Ipc(writer) => writer.finish(),
            Writer::Parquet(writer) => writer.finish().map(drop).map_err(of_parquet),
        };
        finished.map_err(|error| unwritten(&self.target.path(), error))?;
        let bytes = self.making.file().metadata().map_err(self.target.writing())?.len();
        self.target.complete(self.making, stop)?;
        Ok(bytes)
    }
}

/// Codes hardly get smaller by compression, or by dictionaries.
fn properties() -> WriterProperties {
    WriterProperties::builder()
        .set_created_by(format!("quarrel {}", env!("CARGO_PKG_VERSION")))
        .set_max_row_group_row_count(None)
        .set_column_dictionary_enabled(ColumnPath::from(column::QUANTIZED_DATA), false)
        .set_statistics_enabled(EnabledStatistics::None)
        // So that a layer is found without reading all of them.
        .set_column_statistics_enabled(ColumnPath::from(column::LAYER_NAME), EnabledStatistics::Chunk)
        .build()
}

fn write(writer: &mut ArrowWriter<File>, batch: &RecordBatch) -> Result<(), ParquetError> {
    writer.write(batch)?;
    match writer.in_progress_size() > GROUP_BYTES {
        true => writer.flush(),
        false => Ok(()),
    }
}

fn unwritten(path: &Path, error: ArrowError) -> CheckpointError {
    match error {
        ArrowError::IoError(_, error) => CheckpointError::Io { what: "cannot write", path: path.to_owned(), error },
        other => CheckpointError::Ours(other.to_string()),
    }
}

/// What is wrong with the disk is no fault of ours, however often it was wrapped.
fn of_parquet(error: ParquetError) -> ArrowError {
    match error {
        ParquetError::External(error) => match error.downcast::<io::Error>() {
            Ok(error) => ArrowError::IoError(error.to_string(), *error),
            Err(error) => ArrowError::ExternalError(error),
        },
        other => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_no_fault_of_ours() {
        let full = ParquetError::from(io::Error::from(io::ErrorKind::StorageFull));
        let error = unwritten(Path::new("out.parquet"), of_parquet(full));
        assert!(matches!(&error, CheckpointError::Io { what: "cannot write", .. }), "{error}");
    }
}
