//! A file of tensors to read from, safetensors or GGUF: its header, and ranges of its tensors.

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

use crate::{
    SCHEMES_KEY,
    becoming::is_gguf,
    columns::is_columns,
    element::Element,
    error::CheckpointError,
    gguf::{self, Metadata},
    header,
    storage::{Kind, Location, Opened},
    stored::Entry,
    target::Stop,
    view::Computed,
};

/// What is decoded at once where it is copied.
const DECODED_BYTES: u64 = 4 << 20;

/// As the safetensors library itself has it.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// More than the head of any GGUF file: tokenizers of a million tokens take a tenth of it.
const GGUF_HEAD_BYTES_MAX: u64 = 128 << 20;
/// What is read of such a file at first.
const GGUF_HEAD_BYTES: u64 = 1 << 20;

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
    /// Tensors that are computed where they are read.
    computed: Option<Arc<Computed>>,
    /// What a GGUF file says, beside its tensors.
    gguf: Option<Metadata>,
}

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// What its elements are.
    pub dtype: Element,
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
    /// [`CheckpointError::Io`]; [`CheckpointError::Malformed`] if it is no safetensors file, or is cut short; [`CheckpointError::Gguf`] likewise.
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
                detail: format!("{what}: expected one file of safetensors, or GGUF"),
            });
        }
        let file = location.open().map_err(CheckpointError::io("cannot open", &path))?;
        let read = |what: io::Error| CheckpointError::Io { what: "cannot read", path: path.clone(), error: what };
        let malformed = |detail: String| CheckpointError::Malformed { path: path.clone(), detail };
        let length = file.bytes();
        if is_gguf(location) && (length < 8 || !file.read(0..8).map_err(read)?.starts_with(gguf::MAGIC)) {
            let detail = format!("its {length} bytes do not begin with `GGUF`");
            return Err(CheckpointError::Gguf { path, detail });
        }
        if length < 8 {
            return Err(malformed(format!("it has {length} bytes: expected at least 8")));
        }
        let prefix = file.read(0..8).map_err(read)?;
        if prefix.starts_with(gguf::MAGIC) {
            return Source::of_gguf(path, location, file);
        }
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
            Some(Tensor { name, dtype: info.dtype.into(), shape, at, scheme: None })
        });
        let tensors = Vec::from_iter(tensors);
        let metadata = found.metadata().clone().unwrap_or_default().into_iter().collect();
        let places = places(&tensors);
        let (location, file) = (location.clone(), Arc::new(file));
        Ok(Source(Arc::new(Header { path, location, file, tensors, places, metadata, computed: None, gguf: None })))
    }

    fn of_gguf(path: PathBuf, location: &Location, file: Opened) -> Result<Source, CheckpointError> {
        let malformed = |detail: String| CheckpointError::Gguf { path: path.clone(), detail };
        let length = file.bytes();
        // How long its head is, only the head says.
        let mut size = GGUF_HEAD_BYTES.min(length);
        let found = loop {
            let bytes = file.read(0..size).map_err(CheckpointError::io("cannot read", &path))?;
            match gguf::read(&bytes) {
                Ok(found) => break found,
                Err(gguf::Wrong::Bad(detail)) => return Err(malformed(detail)),
                Err(gguf::Wrong::Short) if size == length => {
                    return Err(malformed(format!("it ends, at {length} bytes, within its head")));
                }
                Err(gguf::Wrong::Short) if size == GGUF_HEAD_BYTES_MAX => {
                    return Err(malformed(format!("its head has more than {size} bytes")));
                }
                Err(gguf::Wrong::Short) => size = (4 * size).min(length).min(GGUF_HEAD_BYTES_MAX),
            }
        };
        if found.end > length {
            return Err(malformed(format!("it has {length} bytes: its head says {}", found.end)));
        }
        let (location, file) = (location.clone(), Arc::new(file));
        let gguf::Found { metadata: gguf, tensors, .. } = found;
        let (metadata, places) = (gguf.shown().collect(), places(&tensors));
        let gguf = Some(gguf);
        Ok(Source(Arc::new(Header { path, location, file, tensors, places, metadata, computed: None, gguf })))
    }

    /// The same file with other tensors: within its own, or decoded.
    pub(crate) fn with(&self, tensors: Vec<Tensor>, computed: Option<Arc<Computed>>) -> Source {
        let places = places(&tensors);
        let Header { path, location, file, metadata, computed: before, gguf, .. } = &*self.0;
        let (path, location, mut metadata) = (path.clone(), location.clone(), metadata.clone());
        if computed.is_some() {
            metadata.remove(SCHEMES_KEY);
        }
        let computed = computed.or_else(|| before.clone());
        let (file, gguf) = (Arc::clone(file), gguf.clone());
        Source(Arc::new(Header { path, location, file, tensors, places, metadata, computed, gguf }))
    }

    /// The same tensors, as safetensors have them: with nothing said beside.
    pub(crate) fn as_safetensors(&self) -> Source {
        let Header { path, location, file, tensors, computed, .. } = &*self.0;
        let (path, location, file) = (path.clone(), location.clone(), Arc::clone(file));
        let (tensors, computed, metadata) = (tensors.clone(), computed.clone(), BTreeMap::new());
        let places = places(&tensors);
        Source(Arc::new(Header { path, location, file, tensors, places, metadata, computed, gguf: None }))
    }

    /// Whether tensors of it are computed.
    pub(crate) fn is_computed(&self) -> bool {
        self.0.computed.is_some()
    }

    /// What it says beside its tensors, if it is GGUF.
    pub(crate) fn gguf(&self) -> Option<&Metadata> {
        self.0.gguf.as_ref()
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

    /// The header's `__metadata__`; of GGUF its keys and values, the long ones shortened.
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

    pub(crate) fn read_at(&self, at: &Range<u64>) -> io::Result<Bytes> {
        match self.0.computed.as_ref().filter(|_| Computed::holds(at.start)) {
            Some(computed) => computed.read(at),
            None => self.0.file.read(at.clone()),
        }
    }

    /// Whether another machine keeps it: reading waits, and computes nothing.
    pub(crate) fn is_remote(&self) -> bool {
        self.0.location.path().is_none()
    }

    /// Reads `range` of the bytes of a layer's tensor.
    ///
    /// # Errors
    /// [`CheckpointError::Read`], and of any kind where the tensor is computed of others.
    pub fn read_of(&self, layer: &str, tensor: &Tensor, range: Range<u64>) -> Result<Bytes, CheckpointError> {
        let unread = |error| CheckpointError::Read { layer: layer.to_owned(), path: self.0.path.clone(), error };
        self.read(tensor, range).map_err(|error| error.downcast().unwrap_or_else(unread))
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
        match self.0.computed.as_deref().filter(|_| Computed::holds(range.start)) {
            None => return self.0.file.copy(range, to, stop),
            Some(Computed::Moved(moved)) => return moved.copy(range, to, stop),
            Some(Computed::Decoded(_) | Computed::Whole(_)) => {}
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

/// Where among tensors each name is.
fn places(tensors: &[Tensor]) -> HashMap<String, usize> {
    tensors.iter().enumerate().map(|(at, tensor)| (tensor.name.clone(), at)).collect()
}
