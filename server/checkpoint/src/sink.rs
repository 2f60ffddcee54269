//! A safetensors file to write: complete under its name, or not there at all.
//!
//! What a layer becomes, and how large, is known only when it is quantized, but a safetensors header comes first. So
//! results are spooled to a file without a name as they come, in whatever order. [`Sink::seal`] then writes header and
//! tensors in the order of the safetensors library, which depends on nothing but names and types, and renames the result.
//! Tensors of the source are copied then, from file to file.

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    ops::Range,
    os::unix::fs::FileExt,
};

use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde::{Serialize, Serializer, ser::SerializeMap};

use crate::{
    error::CheckpointError,
    site::checksum,
    source::{Source, Tensor},
    storage::copy,
    target::{Stop, Target},
};

/// A safetensors file in the making. Dropped before [`seal`](Sink::seal), it leaves nothing behind.
#[derive(Debug)]
pub struct Sink {
    target: Target,
    spool: File,
    end: u64,
    entries: Vec<Entry>,
    names: HashSet<String>,
}

/// Where spooled bytes lie: those of one tensor, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pieces(Vec<Range<u64>>);

#[derive(Debug)]
struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Spooled(Pieces),
    Copied(Source, Range<u64>),
}

impl Pieces {
    /// How many bytes they are.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|piece| piece.end - piece.start).sum()
    }
}

impl Sink {
    /// Begins a file.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if its folder cannot be written to.
    pub fn new(target: Target) -> Result<Sink, CheckpointError> {
        let spool = target.nameless()?;
        Ok(Sink { target, spool, end: 0, entries: Vec::new(), names: HashSet::new() })
    }

    /// Spools bytes that follow on `pieces`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn spool(&mut self, pieces: &mut Pieces, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.spool.write_all_at(bytes, self.end).map_err(self.target.writing())?;
        let range = self.end..self.end + bytes.len() as u64;
        self.end = range.end;
        match pieces.0.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => pieces.0.push(range),
        }
        Ok(())
    }

    /// Has another file have what was spooled for this one and is none of its tensors.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn hand_over(&self, pieces: &Pieces, to: &mut Sink) -> Result<Pieces, CheckpointError> {
        to.spool.seek(SeekFrom::Start(to.end)).map_err(to.target.writing())?;
        let range = to.end..to.end + pieces.bytes();
        for piece in &pieces.0 {
            copy(&self.spool, piece, &mut to.spool, &Stop::default()).map_err(to.target.writing())?;
        }
        to.end = range.end;
        Ok(Pieces(vec![range]))
    }

    /// A tensor whose bytes are spooled.
    ///
    /// # Errors
    /// [`CheckpointError::Twice`].
    pub fn spooled(
        &mut self,
        (name, dtype, shape): (String, Dtype, Vec<u64>),
        pieces: Pieces,
    ) -> Result<(), CheckpointError> {
        self.enter(Entry { name, dtype, shape, content: Content::Spooled(pieces) })
    }

    /// A tensor whose bytes are here: they are spooled too, since a model's scales are not small together.
    ///
    /// # Errors
    /// [`CheckpointError::Twice`], [`CheckpointError::Io`].
    pub fn here(&mut self, name: String, dtype: Dtype, shape: Vec<u64>, bytes: &[u8]) -> Result<(), CheckpointError> {
        let mut pieces = Pieces::default();
        self.spool(&mut pieces, bytes)?;
        self.spooled((name, dtype, shape), pieces)
    }

    /// A tensor of the source, unchanged.
    ///
    /// # Errors
    /// [`CheckpointError::Twice`].
    pub fn copied(&mut self, source: &Source, tensor: &Tensor) -> Result<(), CheckpointError> {
        let content = Content::Copied(source.clone(), tensor.at.clone());
        self.enter(Entry { name: tensor.name.clone(), dtype: tensor.dtype, shape: tensor.shape.clone(), content })
    }

    /// Bytes of the tensors so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.content.bytes()).sum()
    }

    /// The tensors so far, and their bytes.
    pub(crate) fn tensors(&self) -> BTreeMap<String, u64> {
        self.entries.iter().map(|entry| (entry.name.clone(), entry.content.bytes())).collect()
    }

    fn enter(&mut self, entry: Entry) -> Result<(), CheckpointError> {
        if !self.names.insert(entry.name.clone()) {
            return Err(CheckpointError::Twice { name: entry.name });
        }
        self.entries.push(entry);
        Ok(())
    }

    /// Writes the file and gives it its name; its size in bytes, and their crc32c if it is `summed`. Nothing of that name is seen half-written. It stops, with
    /// an error and without a trace, once `stop` says so.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; [`CheckpointError::Malformed`] if a tensor's bytes do not fit its shape.
    pub fn seal(
        mut self,
        metadata: &BTreeMap<String, String>,
        summed: bool,
        stop: &Stop,
    ) -> Result<(u64, Option<u32>), CheckpointError> {
        // The safetensors library's own order: whatever needs alignment first, then by name.
        self.entries.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
        let header = self.header(metadata)?;
        self.target.write(stop, |out| {
            let bytes = self.put(&header, out, stop).map_err(self.target.writing())?;
            let sum = summed.then(|| checksum(out, stop)).transpose().map_err(self.target.writing())?;
            Ok((bytes, sum))
        })
    }

    fn put(&self, header: &[u8], out: &mut File, stop: &Stop) -> io::Result<u64> {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header)?;
        let mut length = 8 + header.len() as u64;
        for entry in &self.entries {
            length += match &entry.content {
                Content::Spooled(pieces) => pieces.0.iter().map(|piece| copy(&self.spool, piece, out, stop)).sum(),
                Content::Copied(source, range) => source.copy(range, out, stop),
            }?;
        }
        Ok(length)
    }

    fn header(&self, metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, CheckpointError> {
        let malformed = |detail: String| CheckpointError::Malformed { path: self.target.path(), detail };
        let mut offset = 0;
        let tensors = Vec::from_iter(self.entries.iter().map(|entry| {
            let start = offset;
            offset += entry.content.bytes() as usize;
            let shape = entry.shape.iter().map(|dimension| *dimension as usize).collect();
            (entry.name.clone(), TensorInfo { dtype: entry.dtype, shape, data_offsets: (start, offset) })
        }));
        // This checks every tensor's bytes against its shape.
        Metadata::new(None, tensors.clone()).map_err(|error| malformed(error.to_string()))?;
        let mut header =
            serde_json::to_vec(&Header { metadata, tensors }).map_err(|error| malformed(error.to_string()))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        Ok(header)
    }
}

/// A header whose bytes depend on nothing but what is in it: the library's own writes metadata in the order of a hash map.
struct Header<'a> {
    metadata: &'a BTreeMap<String, String>,
    tensors: Vec<(String, TensorInfo)>,
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry("__metadata__", self.metadata)?;
        }
        for (name, info) in &self.tensors {
            map.serialize_entry(name, info)?;
        }
        map.end()
    }
}

impl Content {
    fn bytes(&self) -> u64 {
        match self {
            Content::Spooled(pieces) => pieces.bytes(),
            Content::Copied(_, range) => range.end - range.start,
        }
    }
}
