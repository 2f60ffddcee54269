//! Layers of GPTQ that have no place in the layout of compressed-tensors, as the numbers that they stand for: with columns of groups in another order, a last
//! group that is short, codes of 3 bits, or zero points of 8 bits.

use std::io;

use half::{bf16, f16};
use quarrel_engine::Scheme;
use safetensors::Dtype;

use super::{Layer, transposed};
use crate::{
    error::CheckpointError,
    source::{Source, Tensor},
};

/// Codes of a row, as a stream of bits from the lowest: 3 bits may lie over two words.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bits<'a> {
    pub(super) words: &'a [[u8; 4]],
    pub(super) bits: u32,
}

impl Bits<'_> {
    /// The code at that place.
    pub(super) fn at(&self, place: usize) -> u32 {
        let bit = place as u64 * u64::from(self.bits);
        let (word, shift) = ((bit / 32) as usize, bit % 32);
        let of = |word: usize| self.words.get(word).map_or(0, |bytes| u64::from(u32::from_le_bytes(*bytes)));
        let both = of(word) | of(word + 1) << 32;
        (both >> shift) as u32 & ((1u32 << self.bits) - 1)
    }
}

/// Numbers of a type, each rounded once.
fn stored(dtype: Dtype, numbers: &[f32], out: &mut Vec<u8>) {
    match dtype {
        Dtype::F16 => out.extend(numbers.iter().flat_map(|number| f16::from_f32(*number).to_le_bytes())),
        Dtype::BF16 => out.extend(numbers.iter().flat_map(|number| bf16::from_f32(*number).to_le_bytes())),
        _ => out.extend(numbers.iter().flat_map(|number| number.to_le_bytes())),
    }
}

/// Numbers of F16, BF16 or F32.
fn numbers(dtype: Option<Dtype>, bytes: &[u8]) -> Vec<f32> {
    let pairs = || bytes.as_chunks::<2>().0.iter();
    match dtype {
        Some(Dtype::F16) => pairs().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
        Some(Dtype::BF16) => pairs().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
    }
}

impl Layer {
    /// Its scales, group by group: what they are of may not be read before.
    pub(super) fn finite_scales(&self, bytes: &[u8]) -> io::Result<Vec<f32>> {
        let scales = numbers(self.scales.dtype.plain(), bytes);
        match scales.iter().position(|scale| !scale.is_finite()) {
            None => Ok(scales),
            Some(at) => {
                let (group, row) = (at as u64 / self.rows, at as u64 % self.rows);
                let detail =
                    format!("the scale of channel {row} and group {group} is {}: expected a finite number", scales[at]);
                let module = self.scales.name.strip_suffix(".scales").unwrap_or(&self.scales.name);
                Err(io::Error::other(CheckpointError::Module { module: module.to_owned(), detail }))
            }
        }
    }

    /// Of which scheme its codes are.
    pub(super) fn scheme(&self) -> Result<Scheme, String> {
        let (bits, size) = (self.layout.bits, self.group);
        let asymmetric = if self.zeros.is_some() { "-asym" } else { "" };
        format!("int{bits}{asymmetric}/g{size}").parse().map_err(|error| format!("{error}"))
    }

    /// The numbers that it stands for: (code - zero point) * scale, in f32, and rounded once.
    pub(super) fn decoded(&self, source: &Source) -> io::Result<Vec<u8>> {
        let bits = u32::from(self.layout.bits);
        let (rows, columns, groups) = (self.rows as usize, self.columns as usize, self.groups as usize);
        let read = |tensor: &Tensor| source.read(tensor, 0..tensor.bytes());
        let codes = transposed(&read(&self.codes)?, columns * bits as usize / 32, 4);
        let scales = self.finite_scales(&read(&self.scales)?)?;
        let points = match &self.zeros {
            Some(zeros) => self.points(&read(zeros)?).map_err(io::Error::other)?,
            None => vec![0; rows * groups],
        };
        let order = match &self.order {
            Some(order) => {
                read(order)?.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes) as usize).collect()
            }
            None => Vec::from_iter((0..self.columns).map(|column| (column / self.group) as usize)),
        };
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let half = 1 << (bits - 1);
        let mut out = Vec::new();
        let mut numbers = Vec::with_capacity(columns);
        for (row, words) in codes.as_chunks::<4>().0.chunks_exact(columns * bits as usize / 32).enumerate() {
            let codes = Bits { words, bits };
            numbers.clear();
            for (column, group) in order.iter().enumerate() {
                let point = points.get(row * groups + group).ok_or_else(invalid)?;
                let scale = scales.get(group * rows + row).ok_or_else(invalid)?;
                let code = codes.at(column) as i32 - half;
                numbers.push((code - i32::from(*point)) as f32 * scale);
            }
            stored(self.numbers.unwrap_or(Dtype::F32), &numbers, &mut out);
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_may_lie_over_two_words() {
        // 32 codes of 3 bits, the numbers 0 to 7 again and again: twelve bytes.
        let all = (0..32u128).fold(0u128, |all, at| all | (at % 8) << (3 * at));
        let bytes = &all.to_le_bytes()[..12];
        let bits = Bits { words: bytes.as_chunks().0, bits: 3 };
        assert_eq!(Vec::from_iter((0..32).map(|at| bits.at(at))), Vec::from_iter((0..32).map(|at| at % 8)));
    }
}
