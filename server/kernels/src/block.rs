//! ggml's blocks, the types of GGUF files: codes that hold their own scales.
//!
//! Source: llama.cpp, `ggml/src/ggml-common.h` for the layouts and `ggml-quants.c` for what must come out, as it is in PyPI's
//! llama-cpp-python 0.3.36. tests/golden holds each type to ggml's own bytes. ggml is built without contraction of a
//! multiplication and an addition, and adds in the order of the columns; so does this.

mod decode;
mod fp4;
mod layout;
mod legacy;
mod nonlinear;
mod plain;
mod search;
mod superblock;
mod weighted;

use crate::{
    Dtype, Level, Part, Sums, TILE, element::widen, half, level::multiversion, quantize::Measure, simd::Simd,
    sums::Tally,
};

pub(crate) use decode::dequantize;

/// A type of block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Block {
    /// int8 under an f16.
    Q8_0,
    /// 4 bits under an f16.
    Q4_0,
    /// 4 bits under an f16, above another.
    Q4_1,
    /// 5 bits under an f16.
    Q5_0,
    /// 5 bits under an f16, above another.
    Q5_1,
    /// 2 bits, scales and minima of 4 bits for each 16.
    Q2K,
    /// 3 bits, scales of 6 bits for each 16.
    Q3K,
    /// 4 bits, scales and minima of 6 bits for each 32.
    Q4K,
    /// 5 bits, scales and minima of 6 bits for each 32.
    Q5K,
    /// 6 bits, scales of 8 bits for each 16.
    Q6K,
    /// 16 values that are not evenly spaced, under an f16.
    Iq4Nl,
    /// FP4 E2M1 under a power of two.
    Mxfp4,
    /// FP4 E2M1, an unsigned E4M3 for each 16.
    Nvfp4,
}

impl Block {
    /// Every type.
    pub const ALL: [Block; 13] = [
        Block::Q8_0,
        Block::Q4_0,
        Block::Q4_1,
        Block::Q5_0,
        Block::Q5_1,
        Block::Q2K,
        Block::Q3K,
        Block::Q4K,
        Block::Q5K,
        Block::Q6K,
        Block::Iq4Nl,
        Block::Mxfp4,
        Block::Nvfp4,
    ];

    /// ggml's name.
    pub const fn name(self) -> &'static str {
        match self {
            Block::Q8_0 => "Q8_0",
            Block::Q4_0 => "Q4_0",
            Block::Q4_1 => "Q4_1",
            Block::Q5_0 => "Q5_0",
            Block::Q5_1 => "Q5_1",
            Block::Q2K => "Q2_K",
            Block::Q3K => "Q3_K",
            Block::Q4K => "Q4_K",
            Block::Q5K => "Q5_K",
            Block::Q6K => "Q6_K",
            Block::Iq4Nl => "IQ4_NL",
            Block::Mxfp4 => "MXFP4",
            Block::Nvfp4 => "NVFP4",
        }
    }

    /// Consecutive columns in one block.
    pub const fn elements(self) -> usize {
        match self {
            Block::Q8_0 | Block::Q4_0 | Block::Q4_1 | Block::Q5_0 | Block::Q5_1 | Block::Iq4Nl | Block::Mxfp4 => 32,
            Block::Nvfp4 => 64,
            Block::Q2K | Block::Q3K | Block::Q4K | Block::Q5K | Block::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn bytes(self) -> usize {
        match self {
            Block::Q8_0 => 34,
            Block::Q4_0 | Block::Iq4Nl => 18,
            Block::Q4_1 => 20,
            Block::Q5_0 => 22,
            Block::Q5_1 => 24,
            Block::Q2K => 84,
            Block::Q3K => 110,
            Block::Q4K => 144,
            Block::Q5K => 176,
            Block::Q6K => 210,
            Block::Mxfp4 => 17,
            Block::Nvfp4 => 36,
        }
    }

    /// Bits of a code.
    pub const fn bits(self) -> u8 {
        match self {
            Block::Q8_0 => 8,
            Block::Q6K => 6,
            Block::Q5_0 | Block::Q5_1 | Block::Q5K => 5,
            Block::Q4_0 | Block::Q4_1 | Block::Q4K | Block::Iq4Nl | Block::Mxfp4 | Block::Nvfp4 => 4,
            Block::Q3K => 3,
            Block::Q2K => 2,
        }
    }

    /// Where the f16 of a block stand: its scale, and what it adds or takes away.
    const fn halves(self) -> &'static [usize] {
        match self {
            Block::Q8_0 | Block::Q4_0 | Block::Q5_0 | Block::Iq4Nl => &[0],
            Block::Q4_1 | Block::Q5_1 | Block::Q4K | Block::Q5K => &[0, 2],
            Block::Q2K => &[80, 82],
            Block::Q3K => &[108],
            Block::Q6K => &[208],
            Block::Mxfp4 | Block::Nvfp4 => &[],
        }
    }

    /// Whether its search can go by the importance of columns. ggml's other types do without.
    pub const fn takes_importance(self) -> bool {
        !matches!(self, Block::Q8_0 | Block::Mxfp4 | Block::Nvfp4)
    }

    /// Whether elements are weighted by the mean square of their whole channel too, where columns have an importance.
    pub const fn weighs_by_channel(self) -> bool {
        matches!(self, Block::Q4_0 | Block::Q4_1 | Block::Q5_0 | Block::Q5_1)
    }

    /// The greatest magnitude that a block can stand for, of the types whose search ends in a scale of zero, and not beyond f16, where
    /// squares of the elements are beyond f32. With importance of columns it is any type's, and this is more than each can stand for.
    pub const fn greatest(self, by_importance: bool) -> f32 {
        match self {
            _ if by_importance => 1e9,
            Block::Q3K => 65_504.0 * 32.0 * 4.0,
            Block::Q6K => 65_504.0 * 128.0 * 32.0,
            _ => f32::INFINITY,
        }
    }

    /// The first block of `bytes` whose scale is beyond f16.
    pub fn first_overflow(self, bytes: &[u8]) -> Option<usize> {
        let beyond = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]) & 0x7c00 == 0x7c00;
        bytes.chunks_exact(self.bytes()).position(|block| self.halves().iter().any(|at| beyond(&block[*at..])))
    }
}

/// Writes the blocks of a part: whole ones.
#[inline(always)]
pub(crate) fn quantize<R: Simd, M: Measure>(block: Block, part: &Part<'_>, out: &mut [u8]) -> M::Made {
    match block {
        Block::Q8_0 => plain::quantize::<R, M, legacy::Q8_0>(part, out),
        Block::Q4_0 => plain::quantize::<R, M, legacy::Q4_0>(part, out),
        Block::Q4_1 => plain::quantize::<R, M, legacy::Q4_1>(part, out),
        Block::Q5_0 => plain::quantize::<R, M, legacy::Q5_0>(part, out),
        Block::Q5_1 => plain::quantize::<R, M, legacy::Q5_1>(part, out),
        Block::Mxfp4 => plain::quantize::<R, M, fp4::Mxfp4>(part, out),
        Block::Nvfp4 => plain::quantize::<R, M, fp4::Nvfp4>(part, out),
        Block::Q2K => superblock::quantize::<R, M, superblock::Q2K, 16>(part, out),
        Block::Q3K => superblock::quantize::<R, M, superblock::Q3K, 16>(part, out),
        Block::Q4K => superblock::quantize::<R, M, superblock::Q4K, 32>(part, out),
        Block::Q5K => superblock::quantize::<R, M, superblock::Q5K, 32>(part, out),
        Block::Q6K => superblock::quantize::<R, M, superblock::Q6K, 16>(part, out),
        Block::Iq4Nl => superblock::quantize::<R, M, nonlinear::Iq4Nl<false>, 32>(part, out),
    }
}

multiversion! { fn by_importance(block: Block, part: &Part<'_>, out: &mut [u8]) -> Sums = body_by_importance<R>; }

/// The same, where columns count differently. Always measured: beside the search that costs nothing.
pub(crate) fn quantize_by_importance(level: Level, block: Block, part: &Part<'_>, out: &mut [u8]) -> Sums {
    by_importance(level, block, part, out)
}

#[inline(always)]
fn body_by_importance<R: Simd>(block: Block, part: &Part<'_>, out: &mut [u8]) -> Sums {
    match block {
        Block::Q4_0 => superblock::quantize::<R, Tally, weighted::Q4_0, 32>(part, out),
        Block::Q4_1 => superblock::quantize::<R, Tally, weighted::Q4_1, 32>(part, out),
        Block::Q5_0 => superblock::quantize::<R, Tally, weighted::Q5_0, 32>(part, out),
        Block::Q5_1 => superblock::quantize::<R, Tally, weighted::Q5_1, 32>(part, out),
        Block::Q2K => superblock::quantize::<R, Tally, weighted::Q2K, 16>(part, out),
        Block::Q3K => superblock::quantize::<R, Tally, weighted::Q3K, 16>(part, out),
        Block::Q4K => superblock::quantize::<R, Tally, weighted::Q4K, 32>(part, out),
        Block::Q5K => superblock::quantize::<R, Tally, weighted::Q5K, 32>(part, out),
        Block::Q6K => superblock::quantize::<R, Tally, weighted::Q6K, 16>(part, out),
        Block::Iq4Nl => superblock::quantize::<R, Tally, nonlinear::Iq4Nl<true>, 32>(part, out),
        Block::Q8_0 | Block::Mxfp4 | Block::Nvfp4 => panic!("{} takes no importance of columns", block.name()),
    }
}

/// The mean of a channel's squares, added in their order: what [`Block::weighs_by_channel`] is about.
pub fn mean_square(dtype: Dtype, bytes: &[u8]) -> f32 {
    let mut wide = [0f32; TILE];
    let sum = bytes
        .chunks(TILE * dtype.bytes())
        .fold(0f32, |sum, tile| widen(dtype, tile, &mut wide).iter().fold(sum, |sum, x| sum + x * x));
    sum / (bytes.len() / dtype.bytes()) as f32
}

/// The nearest f16 as a block holds it, and its value.
fn stored(value: f32) -> ([u8; 2], f32) {
    let bits = half::f32_to_f16(value);
    (bits.to_le_bytes(), half::f16_to_f32(bits))
}

/// What FP4 codes stand for, doubled; the scale is halved.
const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// What the codes of IQ4_NL stand for.
const IQ4_NL: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The scale of an MXFP4 block: 2^(e-128).
fn e8m0_halved(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (u32::from(e) - 1) << 23 })
}

/// The scale of 16 elements of an NVFP4 block: half an E4M3 whose sign counts for nothing. 0x7f is zero to ggml, and 0xff the number after
/// the largest.
fn ue4m3_halved(bits: u8) -> f32 {
    let (exponent, mantissa) = (u32::from(bits >> 3 & 15), u32::from(bits & 7));
    match (bits, exponent) {
        (0x7f, _) => 0.0,
        (_, 0) => mantissa as f32 * f32::from_bits((127 - 10) << 23),
        _ => f32::from_bits((exponent + 127 - 8) << 23 | mantissa << 20),
    }
}
