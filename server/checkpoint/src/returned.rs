//! A GGUF file of the Llama family as transformers names it, its blocks in the layout of compressed-tensors: the inverse of `becoming` where nothing is lost.

use std::{io, sync::Arc};

use half::f16;
use quarrel_engine::{Block, e4m3_value};
use safetensors::Dtype;

use crate::{
    element::Element,
    error::CheckpointError,
    gguf::llama,
    layer::module_of,
    model::Model,
    source::{Source, Tensor},
    view::{Compute, whole},
};

/// Of one tensor that is computed whole: more than any has.
const WHOLE_BYTES_MAX: u64 = 1 << 30;

/// A tensor of it.
#[derive(Debug)]
struct Piece {
    from: Tensor,
    /// Of how many heads the rows are, if those of each are in another order.
    heads: Option<u64>,
    part: Part,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Numbers as they are.
    Numbers,
    Codes(Block),
    Scales(Block),
    Shape,
    /// What NVFP4's scales are divided by.
    Global,
}

/// The model with such tensors.
///
/// # Errors
/// [`CheckpointError::Model`] for a file of another family; [`CheckpointError::Module`] for blocks that the layout does not hold.
pub(crate) fn returned(model: &Model) -> Result<Model, CheckpointError> {
    let wrong = |detail: String| CheckpointError::Model { path: model.path(), detail };
    let found = model.shards().iter().find_map(|shard| Some((shard, shard.gguf()?)));
    let (source, metadata) = found.ok_or_else(|| wrong("it is no GGUF file".to_owned()))?;
    if metadata.text("general.architecture") != Some("llama") {
        return Err(wrong(
            "its architecture is not `llama`: names and order of rows are known of that alone".to_owned(),
        ));
    }
    let heads = llama::heads(metadata).map_err(wrong)?;
    let (mut kept, mut pieces) = (Vec::new(), Vec::<(Tensor, Arc<dyn Compute>)>::new());
    for tensor in source.tensors() {
        // A part of what is told with its weight, if it is NVFP4; of others it has no place, and no name.
        let weight = tensor.name.strip_suffix(".scale").and_then(|name| source.tensor(&format!("{name}.weight")));
        // `rope_freqs` is computed of a configuration, which says it.
        if weight.is_some_and(|weight| weight.dtype == Block::Nvfp4.into()) || tensor.name == "rope_freqs.weight" {
            continue;
        }
        let unknown = || wrong(format!("tensor `{}` has no name in transformers that is known here", tensor.name));
        let (name, rows) = llama::unnamed(&tensor.name).ok_or_else(unknown)?;
        let heads = rows.heads(heads, &tensor.shape);
        let heads = heads.map_err(|detail| wrong(format!("tensor `{}` {detail}", tensor.name)))?;
        // Nothing is computed of it.
        if tensor.dtype.plain().is_some() && heads.is_none() {
            kept.push(Tensor { name, ..tensor.clone() });
            continue;
        }
        if tensor.bytes() > WHOLE_BYTES_MAX {
            let bytes = tensor.bytes();
            return Err(wrong(format!(
                "tensor `{}` has {bytes} bytes: expected at most {WHOLE_BYTES_MAX}",
                tensor.name
            )));
        }
        let parts = parts(source, tensor, &name)
            .map_err(|detail| CheckpointError::Module { module: tensor.name.clone(), detail })?;
        pieces.extend(parts.into_iter().map(|(part, from, new)| {
            let piece: Arc<dyn Compute> = Arc::new(Piece { from, heads, part });
            (new, piece)
        }));
    }
    Ok(model.as_one(whole(source, kept, pieces).as_safetensors()))
}

/// What a tensor becomes.
fn parts(source: &Source, tensor: &Tensor, name: &str) -> Result<Vec<(Part, Tensor, Tensor)>, String> {
    let new = |part: &str, dtype: Dtype, shape: Vec<u64>| Tensor {
        name: if part.is_empty() { name.to_owned() } else { format!("{}.{part}", module_of(name)) },
        dtype: dtype.into(),
        shape,
        at: 0..0,
        scheme: None,
    };
    let of = match tensor.dtype {
        Element::Plain(dtype) => {
            return Ok(vec![(Part::Numbers, tensor.clone(), new("", dtype, tensor.shape.clone()))]);
        }
        Element::Blocks(of) => of,
    };
    let (Some(block @ (Block::Mxfp4 | Block::Nvfp4 | Block::Q8_0)), [rows, columns]) =
        (of.block(), tensor.shape.as_slice())
    else {
        return Err(format!(
            "the layout of compressed-tensors does not hold blocks of {} of shape {:?}: only MXFP4, NVFP4 and Q8_0 of matrices are copied, others are quantized anew",
            of.name, tensor.shape
        ));
    };
    let (rows, columns) = (*rows, *columns);
    let (codes, scales, group) = match block {
        Block::Mxfp4 => ((Dtype::U8, columns / 2), Dtype::U8, 32),
        Block::Nvfp4 => ((Dtype::U8, columns / 2), Dtype::F8_E4M3, 16),
        _ => ((Dtype::I32, columns / 4), Dtype::F16, 32),
    };
    let mut parts = vec![
        (Part::Codes(block), tensor.clone(), new("weight_packed", codes.0, vec![rows, codes.1])),
        (Part::Scales(block), tensor.clone(), new("weight_scale", scales, vec![rows, columns / group])),
    ];
    match block {
        Block::Q8_0 => parts.push((Part::Shape, tensor.clone(), new("weight_shape", Dtype::I64, vec![2]))),
        Block::Nvfp4 => {
            let factor = source.tensor(&format!("{}.scale", module_of(&tensor.name)));
            let factor = factor.ok_or("it has no scale of its own (`NAME.scale`), which NVFP4A16 has")?;
            if factor.dtype != Dtype::F32.into() || factor.bytes() != 4 {
                return Err(format!("`{}` is {} {:?}: expected one F32", factor.name, factor.dtype, factor.shape));
            }
            parts.push((Part::Global, factor.clone(), new("weight_global_scale", Dtype::F32, vec![1])));
        }
        _ => {}
    }
    Ok(parts)
}

impl Compute for Piece {
    fn bytes(&self, source: &Source) -> io::Result<Vec<u8>> {
        if self.part == Part::Shape {
            return Ok(self.from.shape.iter().flat_map(|size| size.to_le_bytes()).collect());
        }
        let bytes = source.read(&self.from, 0..self.from.bytes())?;
        if self.part == Part::Global {
            let factor = bytes.first_chunk().map_or(1.0, |bytes| f32::from_le_bytes(*bytes));
            return match factor.is_normal() && (1.0 / factor).is_normal() && factor > 0.0 {
                true => Ok((1.0 / factor).to_le_bytes().to_vec()),
                false => {
                    Err(self.wrong(format!("it is {factor:e}: expected a finite number above zero, as its inverse")))
                }
            };
        }
        let rows = self.from.shape.first().copied().unwrap_or(1).max(1);
        let row_bytes = (bytes.len() as u64 / rows).max(1) as usize;
        let rows_there = Vec::from_iter(bytes.chunks_exact(row_bytes));
        let mut out = Vec::with_capacity(bytes.len());
        for at in 0..rows_there.len() {
            let from = self.heads.map_or(at, |heads| before(at, rows as usize / heads as usize));
            self.row(rows_there[from], &mut out)?;
        }
        Ok(out)
    }
}

/// Which of llama.cpp's rows is one of transformers', within heads of so many: `a0 b0 a1 b1 ..` is `a0 a1 .. b0 b1 ..`.
fn before(at: usize, head: usize) -> usize {
    let within = at % head;
    at - within + within % (head / 2) * 2 + within / (head / 2)
}

impl Piece {
    fn wrong(&self, detail: String) -> io::Error {
        io::Error::other(CheckpointError::Module { module: self.from.name.clone(), detail })
    }

    fn row(&self, row: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        match self.part {
            Part::Codes(Block::Mxfp4) => row.chunks_exact(17).for_each(|block| out.extend(side_by_side(&block[1..]))),
            Part::Codes(Block::Nvfp4) => row.chunks_exact(36).for_each(|block| {
                block[4..].chunks_exact(8).for_each(|codes| out.extend(side_by_side(codes)));
            }),
            // Signed codes to those that begin at zero.
            Part::Codes(_) => {
                row.chunks_exact(34).for_each(|block| out.extend(block[2..].iter().map(|code| code ^ 0x80)))
            }
            Part::Scales(Block::Mxfp4) => {
                let scales = row.chunks_exact(17).map(|block| block[0]);
                if scales.clone().any(|bits| bits == u8::MAX) {
                    return Err(self.wrong("a scale of it is no number (0xff)".to_owned()));
                }
                out.extend(scales);
            }
            Part::Scales(Block::Nvfp4) => {
                let scales = row.chunks_exact(36).flat_map(|block| &block[..4]);
                // ggml reads no sign, and the highest of them as zero; a scale of zero has no place beside codes.
                if let Some(bits) = scales.clone().find(|bits| **bits & 0x80 != 0 || !e4m3_value(**bits).is_finite()) {
                    return Err(self.wrong(format!("a scale of it is {bits:#04x}, which is no FP8 above zero")));
                }
                out.extend(scales);
            }
            Part::Scales(_) => {
                for block in row.chunks_exact(34) {
                    let scale = f16::from_le_bytes([block[0], block[1]]);
                    if !scale.is_finite() {
                        return Err(self.wrong(format!("a scale of it is {scale}: expected a finite number")));
                    }
                    out.extend(&block[..2]);
                }
            }
            Part::Numbers | Part::Shape | Part::Global => out.extend(row),
        }
        Ok(())
    }
}

/// Nibbles of the first half below those of the second become neighbours.
fn side_by_side(codes: &[u8]) -> impl Iterator<Item = u8> + '_ {
    let size = codes.len();
    let nibble = move |at: usize| if at < size { codes[at] & 15 } else { codes[at - size] >> 4 };
    (0..size).map(move |at| nibble(2 * at) | nibble(2 * at + 1) << 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_nibbles_go_back() {
        // llama.cpp's order of a head of six rows, and its inverse.
        let there = [0, 3, 1, 4, 2, 5];
        let back = Vec::from_iter((0..6).map(|at| there[before(at, 6)]));
        assert_eq!(back, [0, 1, 2, 3, 4, 5]);
        assert_eq!(Vec::from_iter(side_by_side(&[0x40, 0x51, 0x62, 0x73])), [0x10, 0x32, 0x54, 0x76]);
    }
}
