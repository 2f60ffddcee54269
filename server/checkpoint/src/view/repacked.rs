//! Layers of compressed-tensors as ggml's blocks that hold the same numbers: codes and scales are moved, nothing is rounded.

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};
use half::f16;
use quarrel_engine::{Block, Codes, Granularity, Scaling, e4m3_bits};

use crate::{error::CheckpointError, local::Scales, modules::Module, source::Source};

/// The block that holds a layer's numbers.
///
/// # Errors
/// [`CheckpointError::Module`] for a layer that none does.
pub(super) fn block_of(module: &Module) -> Result<Block, CheckpointError> {
    let format = module.scheme.format();
    let columns = module.shape.last().copied().unwrap_or(0);
    let is_matrix = module.shape.len() == 2;
    let found = match (format.codes, format.scaling, module.scheme.granularity()) {
        (Codes::Fp4E2m1, Scaling::E8m0(_), _) => Some(Block::Mxfp4),
        (Codes::Fp4E2m1, Scaling::E4m3, _) => Some(Block::Nvfp4),
        (Codes::Int { bits: 8, symmetric: true, .. }, _, Granularity::Group(size)) if size.get() == 32 => {
            Some(Block::Q8_0)
        }
        _ => None,
    };
    let found = found.filter(|block| is_matrix && columns.is_multiple_of(block.elements() as u64));
    found.ok_or_else(|| {
        let detail = format!(
            "no block of ggml holds the numbers of `{}` of shape {:?}: only MXFP4A16, NVFP4A16 (of whole 64 columns) and W8A16/g32 are copied, \
             others are quantized anew by another scheme",
            module.scheme, module.shape
        );
        CheckpointError::Module { module: module.name.clone(), detail }
    })
}

/// The blocks of some rows.
///
/// # Errors
/// [`CheckpointError::Read`]; [`CheckpointError::Module`] for a scale that is no f16, where the blocks have that.
pub(super) fn blocks(
    source: &Source,
    module: &Module,
    block: Block,
    scales: &Scales,
    rows: Range<u64>,
) -> Result<Bytes, CheckpointError> {
    let (_, row_bytes) = module.channels();
    let range = rows.start * row_bytes..rows.end * row_bytes;
    let codes = source.read(&module.codes, range).map_err(CheckpointError::io("cannot read", source.path()))?;
    let scales = scales.of_rows(module, &rows);
    if let Some(scale) = scales.iter().find(|scale| !scale.is_finite() || scale.is_sign_negative()) {
        let detail = format!(
            "its scale {scale:e} is no finite number above zero, and the blocks of `{}` have no other",
            block.name()
        );
        return Err(CheckpointError::Module { module: module.name.clone(), detail });
    }
    let mut out = BytesMut::with_capacity(scales.len() * block.bytes());
    match block {
        Block::Mxfp4 => {
            for (scale, codes) in scales.iter().zip(codes.chunks_exact(16)) {
                // The exponent of 2^(e-127) is f32's own, but of the subnormal 2^-127, which is 0 there too.
                out.put_u8((scale.to_bits() >> 23) as u8);
                out.put_slice(&halves::<16>(codes));
            }
        }
        Block::Nvfp4 => {
            for (scales, codes) in scales.chunks_exact(4).zip(codes.chunks_exact(32)) {
                scales.iter().for_each(|scale| out.put_u8(e4m3_bits(*scale)));
                codes.chunks_exact(8).for_each(|codes| out.put_slice(&halves::<8>(codes)));
            }
        }
        _ => {
            for (scale, codes) in scales.iter().zip(codes.chunks_exact(32)) {
                let narrow = f16::from_f32(*scale);
                if narrow.to_f32() != *scale {
                    let detail =
                        format!("its scale {scale:e} is no f16, which `{}` has: quantize it anew", block.name());
                    return Err(CheckpointError::Module { module: module.name.clone(), detail });
                }
                out.put_slice(&narrow.to_le_bytes());
                // From codes that begin at zero to signed ones.
                codes.iter().for_each(|code| out.put_u8(code ^ 0x80));
            }
        }
    }
    Ok(out.freeze())
}

/// Nibbles side by side become those of the first half below those of the second.
fn halves<const N: usize>(codes: &[u8]) -> [u8; N] {
    let nibble = |at: usize| codes[at / 2] >> (4 * (at % 2)) & 15;
    std::array::from_fn(|at| nibble(at) | nibble(at + N) << 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_are_those_of_both_halves() {
        assert_eq!(halves::<4>(&[0x10, 0x32, 0x54, 0x76]), [0x40, 0x51, 0x62, 0x73]);
    }
}
