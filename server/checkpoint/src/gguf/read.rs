//! The head of a GGUF file: bytes of whoever wrote it.

use std::collections::HashSet;

use bytes::Bytes;

use super::{
    head::ALIGNMENT,
    metadata::{ARRAY, Metadata, STRING, Value, width},
    types::Type,
};
use crate::source::Tensor;

/// What a file begins with.
pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
/// As llama.cpp has it, with the zero at the end.
pub(super) const NAME_BYTES_MAX: usize = 63;
/// As llama.cpp has it.
pub(super) const DIMENSIONS_MAX: u32 = 4;
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";
/// As the format has it.
const KEY_BYTES_MAX: u64 = 65_535;
/// More than any file has: what is remembered of each takes a kilobyte or two.
const KEYS_MAX: u64 = 1 << 16;
const TENSORS_MAX: u64 = 1 << 16;
/// The file would have more elements than any model.
const ELEMENTS_MAX: u64 = 1 << 48;

/// What a head says.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) metadata: Metadata,
    /// In the order of their bytes, at places in the file.
    pub(crate) tensors: Vec<Tensor>,
    /// Where the last of them ends.
    pub(crate) end: u64,
}

/// Why a head cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// It goes on behind what is here.
    Short,
    /// What is wrong with it, as a sentence about the file.
    Bad(String),
}

/// Reads a head of the first bytes of a file: if they are too few, more are asked for.
pub(crate) fn read(bytes: &Bytes) -> Result<Found, Wrong> {
    let mut at = Cursor { bytes, at: MAGIC.len() };
    let version = at.u32()?;
    if !(2..=3).contains(&version) {
        let swapped = version & 0xffff == 0;
        let what = if swapped { "it is of a machine of the other byte order" } else { "that is not read" };
        return Err(Wrong::Bad(format!("its version is {version}: {what}, expected 2 or 3")));
    }
    let (tensors, keys) = (at.u64()?, at.u64()?);
    for (what, count, most) in [("tensors", tensors, TENSORS_MAX), ("keys", keys, KEYS_MAX)] {
        if count > most {
            return Err(Wrong::Bad(format!("it claims {count} {what}: expected at most {most}")));
        }
    }
    let metadata = metadata(&mut at, keys)?;
    let alignment = match metadata.iter().find(|(key, _)| key == ALIGNMENT_KEY) {
        None => ALIGNMENT,
        Some(_) => metadata
            .number(ALIGNMENT_KEY)
            .filter(|number| number.is_power_of_two() && *number <= 1 << 20)
            .ok_or_else(|| Wrong::Bad(format!("its `{ALIGNMENT_KEY}` is no power of two up to 2^20")))?,
    };
    // As many as there are bytes for, and no more than that is remembered.
    let mut found: Vec<(Tensor, u64)> = Vec::new();
    let mut names = HashSet::new();
    let mut end = 0u64;
    for _ in 0..tensors {
        let (tensor, offset, bytes) = tensor(&mut at)?;
        let name = quarrel_engine::shorten(&tensor.name, 100);
        if !names.insert(tensor.name.clone()) {
            return Err(Wrong::Bad(format!("tensor `{name}` is there twice")));
        }
        if offset != end {
            return Err(Wrong::Bad(format!(
                "tensor `{name}` begins at {offset}: expected {end}, behind the one before"
            )));
        }
        found.push((tensor, bytes));
        end = offset
            .checked_add(bytes)
            .and_then(|end| end.checked_next_multiple_of(alignment))
            .ok_or_else(|| Wrong::Bad(format!("tensor `{name}` ends beyond what a file can have")))?;
    }
    let data = (at.at as u64).next_multiple_of(alignment);
    let mut end = data;
    let tensors = found.into_iter().map(|(mut tensor, bytes)| {
        let start = end.next_multiple_of(alignment);
        end = start.saturating_add(bytes);
        tensor.at = start..end;
        tensor
    });
    Ok(Found { metadata, tensors: tensors.collect(), end })
}

fn metadata(at: &mut Cursor<'_>, keys: u64) -> Result<Metadata, Wrong> {
    let (mut metadata, mut seen) = (Metadata::default(), HashSet::new());
    for _ in 0..keys {
        let key = at.text("a key", KEY_BYTES_MAX)?;
        let shown = quarrel_engine::shorten(&key, 100);
        let kind = at.u32()?;
        let start = at.at;
        match (kind, width(kind)) {
            (_, Some(width)) => at.skip(width as u64)?,
            (STRING, _) => at.skip_text()?,
            (ARRAY, _) => {
                let (kind, count) = (at.u32()?, at.u64()?);
                match (kind, width(kind)) {
                    (_, Some(width)) => at.skip(count.checked_mul(width as u64).ok_or(Wrong::Short)?)?,
                    (STRING, _) => (0..count).try_for_each(|_| at.skip_text())?,
                    _ => return Err(Wrong::Bad(format!("key `{shown}` is of values of kind {kind}, which is none"))),
                }
            }
            _ => return Err(Wrong::Bad(format!("key `{shown}` has a value of kind {kind}, which is none"))),
        }
        if key.is_empty() || !seen.insert(key.clone()) {
            return Err(Wrong::Bad(format!("key `{shown}` is there twice, or has no name")));
        }
        metadata.push(key, Value { kind, bytes: at.bytes.slice(start..at.at) });
    }
    Ok(metadata)
}

/// The next tensor, where it begins behind the head, and its bytes.
fn tensor(at: &mut Cursor<'_>) -> Result<(Tensor, u64, u64), Wrong> {
    let name = at.text("the name of a tensor", KEY_BYTES_MAX)?;
    if name.len() > NAME_BYTES_MAX {
        let bytes = name.len();
        return Err(Wrong::Bad(format!(
            "tensor `{}` has a name of {bytes} bytes: at most {NAME_BYTES_MAX}",
            quarrel_engine::shorten(&name, 100)
        )));
    }
    let rank = at.u32()?;
    if rank > DIMENSIONS_MAX {
        return Err(Wrong::Bad(format!("tensor `{name}` has {rank} dimensions: at most {DIMENSIONS_MAX}")));
    }
    let mut shape = (0..rank).map(|_| at.u64()).collect::<Result<Vec<_>, _>>()?;
    // The first of a file is the one whose elements lie side by side.
    shape.reverse();
    let id = at.u32()?;
    let Some(of) = Type::of_id(id) else {
        return Err(Wrong::Bad(format!("tensor `{name}` is of type {id}, which this version does not know")));
    };
    let elements = shape.iter().try_fold(1u64, |all, dimension| all.checked_mul((*dimension).max(1)));
    let dtype = of.element();
    let bytes = dtype.bytes(&shape).filter(|_| elements.is_some_and(|elements| elements < ELEMENTS_MAX));
    let bytes = bytes.ok_or_else(|| Wrong::Bad(format!("tensor `{name}` of {dtype} cannot have shape {shape:?}")))?;
    Ok((Tensor { name, dtype, shape, at: 0..0, scheme: None }, at.u64()?, bytes))
}

/// Reads on in what there is of the file.
struct Cursor<'a> {
    bytes: &'a Bytes,
    at: usize,
}

impl Cursor<'_> {
    fn take(&mut self, count: u64) -> Result<&[u8], Wrong> {
        let end = usize::try_from(count).ok().and_then(|count| self.at.checked_add(count)).ok_or(Wrong::Short)?;
        let taken = self.bytes.get(self.at..end).ok_or(Wrong::Short)?;
        self.at = end;
        Ok(taken)
    }

    fn skip(&mut self, count: u64) -> Result<(), Wrong> {
        self.take(count).map(drop)
    }

    fn u32(&mut self) -> Result<u32, Wrong> {
        self.take(4)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes)).ok_or(Wrong::Short)
    }

    fn u64(&mut self) -> Result<u64, Wrong> {
        self.take(8)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)).ok_or(Wrong::Short)
    }

    fn skip_text(&mut self) -> Result<(), Wrong> {
        let length = self.u64()?;
        self.skip(length)
    }

    fn text(&mut self, what: &str, most: u64) -> Result<String, Wrong> {
        let length = self.u64()?;
        if length > most {
            return Err(Wrong::Bad(format!("{what} has {length} bytes: expected at most {most}")));
        }
        let bytes = self.take(length)?;
        let text = std::str::from_utf8(bytes).map_err(|_| Wrong::Bad(format!("{what} is no UTF-8")))?;
        Ok(text.to_owned())
    }
}
