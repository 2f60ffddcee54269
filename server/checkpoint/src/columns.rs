//! Files of layers in columns, as they would travel on a stream: to read in the layout of its input, to write in that of its output.

mod ipc;
mod parquet;
mod written;

use std::{collections::VecDeque, fmt, path::Path, sync::Arc};

use arrow_array::RecordBatch;
use arrow_schema::{Field, FieldRef, Schema, SchemaRef, extension::EXTENSION_TYPE_METADATA_KEY};
use quarrel_engine::Limits;

pub(crate) use self::written::ColumnsFile;
use self::{ipc::Ipc, parquet::Parquet};
use crate::{
    error::CheckpointError,
    storage::{Kind, Location},
};

/// Of files of columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Ipc,
    Parquet,
}

impl Format {
    /// What a file with that ending holds.
    fn of(path: &Path) -> Option<Format> {
        match path.extension()?.to_str()? {
            "arrow" | "arrows" | "ipc" => Some(Format::Ipc),
            "parquet" => Some(Format::Parquet),
            _ => None,
        }
    }
}

/// Whether a path or a URI is, by its ending, a file of columns.
pub fn is_columns(location: &Location) -> bool {
    Format::of(&location.shown()).is_some()
}

/// Whether that is a file of columns, or a folder that holds some and no safetensors. It may block.
pub fn holds_columns(location: &Location) -> bool {
    // What cannot be looked at is told by whoever opens it.
    let is_folder = || location.kind().is_ok_and(|kind| kind == Kind::Folder);
    is_columns(location) || is_folder() && location.names().is_ok_and(|names| are_columns(&names))
}

fn are_columns(names: &[String]) -> bool {
    let has = |wanted: fn(&Path) -> bool| names.iter().any(|name| wanted(Path::new(name)));
    has(|name| Format::of(name).is_some()) && !has(|name| name.extension().is_some_and(|it| it == "safetensors"))
}

/// The batches of a file, or of the files of a folder in the order of their names. Only one of them is in memory.
pub struct Columns {
    open: Open,
    /// Files that come after it.
    left: VecDeque<Location>,
    limits: Limits,
    bytes: u64,
}

impl Columns {
    /// Opens a file or a folder, and reads the schemas. A batch of more bytes than `message_bytes_max` is an error.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; [`CheckpointError::Columns`] for what is no Arrow IPC and no Parquet, or files of several schemas.
    pub fn open(location: &Location, limits: Limits) -> Result<Columns, CheckpointError> {
        let mut files = VecDeque::from(files(location)?);
        let none = || wrong(location, "the folder holds no file of columns");
        let first = files.pop_front().ok_or_else(none)?;
        let (open, mut bytes) = Open::file(&first, limits)?;
        for file in &files {
            let (other, more) = Open::file(file, limits)?;
            if !are_alike(other.schema(), open.schema()) {
                let first = first.shown();
                return Err(wrong(file, &format!("its columns are not those of `{}`", first.display())));
            }
            bytes += more;
        }
        Ok(Columns { open, left: files, limits, bytes })
    }

    /// The schema of its batches.
    pub fn schema(&self) -> &SchemaRef {
        self.open.schema()
    }

    /// Bytes of its files.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The next batch; none at the end.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], [`CheckpointError::Columns`].
    pub fn next_batch(&mut self) -> Result<Option<RecordBatch>, CheckpointError> {
        loop {
            if let Some(batch) = self.open.next_batch()? {
                return Ok(Some(batch));
            }
            let Some(next) = self.left.pop_front() else { return Ok(None) };
            let schema = Arc::clone(self.schema());
            self.open = Open::file(&next, self.limits)?.0;
            if !are_alike(self.schema(), &schema) {
                return Err(wrong(&next, "its columns are no longer those of the file before"));
            }
        }
    }
}

impl fmt::Debug for Columns {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Columns").field("schema", self.schema()).field("left", &self.left).finish_non_exhaustive()
    }
}

/// Whether columns have the same names and types, whatever those within lists are called: each format has its own word.
fn are_alike(one: &Schema, other: &Schema) -> bool {
    let extension = |field: &Field| {
        let metadata = field.metadata().get(EXTENSION_TYPE_METADATA_KEY).cloned();
        (field.extension_type_name().map(str::to_owned), metadata)
    };
    let is_like = |(one, other): (&FieldRef, &FieldRef)| {
        let is_named = one.name() == other.name() && extension(one) == extension(other);
        is_named && one.data_type().equals_datatype(other.data_type())
    };
    one.fields().len() == other.fields().len() && one.fields().iter().zip(other.fields()).all(is_like)
}

/// The files at a location: itself, or those of a folder.
fn files(location: &Location) -> Result<Vec<Location>, CheckpointError> {
    let path = location.shown();
    if location.kind().map_err(CheckpointError::io("cannot open", &path))? != Kind::Folder {
        return Ok(vec![location.clone()]);
    }
    let names = location.names().map_err(CheckpointError::io("cannot read", &path))?;
    let names = names.iter().map(Path::new).filter(|name| Format::of(name).is_some());
    Ok(names.map(|name| location.join(name)).collect())
}

/// A file that is open.
enum Open {
    Ipc(Box<Ipc>),
    Parquet(Box<Parquet>),
}

impl Open {
    /// Opens a file; its bytes.
    fn file(location: &Location, limits: Limits) -> Result<(Open, u64), CheckpointError> {
        let path = location.shown();
        let kind = location.kind().map_err(CheckpointError::io("cannot open", &path))?;
        if kind != Kind::File {
            return Err(wrong(location, "it is no regular file"));
        }
        let file = location.open().map_err(CheckpointError::io("cannot open", &path))?;
        let bytes = file.bytes();
        let open = match Format::of(&path) {
            Some(Format::Parquet) => Open::Parquet(Box::new(Parquet::open(path, file, limits)?)),
            Some(Format::Ipc) | None => Open::Ipc(Box::new(Ipc::open(path, file, limits)?)),
        };
        Ok((open, bytes))
    }

    fn schema(&self) -> &SchemaRef {
        match self {
            Open::Ipc(file) => file.schema(),
            Open::Parquet(file) => file.schema(),
        }
    }

    fn next_batch(&mut self) -> Result<Option<RecordBatch>, CheckpointError> {
        match self {
            Open::Ipc(file) => file.next_batch(),
            Open::Parquet(file) => file.next_batch(),
        }
    }
}

fn wrong(location: &Location, detail: &str) -> CheckpointError {
    CheckpointError::Columns { path: location.shown(), format: "Arrow IPC or Parquet", detail: detail.to_owned() }
}
