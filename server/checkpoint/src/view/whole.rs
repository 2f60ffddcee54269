//! Tensors that are computed whole, when some of them is read.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    io,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;

use super::{BEHIND, Computed};
use crate::{
    error::CheckpointError,
    source::{Source, Tensor},
};

/// So many are remembered while they are read, which is one for each stream to a server. Of more that are read by turns, each is computed again.
const AT_ONCE: usize = 64;

/// What is computed as fast as it is found.
const SMALL_BYTES: u64 = 4096;

/// What a tensor is computed of.
pub(crate) trait Compute: Debug + Send + Sync {
    /// All of its bytes.
    fn bytes(&self, source: &Source) -> io::Result<Vec<u8>>;
}

/// Tensors of a file that are computed whole, by where they begin.
#[derive(Debug)]
pub(crate) struct Whole {
    /// The file that they are computed of.
    source: Source,
    tensors: BTreeMap<u64, (Arc<dyn Compute>, u64)>,
    /// Those that are being read, and those that were read to their end last.
    recent: Mutex<Vec<Arc<Recent>>>,
}

/// A tensor that somebody reads.
#[derive(Debug)]
struct Recent {
    /// Where it begins.
    start: u64,
    /// Computed by whoever is first.
    bytes: Mutex<Option<Bytes>>,
    /// Whether its last byte was read.
    is_done: AtomicBool,
}

/// A file with other tensors: some that it has, and some that are computed of them.
pub(crate) fn whole(source: &Source, kept: Vec<Tensor>, computed: Vec<(Tensor, Arc<dyn Compute>)>) -> Source {
    let (mut tensors, mut found, mut end) = (kept, BTreeMap::new(), BEHIND);
    for (mut tensor, compute) in computed {
        let bytes = tensor.dtype.bytes(&tensor.shape).unwrap_or(0);
        tensor.at = end..end + bytes;
        tensors.push(tensor);
        // Empty ones are read by nobody.
        if bytes > 0 {
            found.insert(end, (compute, bytes));
        }
        end += bytes;
    }
    let whole = Whole { source: source.clone(), tensors: found, recent: Mutex::default() };
    source.with(tensors, Some(Arc::new(Computed::Whole(whole))))
}

impl Whole {
    /// Reads some of a tensor.
    pub(super) fn read(&self, at: &Range<u64>) -> io::Result<Bytes> {
        if at.is_empty() {
            return Ok(Bytes::new());
        }
        let found = self.tensors.range(..=at.start).next_back();
        let (start, (compute, bytes)) = found.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let whole = if *bytes > SMALL_BYTES {
            let recent = self.recent(*start);
            let mut held = recent.bytes.lock().unwrap_or_else(PoisonError::into_inner);
            let whole = match held.as_ref() {
                Some(whole) => whole.clone(),
                None => held.insert(self.computed(compute.as_ref())?).clone(),
            };
            recent.is_done.fetch_or(at.end == start + bytes, Ordering::Relaxed);
            whole
        } else {
            self.computed(compute.as_ref())?
        };
        let range = (at.start - start) as usize..(at.end - start) as usize;
        if range.end > whole.len() { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(whole.slice(range)) }
    }

    /// Whoever reads it names a fault by where it comes from: this file.
    fn computed(&self, compute: &dyn Compute) -> io::Result<Bytes> {
        let computed = compute.bytes(&self.source).map(Bytes::from);
        computed.map_err(|error| io::Error::other(CheckpointError::io("cannot read", self.source.path())(error)))
    }

    /// The place of a tensor among the recent ones. Where it has none, those go that were read to their end, and where too many are being read, the first.
    fn recent(&self, start: u64) -> Arc<Recent> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = recent.iter().find(|recent| recent.start == start) {
            return Arc::clone(known);
        }
        recent.retain(|recent| !recent.is_done.load(Ordering::Relaxed));
        if recent.len() == AT_ONCE {
            recent.remove(0);
        }
        let new = Arc::new(Recent { start, bytes: Mutex::default(), is_done: AtomicBool::new(false) });
        recent.push(Arc::clone(&new));
        new
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]

    use std::sync::atomic::AtomicUsize;

    use safetensors::Dtype;

    use super::*;
    use crate::storage::Location;

    /// Bytes of one value, and how often they were computed.
    #[derive(Debug, Clone)]
    struct Counted(u8, Arc<AtomicUsize>);

    impl Compute for Counted {
        fn bytes(&self, _: &Source) -> io::Result<Vec<u8>> {
            self.1.fetch_add(1, Ordering::Relaxed);
            Ok(vec![self.0; 8192])
        }
    }

    /// What cannot be read.
    #[derive(Debug)]
    struct Broken;

    impl Compute for Broken {
        fn bytes(&self, _: &Source) -> io::Result<Vec<u8>> {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    #[test]
    fn a_fault_is_named_by_the_file_that_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let source = source(folder.path());
        let whole = whole(&source, Vec::new(), vec![(tensor("x"), Arc::new(Broken))]);
        for _ in 0..2 {
            let error =
                whole.read(whole.tensor("x").unwrap(), 0..1).unwrap_err().downcast::<CheckpointError>().unwrap();
            assert!(
                matches!(&error, CheckpointError::Io { path, error, .. }
                if path == source.path() && error.kind() == io::ErrorKind::UnexpectedEof),
                "{error}"
            );
        }
    }

    fn source(folder: &std::path::Path) -> Source {
        let path = folder.join("empty.safetensors");
        std::fs::write(&path, [&2u64.to_le_bytes()[..], b"{}"].concat()).unwrap();
        Source::open(&Location::disk(&path)).unwrap()
    }

    fn tensor(name: &str) -> Tensor {
        Tensor { name: name.to_owned(), dtype: Dtype::U8.into(), shape: vec![8192], at: 0..0, scheme: None }
    }

    #[test]
    fn tensors_that_are_read_by_turns_are_computed_once() {
        let folder = tempfile::tempdir().unwrap();
        let source = source(folder.path());
        let counted = Vec::from_iter((0..=AT_ONCE as u8).map(|value| Counted(value, Arc::default())));
        let of = |counted: &Counted| (tensor(&counted.0.to_string()), Arc::new(counted.clone()) as Arc<dyn Compute>);
        let whole = whole(&source, Vec::new(), counted.iter().map(of).collect());
        for piece in 0..4 {
            for Counted(value, _) in &counted[..AT_ONCE] {
                let tensor = whole.tensor(&value.to_string()).unwrap();
                assert_eq!(whole.read(tensor, 2048 * piece..2048 * (piece + 1)).unwrap(), vec![*value; 2048]);
            }
        }
        let times = Vec::from_iter(counted[..AT_ONCE].iter().map(|one| one.1.load(Ordering::Relaxed)));
        assert_eq!(times, [1; AT_ONCE]);
        // All of them were read to their end, and go when another is read.
        for name in [AT_ONCE.to_string(), "0".to_owned()] {
            whole.read(whole.tensor(&name).unwrap(), 0..1).unwrap();
        }
        assert_eq!(counted[0].1.load(Ordering::Relaxed), 2);
    }
}
