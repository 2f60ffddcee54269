//! Layers in the layouts of GPTQ and AWQ, seen in that of compressed-tensors: the same codes, scales and zero points, exactly.
//!
//! Source: AutoGPTQ and GPTQModel (`qweight` packed along the input, zero points less one in the first version of the format), AutoAWQ (`gemm`: packed along the
//! output, interleaved); compressed-tensors 0.20, `converters/autoawq.py`.

use std::{collections::HashSet, io, sync::Arc};

use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::{
    bits::pack_down,
    error::CheckpointError,
    source::{Source, Tensor},
    view::{Compute, whole},
};

/// What a model's configuration says of such layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    kind: Kind,
    bits: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// What is added to stored zero points.
    Gptq(u32),
    Awq,
}

/// Where among eight nibbles of AWQ each channel is.
const INTERLEAVED: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

#[derive(Debug)]
struct Layer {
    layout: Layout,
    rows: u64,
    columns: u64,
    groups: u64,
    codes: Tensor,
    scales: Tensor,
    /// Signed, channel by channel; none if all of them are zero.
    points: Option<Vec<i8>>,
}

/// A tensor of a layer.
#[derive(Debug)]
struct Piece(Arc<Layer>, Part);

impl Compute for Piece {
    fn bytes(&self, source: &Source) -> io::Result<Vec<u8>> {
        self.0.part(source, self.1)
    }
}

#[derive(Debug, Clone, Copy)]
enum Part {
    Codes,
    Scales,
    Shape,
    Points,
}

/// A file with layers of GPTQ or AWQ, if its model says that it has such, in the layout of compressed-tensors.
///
/// # Errors
/// [`CheckpointError::Module`] for a layer that has no place in it; [`CheckpointError::Model`] for a layout that is not known.
pub(crate) fn translated(shard: Source, config: Option<&Map<String, Value>>) -> Result<Source, CheckpointError> {
    let names = shard.tensors().iter().filter_map(|tensor| tensor.name.strip_suffix(".qweight"));
    let names = Vec::from_iter(names.map(str::to_owned));
    let said = config.and_then(|config| config.get("quantization_config")).and_then(Value::as_object);
    let (Some(said), false) = (said, names.is_empty()) else { return Ok(shard) };
    let wrong = |detail: String| CheckpointError::Model { path: shard.path().to_owned(), detail };
    let Some(layout) = layout(said).map_err(wrong)? else { return Ok(shard) };
    let (mut parts, mut dropped) = (Vec::<(Tensor, Arc<dyn Compute>)>::new(), HashSet::new());
    for name in &names {
        let module = |detail: String| CheckpointError::Module { module: name.clone(), detail };
        let layer = Arc::new(Layer::of(&shard, name, layout, said).map_err(module)?);
        dropped.extend(["qweight", "qzeros", "scales", "g_idx"].map(|part| format!("{name}.{part}")));
        for (part, name, dtype, shape) in layer.tensors(name) {
            let tensor = Tensor { name, dtype: dtype.into(), shape, at: 0..0, scheme: None };
            parts.push((tensor, Arc::new(Piece(Arc::clone(&layer), part))));
        }
    }
    let kept = shard.tensors().iter().filter(|tensor| !dropped.contains(&tensor.name)).cloned();
    Ok(whole(&shard, kept.collect(), parts))
}

/// The layout that a configuration names; none if it is another than these.
fn layout(said: &Map<String, Value>) -> Result<Option<Layout>, String> {
    let text = |key: &str| said.get(key).and_then(Value::as_str).map(str::to_ascii_lowercase);
    let bits = said.get("bits").or_else(|| said.get("w_bit")).and_then(Value::as_u64).unwrap_or(4);
    let kind = match text("quant_method").as_deref() {
        Some("gptq") => match text("checkpoint_format").as_deref() {
            None | Some("gptq") => Kind::Gptq(1),
            Some("gptq_v2") => Kind::Gptq(0),
            Some(other) => {
                return Err(format!("its GPTQ layers are in the format `{other}`: expected `gptq` or `gptq_v2`"));
            }
        },
        Some("awq") => match text("version").as_deref() {
            None | Some("gemm") => Kind::Awq,
            Some(other) => return Err(format!("its AWQ layers are of version `{other}`: expected `gemm`")),
        },
        _ => return Ok(None),
    };
    let is_known = match kind {
        Kind::Gptq(_) => [2, 4, 8].contains(&bits),
        Kind::Awq => bits == 4,
    };
    match is_known {
        true => Ok(Some(Layout { kind, bits: bits as u8 })),
        false => Err(format!("its layers have {bits} bits: expected 2, 4 or 8 of GPTQ, 4 of AWQ")),
    }
}

impl Layer {
    fn of(shard: &Source, name: &str, layout: Layout, said: &Map<String, Value>) -> Result<Layer, String> {
        let part = |part: &str| shard.tensor(&format!("{name}.{part}")).ok_or_else(|| format!("it has no `{part}`"));
        let (codes, scales) = (part("qweight")?, part("scales")?);
        let per_word = 32 / u64::from(layout.bits);
        let ([above, beside], [groups, rows]) = (codes.shape.as_slice(), scales.shape.as_slice()) else {
            return Err(format!(
                "its `qweight` is of {:?} and its `scales` of {:?}: expected matrices",
                codes.shape, scales.shape
            ));
        };
        let (columns, found) = match layout.kind {
            Kind::Gptq(_) => (above.saturating_mul(per_word), *beside),
            Kind::Awq => (*above, beside.saturating_mul(per_word)),
        };
        let is_float = matches!(scales.dtype.plain(), Some(Dtype::F16 | Dtype::BF16 | Dtype::F32));
        let fits = codes.dtype == Dtype::I32.into() && is_float && found == *rows;
        if !fits
            || *groups == 0
            || columns == 0
            || columns % groups != 0
            || !rows.is_multiple_of(per_word)
            || !columns.is_multiple_of(per_word)
        {
            return Err(format!(
                "its `qweight` is {} {:?} and its `scales` {} {:?}, which are no codes of {} bits",
                codes.dtype, codes.shape, scales.dtype, scales.shape, layout.bits
            ));
        }
        let mut layer = Layer {
            layout,
            rows: *rows,
            columns,
            groups: *groups,
            codes: codes.clone(),
            scales: scales.clone(),
            points: None,
        };
        layer.check_order(shard, name, said)?;
        layer.points = layer.read_points(shard, name)?;
        if layer.points.is_some() && layout.bits == 8 {
            return Err(
                "its codes of 8 bits have zero points, of which there is no scheme: only symmetric ones are read"
                    .to_owned(),
            );
        }
        Ok(layer)
    }

    /// GPTQ may have taken columns to groups in another order: those are no groups of neighbours.
    fn check_order(&self, shard: &Source, name: &str, said: &Map<String, Value>) -> Result<(), String> {
        let Some(order) = shard.tensor(&format!("{name}.g_idx")) else {
            let is_ordered = said.get("desc_act").and_then(Value::as_bool).unwrap_or(false);
            return if is_ordered {
                Err("its columns are ordered (`desc_act`) and it has no `g_idx`".to_owned())
            } else {
                Ok(())
            };
        };
        let bytes = shard.read_whole(order).map_err(|error| error.to_string())?;
        let size = self.columns / self.groups;
        let found = bytes.as_chunks::<4>().0.iter().map(|bytes| i64::from(i32::from_le_bytes(*bytes)));
        match order.dtype == Dtype::I32.into() && found.eq((0..self.columns).map(|column| (column / size) as i64)) {
            true => Ok(()),
            false => Err("its groups are not of neighbouring columns (`g_idx`, of `desc_act`): the layout of compressed-tensors has no such".to_owned()),
        }
    }

    /// Zero points in the signed domain of the codes.
    fn read_points(&self, shard: &Source, name: &str) -> Result<Option<Vec<i8>>, String> {
        let Some(stored) = shard.tensor(&format!("{name}.qzeros")) else { return Ok(None) };
        let (bits, per_word) = (u32::from(self.layout.bits), 32 / u64::from(self.layout.bits));
        if stored.dtype != Dtype::I32.into() || stored.shape != [self.groups, self.rows / per_word] {
            return Err(format!(
                "its `qzeros` is {} {:?}: expected I32 {:?}",
                stored.dtype,
                stored.shape,
                [self.groups, self.rows / per_word]
            ));
        }
        let bytes = shard.read_whole(stored).map_err(|error| error.to_string())?;
        let words = Vec::from_iter(bytes.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)));
        let mut points = vec![0i8; (self.rows * self.groups) as usize];
        for (at, point) in points.iter_mut().enumerate() {
            let (row, group) = (at as u64 / self.groups, at as u64 % self.groups);
            let word = words[(group * (self.rows / per_word) + row / per_word) as usize];
            let within = (row % per_word) as usize;
            let (shift, added) = match self.layout.kind {
                Kind::Gptq(added) => (within as u32 * bits, added),
                Kind::Awq => (INTERLEAVED[within] * bits, 0),
            };
            let zero = (word >> shift & ((1u64 << bits) - 1) as u32) + added;
            if zero >> bits != 0 {
                return Err(format!(
                    "the zero point of channel {row} and group {group} is {zero}: codes of {bits} bits have none beyond {}",
                    (1u32 << bits) - 1
                ));
            }
            *point = (zero as i32 - (1 << (bits - 1))) as i8;
        }
        Ok(points.iter().any(|point| *point != 0).then_some(points))
    }

    /// What it is in the layout of compressed-tensors.
    fn tensors(&self, name: &str) -> Vec<(Part, String, Dtype, Vec<u64>)> {
        let per_word = 32 / u64::from(self.layout.bits);
        let scales = self.scales.dtype.of_values();
        let mut parts = vec![
            (Part::Codes, format!("{name}.weight_packed"), Dtype::I32, vec![self.rows, self.columns / per_word]),
            (Part::Scales, format!("{name}.weight_scale"), scales, vec![self.rows, self.groups]),
            (Part::Shape, format!("{name}.weight_shape"), Dtype::I64, vec![2]),
        ];
        if self.points.is_some() {
            let shape = vec![self.rows / per_word, self.groups];
            parts.push((Part::Points, format!("{name}.weight_zero_point"), Dtype::I32, shape));
        }
        parts
    }

    fn part(&self, source: &Source, part: Part) -> io::Result<Vec<u8>> {
        match part {
            Part::Shape => Ok([self.rows, self.columns].iter().flat_map(|size| size.to_le_bytes()).collect()),
            Part::Points => {
                Ok(pack_down(self.points.as_deref().unwrap_or_default(), self.groups as usize, self.layout.bits))
            }
            Part::Scales => {
                let bytes = source.read(&self.scales, 0..self.scales.bytes())?;
                let width = bytes.len() / (self.rows * self.groups) as usize;
                Ok(transposed(&bytes, self.groups as usize, width))
            }
            Part::Codes => {
                let bytes = source.read(&self.codes, 0..self.codes.bytes())?;
                match self.layout.kind {
                    // Words of neighbouring columns, as they are to be.
                    Kind::Gptq(_) => Ok(transposed(&bytes, self.codes.shape[0] as usize, 4)),
                    Kind::Awq => Ok(self.regrouped(&bytes)),
                }
            }
        }
    }

    /// Words of eight interleaved channels as words of eight neighbouring columns.
    fn regrouped(&self, bytes: &[u8]) -> Vec<u8> {
        let words = bytes.as_chunks::<4>().0;
        let (beside, across) = ((self.rows / 8) as usize, (self.columns / 8) as usize);
        let mut out = vec![0u8; bytes.len()];
        let (words_out, _) = out.as_chunks_mut::<4>();
        for (at, word) in words_out.iter_mut().enumerate() {
            let (row, block) = (at / across, at % across);
            let shift = 4 * INTERLEAVED[row % 8];
            let nibble =
                |column: usize| u32::from_le_bytes(words[(8 * block + column) * beside + row / 8]) >> shift & 15;
            *word = (0..8).fold(0u32, |all, column| all | nibble(column) << (4 * column)).to_le_bytes();
        }
        out
    }
}

/// A row-major matrix of so many rows, whose elements have `width` bytes, with rows for columns.
fn transposed(bytes: &[u8], rows: usize, width: usize) -> Vec<u8> {
    let columns = bytes.len() / (rows * width).max(1);
    let mut out = Vec::with_capacity(bytes.len());
    for column in 0..columns {
        for row in 0..rows {
            let at = (row * columns + column) * width;
            out.extend_from_slice(&bytes[at..at + width]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_is_transposed_whatever_its_elements() {
        assert_eq!(transposed(&[1, 2, 3, 4, 5, 6], 2, 1), [1, 4, 2, 5, 3, 6]);
        assert_eq!(transposed(&[1, 2, 3, 4, 5, 6, 7, 8], 2, 2), [1, 2, 5, 6, 3, 4, 7, 8]);
    }
}
