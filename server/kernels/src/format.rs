//! What numbers come out: codes, and what their scales are.

use crate::{
    Block, Codebook,
    minifloat::{E2m1, E2m3, E4m3, Minifloat},
};

/// Codes and their scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Format {
    /// What the codes are.
    pub codes: Codes,
    /// What the scales are.
    pub scaling: Scaling,
}

/// What the codes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codes {
    /// Integers of 2 to 8 bits, two's complement range `-2^(bits-1) ..= 2^(bits-1)-1`.
    Int {
        /// 2..=8.
        bits: u8,
        /// Whether zero points are zero and not stored.
        symmetric: bool,
        /// How codes become bytes.
        packing: Packing,
    },
    /// `float8_e4m3fn`, one byte an element.
    Fp8E4m3,
    /// FP4 E2M1, a dense little-endian bit stream: the even element is the low nibble.
    Fp4E2m1,
    /// FP6 E2M3, a dense little-endian bit stream: four elements in three bytes.
    Fp6E2m3,
    /// Four bits that stand for given values, the first of two in a byte's upper half: bitsandbytes.
    Codebook(Codebook),
    /// int8 from -127 to 127, which is the greatest magnitude: bitsandbytes' LLM.int8.
    Rowwise,
    /// ggml's blocks, scales and all.
    Block(Block),
}

/// How integer codes become bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Packing {
    /// Offset binary (code + 2^(bits-1)), a dense little-endian bit stream per channel, padded to 32-bit words:
    /// compressed-tensors' `pack-quantized`.
    Dense,
    /// One two's complement byte a code; 8 bits only: compressed-tensors' `int-quantized`.
    Plain,
}

/// What the scales are, and how they follow from a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scaling {
    /// Numbers of the weights' own type (f32 for f32, f64 and f8 weights).
    Weights,
    /// Powers of two, 2^(e-127) with e in 0..=254: E8M0 of the OCP MX specification.
    E8m0(MxRule),
    /// E4M3 numbers, under one f32 for the whole layer, by which they are divided.
    E4m3,
    /// The greatest magnitudes themselves, as f32: bitsandbytes.
    Absmax,
    /// The same, where not they are stored but bytes for them, a layer's together: bitsandbytes' double quantization. Codes are made under the
    /// magnitudes, [`Grid::magnitudes`](crate::Grid::magnitudes), and mean what the scales say.
    Nested,
    /// None beside the codes: they stand in the blocks.
    InBlocks,
}

/// How the power of two follows from a block's greatest magnitude. E is the exponent of the largest power of two that the
/// element type holds: 2 for E2M1 and E2M3, 8 for E4M3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MxRule {
    /// 2^(floor(log2 amax) - E): OCP MX 1.0, section 6.3; torchao's and ggml's default.
    Floor,
    /// 2^ceil(log2(amax / largest element)): cuBLAS; nothing saturates.
    Rceil,
    /// As `Floor`, of amax rounded to few bits of mantissa first: compressed-tensors.
    Even,
}

impl MxRule {
    /// Every rule.
    pub const ALL: [MxRule; 3] = [MxRule::Floor, MxRule::Rceil, MxRule::Even];

    /// The word in a scheme.
    pub const fn name(self) -> &'static str {
        match self {
            MxRule::Floor => "floor",
            MxRule::Rceil => "rceil",
            MxRule::Even => "even",
        }
    }
}

/// In which type intermediate results are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Arith {
    /// Everything in f32.
    #[default]
    F32,
    /// Every intermediate is rounded to the weight's own type, as compressed-tensors does on a CPU. The same as `F32`
    /// for types other than bf16 and f16, and for scales that are powers of two.
    WeightDtype,
}

impl Codes {
    /// Bits per code.
    pub fn bits(self) -> u8 {
        match self {
            Codes::Int { bits, .. } => bits,
            Codes::Fp8E4m3 | Codes::Rowwise => 8,
            Codes::Fp6E2m3 => 6,
            Codes::Fp4E2m1 | Codes::Codebook(_) => 4,
            Codes::Block(block) => block.bits(),
        }
    }

    /// The smallest and largest code's value; of blocks, of the bits.
    pub fn limits(self) -> (f32, f32) {
        match self {
            Codes::Int { bits, .. } => {
                let half = (1u32 << (bits - 1)) as f32;
                (-half, half - 1.0)
            }
            Codes::Fp8E4m3 => (-E4m3::MAX, E4m3::MAX),
            Codes::Fp6E2m3 => (-E2m3::MAX, E2m3::MAX),
            Codes::Fp4E2m1 => (-E2m1::MAX, E2m1::MAX),
            Codes::Codebook(_) => (-1.0, 1.0),
            Codes::Rowwise => (-127.0, 127.0),
            Codes::Block(block) => (0.0, ((1u16 << block.bits()) - 1) as f32),
        }
    }

    /// Whether zero points are all zero and not stored.
    pub fn symmetric(self) -> bool {
        match self {
            Codes::Int { symmetric, .. } => symmetric,
            Codes::Fp8E4m3
            | Codes::Fp6E2m3
            | Codes::Fp4E2m1
            | Codes::Codebook(_)
            | Codes::Rowwise
            | Codes::Block(_) => true,
        }
    }
}
