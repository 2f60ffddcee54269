//! Layers in the layouts of GPTQ and AWQ, seen in that of compressed-tensors: the same codes, scales and zero points, exactly. What has no place in it is
//! seen as the numbers that it stands for.
//!
//! Source: AutoGPTQ and GPTQModel (`qweight` packed along the input, zero points less one in the first version of the format), AutoAWQ (`gemm`: packed along the
//! output, interleaved); compressed-tensors 0.20, `converters/autoawq.py`.

mod configuration;
mod dense;
mod groups;

use std::{
    collections::HashSet,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use safetensors::Dtype;
use serde_json::{Map, Value};

use self::{
    configuration::{Kind, Layout, Said},
    dense::Bits,
};
use crate::{
    bits::pack_down,
    error::{CheckpointError, Wrong},
    source::{Source, Tensor},
    view::{Compute, whole},
};

/// Of one layer, whose tensors are computed whole: more than any has.
const CODES_BYTES_MAX: u64 = 1 << 30;
const COLUMNS_MAX: u64 = 1 << 24;
const POINTS_MAX: u64 = 1 << 26;

/// Where among eight nibbles of AWQ each channel is.
const INTERLEAVED: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

#[derive(Debug)]
struct Layer {
    layout: Layout,
    rows: u64,
    columns: u64,
    groups: u64,
    /// Columns of each; of the last one there may be fewer.
    group: u64,
    codes: Tensor,
    scales: Tensor,
    /// Its zero points, if any is another than zero in the signed domain of the codes.
    zeros: Option<Tensor>,
    /// The group of each column, where those are no neighbours.
    order: Option<Tensor>,
    /// The type of its numbers, if it is seen as those.
    numbers: Option<Dtype>,
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
    Numbers,
}

/// What such layers are made of.
const PARTS: [&str; 4] = ["qweight", "qzeros", "scales", "g_idx"];
/// What they are seen as: none of it may be there beside them.
const SEEN: [&str; 5] = ["weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"];
/// Beside a model of such layers, files that say so.
const CONFIGURATIONS: [&str; 2] = ["quantize_config.json", "quant_config.json"];

/// A model's files with their layers of GPTQ or AWQ, if its configuration says that it has such, in the layout of compressed-tensors, or as numbers of `dtype`,
/// else of the type of their scales. Files that say that it is of theirs go from `others`.
///
/// # Errors
/// [`CheckpointError::Module`] for a layer that has no place in it; [`CheckpointError::Model`] for a layout that is not known.
pub(crate) fn translated(
    shards: Vec<Source>,
    config: Option<&Map<String, Value>>,
    others: &mut Vec<PathBuf>,
    dtype: Option<Dtype>,
) -> Result<Vec<Source>, CheckpointError> {
    let said = config.and_then(|config| config.get("quantization_config")).and_then(Value::as_object);
    let (Some(said), Some(first)) = (said, shards.first()) else { return Ok(shards) };
    let wrong = |detail: String| CheckpointError::Model { path: first.path().to_owned(), detail };
    let names = || shards.iter().flat_map(Source::tensors).map(|tensor| tensor.name.as_str());
    if !names().any(|name| name.ends_with(".qweight")) {
        return Ok(shards);
    }
    let Some(said) = Said::of(said).map_err(wrong)? else { return Ok(shards) };
    let modules = HashSet::<&str>::from_iter(names().filter_map(|name| name.strip_suffix(".qweight")));
    for shard in &shards {
        for tensor in shard.tensors() {
            let Some((module, part)) = tensor.name.rsplit_once('.') else { continue };
            let detail = match (modules.contains(module), PARTS.contains(&part), SEEN.contains(&part)) {
                (true, true, _) if shard.tensor(&format!("{module}.qweight")).is_none() => {
                    format!(
                        "its `{part}` is in `{}` and its codes are not: this version wants both in one file",
                        shard.path().display()
                    )
                }
                (true, _, true) => {
                    format!("`{}` is there beside its `qweight`: expected the one or the other", tensor.name)
                }
                (false, true, _) => format!("`{}` is there and no `qweight` that it is of", tensor.name),
                _ => continue,
            };
            return Err(CheckpointError::Module { module: module.to_owned(), detail });
        }
    }
    others.retain(|other| !CONFIGURATIONS.iter().any(|name| other == Path::new(name)));
    shards.iter().map(|shard| file(shard, &said, dtype)).collect()
}

fn file(shard: &Source, said: &Said, dtype: Option<Dtype>) -> Result<Source, CheckpointError> {
    let names = shard.tensors().iter().filter_map(|tensor| tensor.name.strip_suffix(".qweight"));
    let (mut parts, mut dropped) = (Vec::<(Tensor, Arc<dyn Compute>)>::new(), HashSet::new());
    for name in names {
        let layer = Arc::new(Layer::of(shard, name, said, dtype).map_err(|wrong| wrong.of(name))?);
        dropped.extend(PARTS.map(|part| format!("{name}.{part}")));
        for (part, name, dtype, shape) in layer.tensors(name) {
            let scheme = layer.numbers.is_some().then(|| layer.scheme()).transpose();
            let scheme = scheme.map_err(|detail| CheckpointError::Module { module: name.to_owned(), detail })?;
            let tensor = Tensor { name, dtype: dtype.into(), shape, at: 0..0, scheme };
            parts.push((tensor, Arc::new(Piece(Arc::clone(&layer), part))));
        }
    }
    if parts.is_empty() {
        return Ok(shard.clone());
    }
    let kept = shard.tensors().iter().filter(|tensor| !dropped.contains(&tensor.name)).cloned();
    Ok(whole(shard, kept.collect(), parts))
}

impl Layer {
    fn of(shard: &Source, name: &str, said: &Said, dtype: Option<Dtype>) -> Result<Layer, Wrong> {
        let layout = said.layout;
        let part = |part: &str| shard.tensor(&format!("{name}.{part}")).ok_or_else(|| format!("it has no `{part}`"));
        let (codes, scales) = (part("qweight")?, part("scales")?);
        let bits = u64::from(layout.bits);
        let ([above, beside], [groups, rows]) = (codes.shape.as_slice(), scales.shape.as_slice()) else {
            return Err(format!(
                "its `qweight` is of {:?} and its `scales` of {:?}: expected matrices",
                codes.shape, scales.shape
            )
            .into());
        };
        let (columns, found) = match layout.kind {
            Kind::Gptq(_) => (above.saturating_mul(32) / bits, *beside),
            Kind::Awq => (*above, beside.saturating_mul(32) / bits),
        };
        let is_float = matches!(scales.dtype.plain(), Some(Dtype::F16 | Dtype::BF16 | Dtype::F32));
        let fits = codes.dtype == Dtype::I32.into() && is_float && found == *rows;
        if !fits
            || *groups == 0
            || columns == 0
            || !rows.saturating_mul(bits).is_multiple_of(32)
            || !columns.saturating_mul(bits).is_multiple_of(32)
        {
            return Err(format!(
                "its `qweight` is {} {:?} and its `scales` {} {:?}, which are no codes of {} bits",
                codes.dtype, codes.shape, scales.dtype, scales.shape, layout.bits
            )
            .into());
        }
        let mut layer = Layer {
            layout,
            rows: *rows,
            columns,
            groups: *groups,
            group: columns.div_ceil(*groups),
            codes: codes.clone(),
            scales: scales.clone(),
            zeros: None,
            order: None,
            numbers: None,
        };
        layer.check_size()?;
        let order = layer.find_order(shard, name, said)?;
        layer.group = layer.find_group(order.as_ref().map(|(_, groups)| groups.as_slice()), said)?;
        let is_other = |group: usize, column: usize| group as u64 != column as u64 / layer.group;
        let differs = |groups: &[usize]| groups.iter().enumerate().any(|(column, group)| is_other(*group, column));
        layer.order = order.filter(|(_, groups)| differs(groups)).map(|(tensor, _)| tensor);
        layer.zeros = layer.find_zeros(shard, name)?;
        match (said.symmetric, &layer.zeros, shard.tensor(&format!("{name}.qzeros"))) {
            (Some(true), None, _) => {}
            (Some(true), Some(_), _) => {
                return Err("its zero points are not in the middle of the codes, and its config.json says that they are (`sym`, or no `zero_point`): \
                            perhaps its `checkpoint_format` is another"
                    .into());
            }
            (_, _, None) => {
                return Err("it has no `qzeros`, and its config.json does not say that it is symmetric".into());
            }
            _ => {}
        }
        // Of 8 bits there is no scheme with zero points, and of 3 bits words of another layout.
        let is_short = columns % layer.group != 0;
        if layer.order.is_some() || is_short || layout.bits == 3 || layer.zeros.is_some() && layout.bits == 8 {
            layer.numbers = Some(dtype.or(layer.scales.dtype.plain()).unwrap_or(Dtype::F32));
            let most = CODES_BYTES_MAX / 4;
            if columns.checked_mul(layer.rows).is_none_or(|elements| elements > most) {
                return Err(format!(
                    "it has {} channels of {columns} columns: expected at most {most} weights",
                    layer.rows
                )
                .into());
            }
        }
        Ok(layer)
    }

    /// Its tensors are computed whole.
    fn check_size(&self) -> Result<(), String> {
        let points = self.rows.checked_mul(self.groups).filter(|points| *points <= POINTS_MAX);
        match self.codes.bytes() <= CODES_BYTES_MAX && points.is_some() && self.columns <= COLUMNS_MAX {
            true => Ok(()),
            false => Err(format!(
                "it has codes of {} bytes, {} columns and {} groups in {} channels: expected at most {CODES_BYTES_MAX} bytes, {COLUMNS_MAX} columns \
                 and {POINTS_MAX} scales",
                self.codes.bytes(),
                self.columns,
                self.groups,
                self.rows
            )),
        }
    }

    /// The tensor of its zero points, if one of them counts.
    fn find_zeros(&self, shard: &Source, name: &str) -> Result<Option<Tensor>, Wrong> {
        let Some(stored) = shard.tensor(&format!("{name}.qzeros")) else { return Ok(None) };
        let across = self.rows * u64::from(self.layout.bits) / 32;
        if stored.dtype != Dtype::I32.into() || stored.shape != [self.groups, across] {
            return Err(format!(
                "its `qzeros` is {} {:?}: expected I32 {:?}",
                stored.dtype,
                stored.shape,
                [self.groups, across]
            )
            .into());
        }
        let bytes = shard.read_whole(stored)?;
        let points = self.points(&bytes)?;
        Ok(points.iter().any(|point| *point != 0).then(|| stored.clone()))
    }

    /// Zero points in the signed domain of the codes, channel by channel.
    fn points(&self, bytes: &[u8]) -> Result<Vec<i8>, String> {
        let bits = u32::from(self.layout.bits);
        let across = (self.rows * u64::from(bits) / 32) as usize;
        let words = bytes.as_chunks::<4>().0;
        let mut points = vec![0i8; (self.rows * self.groups) as usize];
        for (at, point) in points.iter_mut().enumerate() {
            let (row, group) = (at as u64 / self.groups, at as u64 % self.groups);
            let stored = Bits { words: &words[group as usize * across..][..across], bits };
            let zero = match self.layout.kind {
                Kind::Gptq(added) => stored.at(row as usize) + added,
                Kind::Awq => stored.at((row - row % 8) as usize + INTERLEAVED[(row % 8) as usize] as usize),
            };
            if zero >> bits != 0 {
                return Err(format!(
                    "the zero point of channel {row} and group {group} is {zero}: codes of {bits} bits have none beyond {}",
                    (1u32 << bits) - 1
                ));
            }
            *point = (zero as i32 - (1 << (bits - 1))) as i8;
        }
        Ok(points)
    }

    /// What it is in the layout of compressed-tensors.
    fn tensors(&self, name: &str) -> Vec<(Part, String, Dtype, Vec<u64>)> {
        if let Some(dtype) = self.numbers {
            return vec![(Part::Numbers, format!("{name}.weight"), dtype, vec![self.rows, self.columns])];
        }
        let per_word = 32 / u64::from(self.layout.bits);
        let scales = self.scales.dtype.of_values();
        let mut parts = vec![
            (Part::Codes, format!("{name}.weight_packed"), Dtype::I32, vec![self.rows, self.columns / per_word]),
            (Part::Scales, format!("{name}.weight_scale"), scales, vec![self.rows, self.groups]),
            (Part::Shape, format!("{name}.weight_shape"), Dtype::I64, vec![2]),
        ];
        if self.zeros.is_some() {
            let shape = vec![self.rows / per_word, self.groups];
            parts.push((Part::Points, format!("{name}.weight_zero_point"), Dtype::I32, shape));
        }
        parts
    }

    fn part(&self, source: &Source, part: Part) -> io::Result<Vec<u8>> {
        match part {
            Part::Shape => Ok([self.rows, self.columns].iter().flat_map(|size| size.to_le_bytes()).collect()),
            Part::Points => {
                let Some(zeros) = &self.zeros else { return Ok(Vec::new()) };
                let bytes = source.read(zeros, 0..zeros.bytes())?;
                let points = self.points(&bytes).map_err(io::Error::other)?;
                Ok(pack_down(&points, self.groups as usize, self.layout.bits))
            }
            Part::Numbers => self.decoded(source),
            Part::Scales => {
                let bytes = source.read(&self.scales, 0..self.scales.bytes())?;
                self.finite_scales(&bytes)?;
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
