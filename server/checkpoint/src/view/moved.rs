//! Tensors as another format has them: of another name, several in one, rows in another order, numbers of another type.

use std::{
    collections::BTreeMap,
    fmt::Display,
    fs::File,
    io::{self, Write},
    ops::Range,
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use half::{bf16, f16};
use quarrel_engine::{Level, to_f32};
use quarrel_proto::Reason;
use safetensors::Dtype;

use super::{BEHIND, Computed};
use crate::{
    element::Element,
    error::CheckpointError,
    fate::float_word,
    source::{Source, Tensor},
    target::Stop,
};

/// What is computed at once where it is copied.
const COPIED_BYTES: u64 = 4 << 20;

/// Tensors, by where they begin.
#[derive(Debug)]
pub(crate) struct Moved(BTreeMap<u64, (Tensor, From)>);

/// What a tensor is made of.
#[derive(Debug, Clone)]
pub(crate) struct From {
    /// One, or several of one shape, one behind the other.
    pub(crate) parts: Vec<(Source, Tensor)>,
    /// Instead of parts: what it is.
    pub(crate) bytes: Option<Bytes>,
    /// Of how many heads the rows are, if those of each are in another order: `a0 b0 a1 b1 ..` of `a0 a1 .. b0 b1 ..`.
    pub(crate) heads: Option<u64>,
}

/// Files' tensors as one file, under that of the first.
pub(crate) fn moved(first: &Source, tensors: impl IntoIterator<Item = (String, Element, Vec<u64>, From)>) -> Source {
    let (mut end, mut all, mut found) = (BEHIND, Vec::new(), BTreeMap::new());
    for (name, dtype, shape, from) in tensors {
        let start = end;
        end += dtype.bytes(&shape).unwrap_or(0);
        let scheme = from.parts.first().and_then(|(_, tensor)| tensor.scheme);
        let tensor = Tensor { name, dtype, shape, at: start..end, scheme };
        all.push(tensor.clone());
        // Empty ones are read by nobody.
        if end > start {
            found.insert(start, (tensor, from));
        }
    }
    first.with(all, Some(Arc::new(Computed::Moved(Moved(found)))))
}

impl Moved {
    /// The tensor that holds a place.
    fn find(&self, at: u64) -> io::Result<(u64, &Tensor, &From)> {
        let found = self.0.range(..=at).next_back();
        let (start, (tensor, from)) = found.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok((*start, tensor, from))
    }

    pub(super) fn read(&self, at: &Range<u64>) -> io::Result<Bytes> {
        if at.is_empty() {
            return Ok(Bytes::new());
        }
        let (start, tensor, from) = self.find(at.start)?;
        from.read(tensor, &(at.start - start..at.end - start))
    }

    /// Copies a tensor, or some of it, to the end of a file.
    pub(crate) fn copy(&self, at: &Range<u64>, to: &mut File, stop: &Stop) -> io::Result<u64> {
        if at.is_empty() {
            return Ok(0);
        }
        let (start, tensor, from) = self.find(at.start)?;
        if let Some((source, part)) = from.as_it_is(tensor) {
            let first = part.at.start + (at.start - start);
            return source.copy(&(first..first + (at.end - at.start)), to, stop);
        }
        for first in at.clone().step_by(COPIED_BYTES as usize) {
            if stop.is_stopped() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            to.write_all(&self.read(&(first..at.end.min(first + COPIED_BYTES)))?)?;
        }
        Ok(at.end - at.start)
    }
}

impl From {
    /// A tensor of a file, unchanged or of another type.
    pub(crate) fn one(source: &Source, tensor: &Tensor) -> From {
        From { parts: vec![(source.clone(), tensor.clone())], heads: None, bytes: None }
    }

    /// Numbers that are of no file.
    pub(crate) fn numbers(numbers: &[f32]) -> From {
        let bytes = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        From { parts: Vec::new(), heads: None, bytes: Some(bytes) }
    }

    /// The tensor that it is, if nothing is to be computed.
    fn as_it_is(&self, tensor: &Tensor) -> Option<&(Source, Tensor)> {
        match (self.parts.as_slice(), self.heads) {
            ([part], None) if part.1.dtype == tensor.dtype => Some(part),
            _ => None,
        }
    }

    fn read(&self, tensor: &Tensor, wanted: &Range<u64>) -> io::Result<Bytes> {
        if let Some((source, part)) = self.as_it_is(tensor) {
            return source.read(part, wanted.clone());
        }
        if let Some(bytes) = &self.bytes {
            let (start, end) = (wanted.start as usize, wanted.end as usize);
            return if end <= bytes.len() { Ok(bytes.slice(start..end)) } else { Err(invalid()) };
        }
        // What is computed together: a row, or an element where there is but one row.
        let first = self.parts.first().map(|(_, part)| part).ok_or_else(invalid)?;
        let rows = if first.shape.len() > 1 || self.heads.is_some() { first.shape[0] } else { 1 };
        let all = rows * self.parts.len() as u64;
        let row = tensor.bytes().checked_div(all).filter(|row| *row > 0).ok_or_else(invalid)?;
        let (start, end) = (wanted.start / row, wanted.end.div_ceil(row));
        let mut out = BytesMut::with_capacity(((end - start) * row) as usize);
        for (number, (source, part)) in self.parts.iter().enumerate() {
            let before = number as u64 * rows;
            let (from, to) = (start.clamp(before, before + rows) - before, end.clamp(before, before + rows) - before);
            if from < to {
                let bytes = self.rows(source, part, from..to)?;
                out.extend_from_slice(&converted(&tensor.name, (part.dtype, tensor.dtype), bytes)?);
            }
        }
        let skipped = start * row;
        let range = (wanted.start - skipped) as usize..(wanted.end - skipped) as usize;
        let out = out.freeze();
        if range.end > out.len() { Err(invalid()) } else { Ok(out.slice(range)) }
    }

    /// Rows of a part, in their new order.
    fn rows(&self, source: &Source, part: &Tensor, rows: Range<u64>) -> io::Result<Bytes> {
        let all = if part.shape.len() > 1 || self.heads.is_some() { part.shape[0].max(1) } else { 1 };
        let row = part.bytes() / all;
        let Some(heads) = self.heads else {
            return source.read(part, rows.start * row..rows.end * row);
        };
        let head = all.checked_div(heads).filter(|head| head * heads == all && head % 2 == 0).ok_or_else(invalid)?;
        // All of the heads that they are of.
        let (first, last) = (rows.start / head * head, rows.end.next_multiple_of(head));
        let bytes = source.read(part, first * row..last * row)?;
        let mut out = BytesMut::with_capacity(((rows.end - rows.start) * row) as usize);
        for at in rows {
            let within = at % head;
            let from = at - within + within / 2 + within % 2 * (head / 2) - first;
            out.extend_from_slice(&bytes[(from * row) as usize..((from + 1) * row) as usize]);
        }
        Ok(out.freeze())
    }
}

/// Numbers of another type, rounded once, all of which are finite in it.
fn converted(name: &str, (from, to): (Element, Element), bytes: Bytes) -> io::Result<Bytes> {
    if from == to {
        return Ok(bytes);
    }
    let (Some(from), Some(to)) = (from.plain(), to.plain()) else { return Err(invalid()) };
    let found = if from == Dtype::F64 {
        let numbers = bytes.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes));
        match to {
            Dtype::F32 => {
                narrowed(numbers, |number| (number as f32).is_finite(), |number| (number as f32).to_le_bytes())
            }
            Dtype::F16 => narrowed(numbers, |n| f16::from_f64(n).is_finite(), |n| f16::from_f64(n).to_le_bytes()),
            Dtype::BF16 => narrowed(numbers, |n| bf16::from_f64(n).is_finite(), |n| bf16::from_f64(n).to_le_bytes()),
            _ => return Err(invalid()),
        }
    } else {
        let word = float_word(from.into()).ok_or_else(invalid)?;
        let wide = to_f32(Level::detect(), word, &bytes).ok_or_else(invalid)?;
        let numbers = wide.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        match to {
            Dtype::F32 => narrowed(numbers, f32::is_finite, f32::to_le_bytes),
            Dtype::F16 => narrowed(numbers, |n| f16::from_f32(n).is_finite(), |n| f16::from_f32(n).to_le_bytes()),
            Dtype::BF16 => narrowed(numbers, |n| bf16::from_f32(n).is_finite(), |n| bf16::from_f32(n).to_le_bytes()),
            _ => return Err(invalid()),
        }
    };
    found.map_err(|number| {
        let message =
            format!("tensor `{name}`: {number} becomes {to:?}, in which it is not finite: expected a number that is");
        io::Error::other(CheckpointError::Layer { reason: Reason::NonFinite, message })
    })
}

/// Numbers as bytes, or the first that is not to be.
fn narrowed<T: Copy + Display, const N: usize>(
    numbers: impl Iterator<Item = T> + Clone,
    is_finite: impl Fn(T) -> bool,
    bytes: impl Fn(T) -> [u8; N],
) -> Result<Bytes, String> {
    match numbers.clone().find(|number| !is_finite(*number)) {
        Some(number) => Err(number.to_string()),
        None => Ok(numbers.flat_map(bytes).collect()),
    }
}

fn invalid() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}
