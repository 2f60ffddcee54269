//! Tensors that are computed whole, when some of them is read.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    io,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;

use super::{BEHIND, Computed};
use crate::source::{Source, Tensor};

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
    /// The one that was read last.
    last: Mutex<Option<(u64, Bytes)>>,
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
    let whole = Whole { source: source.clone(), tensors: found, last: Mutex::default() };
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
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let whole = match last.as_ref().filter(|(known, _)| known == start) {
            Some((_, whole)) => whole.clone(),
            None => {
                let whole = Bytes::from(compute.bytes(&self.source)?);
                if *bytes > SMALL_BYTES {
                    *last = Some((*start, whole.clone()));
                }
                whole
            }
        };
        let range = (at.start - start) as usize..(at.end - start) as usize;
        if range.end > whole.len() { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(whole.slice(range)) }
    }
}
