//! A file of tensors to write, safetensors or GGUF: complete under its name, or not there at all.
//!
//! What a layer becomes is known for sure only when it is quantized, but a header comes first. Where it can be foretold ([`Sink::expecting`]),
//! results are written to where they belong as they come, in whatever order, and [`Sink::seal`] puts the header before them. What came
//! otherwise, as with ladders, lies behind all that or in a file without a name, and is copied. The bytes are the same: header and tensors in the order of the
//! format's own library (`form`), which depends on nothing but names and types. Tensors of the source are copied at the end, from file to file.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    io::{self, Seek, SeekFrom, Write},
    ops::Range,
    os::unix::fs::FileExt,
    thread::JoinHandle,
};

use crate::{
    error::CheckpointError,
    form::Form,
    site::checksum,
    source::{Source, Tensor},
    storage::copy,
    stored::{Entry, bytes},
    target::{Making, Stop, Target},
};

/// What the disk is given at once.
const FLUSH_BYTES: u64 = 32 << 20;

/// A file in the making. Dropped before [`seal`](Sink::seal), it leaves nothing behind.
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
    /// Bytes of the header.
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

    /// Begins a file of that form that is expected to have these tensors.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] if its folder cannot be written to.
    pub(crate) fn expecting(target: Target, mut entries: Vec<Entry>, form: &Form) -> Result<Sink, CheckpointError> {
        form.sort(&mut entries, |entry| entry);
        // One that cannot be made will not be: whoever seals the file says why.
        let sized = Vec::from_iter(entries.iter().map(|entry| (entry, bytes(entry))));
        let Ok(header) = form.header(&sized) else {
            return Sink::new(target);
        };
        let header = header.len() as u64;
        let mut end = header;
        let places = sized.into_iter().map(|(entry, bytes)| {
            let start = form.aligned(end);
            end = start + bytes;
            (entry.0.clone(), start..end)
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
        form: &Form,
        summed: bool,
        stop: &Stop,
    ) -> Result<(u64, Option<u32>), CheckpointError> {
        form.sort(&mut self.entries, |filled| &filled.entry);
        let malformed = |detail: String| CheckpointError::Malformed { path: self.target.path(), detail };
        let sized = Vec::from_iter(self.entries.iter().map(|filled| (&filled.entry, filled.bytes())));
        let header = form.header(&sized).map_err(malformed)?;
        let writing = self.target.writing();
        let sum = |out: &mut File| summed.then(|| checksum(out, stop)).transpose();
        let (entries, places) = (&self.entries, self.places(form, header.len() as u64));
        if !self.is_in_place(&header, &places) {
            return self.target.write(stop, |out| {
                let bytes = put((entries, &places), &header, Some(self.making.file()), out, stop).map_err(&writing)?;
                Ok((bytes, sum(out).map_err(&writing)?))
            });
        }
        let out = self.making.file();
        let bytes = put((entries, &places), &header, None, out, stop).map_err(&writing)?;
        // The disk writes while they are summed.
        self.flush.written(out, FLUSH_BYTES);
        let sum = sum(out).map_err(&writing)?;
        self.target.complete(self.making, stop)?;
        Ok((bytes, sum))
    }

    /// Where tensors are to be, and where the file ends.
    fn places(&self, form: &Form, header: u64) -> (Vec<u64>, u64) {
        let mut at = header;
        let starts = self.entries.iter().map(|filled| {
            let start = form.aligned(at);
            at = start + filled.bytes();
            start
        });
        (starts.collect(), form.aligned(at))
    }

    /// Whether all that has come lies where it belongs.
    fn is_in_place(&self, header: &[u8], (starts, _): &(Vec<u64>, u64)) -> bool {
        header.len() as u64 == self.expected.header
            && self.entries.iter().zip(starts).all(|(filled, start)| match &filled.content {
                Content::Spooled(pieces) => {
                    pieces.ranges.iter().all(|range| *range == (*start..start + filled.bytes()))
                }
                Content::Copied(..) => true,
            })
    }
}

/// Writes a file: header, what is copied, and, of `spool`, what is not there yet.
fn put(
    (entries, (starts, end)): (&[Filled], &(Vec<u64>, u64)),
    header: &[u8],
    spool: Option<&File>,
    out: &mut File,
    stop: &Stop,
) -> io::Result<u64> {
    out.seek(SeekFrom::Start(0))?;
    out.write_all(header)?;
    for (filled, start) in entries.iter().zip(starts) {
        out.seek(SeekFrom::Start(*start))?;
        match (&filled.content, spool) {
            (Content::Copied(source, range), _) => drop(source.copy(range, out, stop)?),
            (Content::Spooled(pieces), Some(spool)) => {
                pieces.ranges.iter().try_for_each(|range| copy(spool, range, out, stop).map(drop))?;
            }
            (Content::Spooled(_), None) => {}
        }
    }
    // Up to the last tensor's end, and not what came otherwise, and was said to be nothing.
    out.set_len(*end)?;
    Ok(*end)
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
