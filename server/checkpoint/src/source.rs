//! A safetensors file to read from: its header, and ranges of its tensors.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, Write},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use quarrel_engine::Scheme;
use safetensors::Dtype;

use crate::{
    SCHEMES_KEY,
    columns::is_columns,
    error::CheckpointError,
    header,
    storage::{Kind, Location, Opened},
    stored::Entry,
    target::Stop,
    view::Decoded,
};

/// What is decoded at once where it is copied.
const DECODED_BYTES: u64 = 4 << 20;

/// As the safetensors library itself has it.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// A checkpoint file. Only its header is in memory; a clone is cheap.
#[derive(Debug, Clone)]
pub struct Source(Arc<Header>);

#[derive(Debug)]
struct Header {
    /// The file's path or URI.
    path: PathBuf,
    location: Location,
    file: Arc<Opened>,
    tensors: Vec<Tensor>,
    places: HashMap<String, usize>,
    metadata: BTreeMap<String, String>,
    /// Tensors that are decoded where they are read.
    decoded: Option<Arc<Decoded>>,
}

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Where its bytes are in the file.
    pub(crate) at: Range<u64>,
    /// What it is decoded of, if it is not there as it is.
    pub scheme: Option<Scheme>,
}

impl Tensor {
    /// Its name, type and shape.
    pub(crate) fn entry(&self) -> Entry {
        (self.name.clone(), self.dtype, self.shape.clone())
    }

    /// How many bytes it takes.
    pub fn bytes(&self) -> u64 {
        self.at.end - self.at.start
    }
}

impl Source {
    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; [`CheckpointError::Malformed`] if it is no safetensors file, or is cut short.
    pub fn open(location: &Location) -> Result<Source, CheckpointError> {
        let path = location.shown();
        // Before it is opened: opening a pipe waits for whoever writes into it.
        let what = match location.kind().map_err(CheckpointError::io("cannot open", &path))? {
            Kind::File if is_columns(location) => Some("it holds layers in columns, which `quantize` alone reads"),
            Kind::File => None,
            Kind::Folder => Some("it is a folder"),
            Kind::Other => Some("it is no regular file"),
        };
        if let Some(what) = what {
            return Err(CheckpointError::Malformed {
                path,
                detail: format!("{what}: expected one file of safetensors"),
            });
        }
        let file = location.open().map_err(CheckpointError::io("cannot open", &path))?;
        let read = |what: io::Error| CheckpointError::Io { what: "cannot read", path: path.clone(), error: what };
        let malformed = |detail: String| CheckpointError::Malformed { path: path.clone(), detail };
        let length = file.bytes();
        if length < 8 {
            return Err(malformed(format!("it has {length} bytes: expected at least 8")));
        }
        let prefix = file.read(0..8).map_err(read)?;
        let header = prefix.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        if header > HEADER_BYTES_MAX || header > length - 8 {
            return Err(malformed(format!("its header claims {header} bytes, in a file of {length}")));
        }
        let buffer = file.read(8..8 + header).map_err(read)?;
        let found = header::read(&buffer).map_err(malformed)?;
        let (data, expected) = (8 + header, 8 + header + found.data_len() as u64);
        if expected != length {
            return Err(malformed(format!("it has {length} bytes: its header says {expected}")));
        }
        let tensors = found.offset_keys().into_iter().filter_map(|name| {
            let info = found.info(&name)?;
            let (start, end) = info.data_offsets;
            let shape = info.shape.iter().map(|dimension| *dimension as u64).collect();
            let at = data + start as u64..data + end as u64;
            Some(Tensor { name, dtype: info.dtype, shape, at, scheme: None })
        });
        let tensors = Vec::from_iter(tensors);
        let metadata = found.metadata().clone().unwrap_or_default().into_iter().collect();
        let places = tensors.iter().enumerate().map(|(at, tensor)| (tensor.name.clone(), at)).collect();
        let (location, file) = (location.clone(), Arc::new(file));
        Ok(Source(Arc::new(Header { path, location, file, tensors, places, metadata, decoded: None })))
    }

    /// The same file with other tensors: within its own, or decoded.
    pub(crate) fn with(&self, tensors: Vec<Tensor>, decoded: Option<Arc<Decoded>>) -> Source {
        let places = tensors.iter().enumerate().map(|(at, tensor)| (tensor.name.clone(), at)).collect();
        let Header { path, location, file, metadata, decoded: before, .. } = &*self.0;
        let (path, location, mut metadata) = (path.clone(), location.clone(), metadata.clone());
        if decoded.is_some() {
            metadata.remove(SCHEMES_KEY);
        }
        let decoded = decoded.or_else(|| before.clone());
        Source(Arc::new(Header { path, location, file: Arc::clone(file), tensors, places, metadata, decoded }))
    }

    /// Where the file is.
    pub(crate) fn location(&self) -> &Location {
        &self.0.location
    }

    /// The file's path or URI, as it was given.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Its tensors, in the order of their bytes.
    pub fn tensors(&self) -> &[Tensor] {
        &self.0.tensors
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        self.0.tensors.iter().map(Tensor::bytes).sum()
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.place(name).map(|at| &self.0.tensors[at])
    }

    /// Where among its tensors the one of that name is.
    pub(crate) fn place(&self, name: &str) -> Option<usize> {
        self.0.places.get(name).copied()
    }

    /// The header's `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.0.metadata
    }

    /// Reads `range` of a tensor's bytes.
    ///
    /// # Errors
    /// The system's; a file that was cut short meanwhile is `UnexpectedEof`.
    pub fn read(&self, tensor: &Tensor, range: Range<u64>) -> io::Result<Bytes> {
        self.read_at(&(tensor.at.start + range.start..tensor.at.start + range.end))
    }

    fn read_at(&self, at: &Range<u64>) -> io::Result<Bytes> {
        match self.0.decoded.as_ref().filter(|_| Decoded::holds(at.start)) {
            Some(decoded) => decoded.read(self, at),
            None => self.0.file.read(at.clone()),
        }
    }

    /// Whether another machine keeps it: reading waits, and computes nothing.
    pub(crate) fn is_remote(&self) -> bool {
        self.0.location.path().is_none()
    }

    /// Reads all of a tensor.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn read_whole(&self, tensor: &Tensor) -> Result<Bytes, CheckpointError> {
        self.read(tensor, 0..tensor.bytes()).map_err(CheckpointError::io("cannot read", &self.0.path))
    }

    /// Copies a range of the file to the end of another.
    pub(crate) fn copy(&self, range: &Range<u64>, to: &mut File, stop: &Stop) -> io::Result<u64> {
        if self.0.decoded.as_ref().is_none_or(|_| !Decoded::holds(range.start)) {
            return self.0.file.copy(range, to, stop);
        }
        for start in range.clone().step_by(DECODED_BYTES as usize) {
            if stop.is_stopped() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            to.write_all(&self.read_at(&(start..range.end.min(start + DECODED_BYTES)))?)?;
        }
        Ok(range.end - range.start)
    }
}
