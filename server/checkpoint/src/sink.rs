//! A safetensors file to write: complete under its name, or not there at all.
//!
//! What a layer becomes is known for sure only when it is quantized, but a safetensors header comes first. Where it can be foretold ([`Sink::expecting`]),
//! results are written to where they belong as they come, in whatever order, and [`Sink::seal`] puts the header before them. What came
//! otherwise, as with ladders, lies behind all that or in a file without a name, and is copied. The bytes are the same: header and tensors in the order of the
//! safetensors library, which depends on nothing but names and types. Tensors of the source are copied at the end, from file to file.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    ops::Range,
    os::unix::fs::FileExt,
    thread::JoinHandle,
};

use safetensors::tensor::{Metadata, TensorInfo};
use serde::{Serialize, Serializer, ser::SerializeMap};

use crate::{
    error::CheckpointError,
    site::checksum,
    source::{Source, Tensor},
    storage::copy,
    stored::{Entry, bytes},
    target::{Making, Stop, Target},
};

/// Of the number before a header.
const LENGTH_BYTES: u64 = 8;
/// What the disk is given at once.
const FLUSH_BYTES: u64 = 32 << 20;

/// A safetensors file in the making. Dropped before [`seal`](Sink::seal), it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Sink {
    target: Target,
    making: Making,
    expected: Expected,
    end: u64,
    entries: Vec<Filled>,
    /// Bytes of those.
    filled: u64,
    names: HashSet<String>,
    flush: Flush,
}

/// Where tensors belong, if all comes as it is expected.
#[derive(Debug, Default)]
struct Expected {
    /// Bytes of header and length.
    header: u64,
    places: HashMap<String, Range<u64>>,
}

/// Where bytes lie: those of one tensor, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Pieces {
    ranges: Vec<Range<u64>>,
    /// What is left of the place where they belong.
    place: Range<u64>,
}

#[derive(Debug)]
struct Filled {
    entry: Entry,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Spooled(Pieces),
    Copied(Source, Range<u64>),
}

impl Pieces {
    /// How many bytes they are.
    pub(crate) fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    fn push(&mut self, range: Range<u64>) {
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.ranges.push(range),
        }
    }
}

impl Sink {
    /// Begins a file of which nothing is known.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if its folder cannot be written to.
    pub(crate) fn new(target: Target) -> Result<Sink, CheckpointError> {
        let making = Making::Nameless(target.nameless()?);
        Ok(Sink::of(target, making, Expected::default(), 0))
    }

    /// Begins a file that is expected to have these tensors, and this metadata.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if its folder cannot be written to.
    pub(crate) fn expecting(
        target: Target,
        mut entries: Vec<Entry>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Sink, CheckpointError> {
        sort(&mut entries, |entry| entry);
        // One that cannot be made will not be: whoever seals the file says why.
        let Ok(header) = header(entries.iter().map(|entry| (entry, bytes(entry))), metadata) else {
            return Sink::new(target);
        };
        let header = LENGTH_BYTES + header.len() as u64;
        let mut end = header;
        let places = entries.into_iter().map(|entry| {
            let start = end;
            end += bytes(&entry);
            (entry.0, start..end)
        });
        let expected = Expected { header, places: places.collect() };
        let making = target.begin()?;
        Ok(Sink::of(target, making, expected, end))
    }

    fn of(target: Target, making: Making, expected: Expected, end: u64) -> Sink {
        let flush = Flush::default();
        Sink { target, making, expected, end, entries: Vec::new(), filled: 0, names: HashSet::new(), flush }
    }

    /// Where the file is to appear.
    pub(crate) fn target(&self) -> &Target {
        &self.target
    }

    /// Nothing yet of the tensor of that name.
    pub(crate) fn begin(&self, name: &str) -> Pieces {
        let place = self.expected.places.get(name).cloned().unwrap_or_default();
        Pieces { ranges: Vec::new(), place }
    }

    /// Writes bytes that follow on `pieces`.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn spool(&mut self, pieces: &mut Pieces, bytes: &[u8]) -> Result<(), CheckpointError> {
        let length = bytes.len() as u64;
        if length == 0 {
            return Ok(());
        }
        let start = match pieces.place.end - pieces.place.start >= length {
            true => pieces.place.start,
            false => self.end,
        };
        let range = start..start + length;
        let file = self.making.file();
        file.write_all_at(bytes, start).map_err(self.target.writing())?;
        if start == self.end {
            self.end = range.end;
        } else {
            pieces.place.start = range.end;
            self.flush.written(file, length);
        }
        pieces.push(range);
        Ok(())
    }

    /// Has another file have what was spooled for this one and is none of its tensors.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn hand_over(&mut self, pieces: &Pieces, to: &mut Sink) -> Result<Pieces, CheckpointError> {
        let range = to.end..to.end + pieces.bytes();
        let other = to.making.file();
        other.seek(SeekFrom::Start(to.end)).map_err(to.target.writing())?;
        for range in &pieces.ranges {
            copy(self.making.file(), range, other, &Stop::default()).map_err(to.target.writing())?;
        }
        to.end = range.end;
        Ok(Pieces { ranges: vec![range], place: 0..0 })
    }

    /// A tensor whose bytes have come.
    ///
    /// # Errors
    /// [`CheckpointError::Twice`].
    pub(crate) fn spooled(&mut self, entry: Entry, pieces: Pieces) -> Result<(), CheckpointError> {
        self.enter(Filled { entry, content: Content::Spooled(pieces) })
    }

    /// A tensor whose bytes are here: they are written too, since a model's scales are not small together.
    ///
    /// # Errors
    /// [`CheckpointError::Twice`], [`CheckpointError::Io`].
    pub(crate) fn here(&mut self, entry: Entry, bytes: &[u8]) -> Result<(), CheckpointError> {
        let mut pieces = self.begin(&entry.0);
        self.spool(&mut pieces, bytes)?;
        self.spooled(entry, pieces)
    }

    /// A tensor of the source, unchanged.
    ///
    /// # Errors
    /// [`CheckpointError::Twice`].
    pub(crate) fn copied(&mut self, source: &Source, tensor: &Tensor) -> Result<(), CheckpointError> {
        let content = Content::Copied(source.clone(), tensor.at.clone());
        self.enter(Filled { entry: tensor.entry(), content })
    }

    /// Bytes of the tensors so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.filled
    }

    /// The tensors so far, and their bytes.
    pub(crate) fn tensors(&self) -> BTreeMap<String, u64> {
        self.entries.iter().map(|filled| (filled.entry.0.clone(), filled.bytes())).collect()
    }

    fn enter(&mut self, filled: Filled) -> Result<(), CheckpointError> {
        let name = &filled.entry.0;
        if !self.names.insert(name.clone()) {
            return Err(CheckpointError::Twice { name: name.clone() });
        }
        self.filled += filled.bytes();
        self.entries.push(filled);
        Ok(())
    }

    /// Writes the file and gives it its name; its size in bytes, and their crc32c if it is `summed`. Nothing of that name is seen half-written. It stops, with
    /// an error and without a trace, once `stop` says so.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; [`CheckpointError::Malformed`] if a tensor's bytes do not fit its shape.
    pub(crate) fn seal(
        mut self,
        metadata: &BTreeMap<String, String>,
        summed: bool,
        stop: &Stop,
    ) -> Result<(u64, Option<u32>), CheckpointError> {
        sort(&mut self.entries, |filled| &filled.entry);
        let malformed = |detail: String| CheckpointError::Malformed { path: self.target.path(), detail };
        let sized = self.entries.iter().map(|filled| (&filled.entry, filled.bytes()));
        let header = header(sized, metadata).map_err(malformed)?;
        let writing = self.target.writing();
        let sum = |out: &mut File| summed.then(|| checksum(out, stop)).transpose();
        if !self.is_in_place(&header) {
            return self.target.write(stop, |out| {
                let bytes = put(&self.entries, &header, Some(self.making.file()), out, stop).map_err(&writing)?;
                Ok((bytes, sum(out).map_err(&writing)?))
            });
        }
        let out = self.making.file();
        let bytes = put(&self.entries, &header, None, out, stop).map_err(&writing)?;
        // What came otherwise, and was said to be nothing.
        out.set_len(bytes).map_err(&writing)?;
        // The disk writes while they are summed.
        self.flush.written(out, FLUSH_BYTES);
        let sum = sum(out).map_err(&writing)?;
        self.target.complete(self.making, stop)?;
        Ok((bytes, sum))
    }

    /// Whether all that has come lies where it belongs.
    fn is_in_place(&self, header: &[u8]) -> bool {
        let mut at = LENGTH_BYTES + header.len() as u64;
        let is_expected = at == self.expected.header;
        is_expected
            && self.entries.iter().all(|filled| {
                let start = at;
                at += filled.bytes();
                match &filled.content {
                    Content::Spooled(pieces) => pieces.ranges.iter().all(|range| *range == (start..at)),
                    Content::Copied(..) => true,
                }
            })
    }
}

/// Writes a file: header, what is copied, and, of `spool`, what is not there yet.
fn put(entries: &[Filled], header: &[u8], spool: Option<&File>, out: &mut File, stop: &Stop) -> io::Result<u64> {
    out.seek(SeekFrom::Start(0))?;
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header)?;
    let mut at = LENGTH_BYTES + header.len() as u64;
    for filled in entries {
        match (&filled.content, spool) {
            (Content::Copied(source, range), _) => {
                out.seek(SeekFrom::Start(at))?;
                source.copy(range, out, stop)?;
            }
            (Content::Spooled(pieces), Some(spool)) => {
                pieces.ranges.iter().try_for_each(|range| copy(spool, range, out, stop).map(drop))?;
            }
            (Content::Spooled(_), None) => {}
        }
        at += filled.bytes();
    }
    Ok(at)
}

/// The safetensors library's own order: whatever needs alignment first, then by name.
fn sort<T>(entries: &mut [T], entry: impl Fn(&T) -> &Entry) {
    entries.sort_by(|a, b| entry(b).1.cmp(&entry(a).1).then_with(|| entry(a).0.cmp(&entry(b).0)));
}

/// The header of tensors in their order, with the bytes of each.
///
/// # Errors
/// What is wrong with a tensor.
fn header<'a>(
    tensors: impl Iterator<Item = (&'a Entry, u64)>,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, String> {
    let mut offset = 0;
    let tensors = Vec::from_iter(tensors.map(|((name, dtype, shape), bytes)| {
        let start = offset;
        offset += bytes as usize;
        let shape = shape.iter().map(|dimension| *dimension as usize).collect();
        (name.clone(), TensorInfo { dtype: *dtype, shape, data_offsets: (start, offset) })
    }));
    // This checks every tensor's bytes against its shape.
    Metadata::new(None, tensors.clone()).map_err(|error| error.to_string())?;
    let mut header = serde_json::to_vec(&Header { metadata, tensors }).map_err(|error| error.to_string())?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok(header)
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

impl Filled {
    fn bytes(&self) -> u64 {
        match &self.content {
            Content::Spooled(pieces) => pieces.bytes(),
            Content::Copied(_, range) => range.end - range.start,
        }
    }
}

/// Has the disk write what has come while more is computed: all of it is to be there before the file gets its name.
#[derive(Debug, Default)]
struct Flush {
    pending: u64,
    thread: Option<JoinHandle<()>>,
}

impl Flush {
    fn written(&mut self, file: &File, bytes: u64) {
        self.pending += bytes;
        if self.pending < FLUSH_BYTES || self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        self.pending = 0;
        // Where it fails, the file's own end says so again.
        let Ok(file) = file.try_clone() else { return };
        let thread = std::thread::Builder::new().name("flush".to_owned());
        self.thread = thread.spawn(move || drop(file.sync_data())).ok();
    }
}
