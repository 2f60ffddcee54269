//! Files of layers in columns, as they would travel on a stream: to read in the layout of its input, to write in that of its output.

mod ipc;

use std::fs::File;

use arrow_array::RecordBatch;
use arrow_ipc::writer::{FileWriter, IpcWriteOptions};
use arrow_schema::{ArrowError, SchemaRef};

pub use self::ipc::Columns;
use crate::{
    error::CheckpointError,
    storage::Location,
    target::{Making, Stop, Target},
};

/// Endings of files of columns.
const ENDINGS: [&str; 3] = ["arrow", "arrows", "ipc"];

/// Whether a path or a URI is, by its ending, a file of columns.
pub fn is_columns(location: &Location) -> bool {
    let path = location.shown();
    path.extension().is_some_and(|ending| ENDINGS.iter().any(|known| ending == *known))
}

/// A file of columns to write: complete under its name, or not there at all.
pub(crate) struct ColumnsFile {
    target: Target,
    making: Making,
    writer: FileWriter<File>,
}

impl ColumnsFile {
    /// Begins a file of Arrow IPC with that schema.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn new(target: Target, schema: &SchemaRef) -> Result<ColumnsFile, CheckpointError> {
        let mut making = target.begin()?;
        let file = making.file().try_clone().map_err(target.writing())?;
        let options = IpcWriteOptions::default();
        let writer = FileWriter::try_new_with_options(file, schema, options).map_err(unwritten(&target))?;
        Ok(ColumnsFile { target, making, writer })
    }

    /// Adds rows.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn write(&mut self, batch: &RecordBatch) -> Result<(), CheckpointError> {
        self.writer.write(batch).map_err(unwritten(&self.target))
    }

    /// Gives the file its name; its bytes.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], `Interrupted` if `stop` was first.
    pub(crate) fn seal(mut self, stop: &Stop) -> Result<u64, CheckpointError> {
        self.writer.finish().map_err(unwritten(&self.target))?;
        let bytes = self.making.file().metadata().map_err(self.target.writing())?.len();
        self.target.complete(self.making, stop)?;
        Ok(bytes)
    }
}

fn unwritten(target: &Target) -> impl Fn(ArrowError) -> CheckpointError {
    let path = target.path();
    move |error| match error {
        ArrowError::IoError(_, error) => CheckpointError::Io { what: "cannot write", path: path.clone(), error },
        other => CheckpointError::Ours(other.to_string()),
    }
}
