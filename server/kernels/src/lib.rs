//! Numbers to numbers: elements in, codes, scales and measured error out.
//!
//! A kernel runs over one *part*: consecutive elements of one output channel. It reads elements as they lie in the
//! message, at any byte alignment, and writes into the caller's buffers; it allocates nothing, knows no Arrow, no async,
//! no environment, and no layer names. What a scheme means is decided in `engine`.
//!
//! Promise: the same bits at every [`Level`], for codes, scales, zero points and sums. Each op is one scalar body,
//! compiled once per level (`level::multiversion!`); nothing is contracted, reassociated or approximated, and
//! sums are folded over a fixed tree. Formulas: `proto/SPEC.md`, section "Numbers".

mod dequantize;
mod element;
mod fp8;
mod half;
mod level;
mod pack;
mod quantize;
mod range;
mod scale;
mod sums;

pub use dequantize::{Coded, Decoded, bytes_mut, convert, dequantize};
pub use element::Dtype;
pub use level::{Level, LevelError};
pub use pack::packed_bytes;
pub use quantize::{Part, quantize};
pub use range::{Range, first_non_finite, ranges};
pub use scale::{Qparams, ScaleOverflow, qparams};
pub use sums::{Metrics, Sums};

/// Columns that a kernel takes at a time: small enough for the first-level cache, and a whole number of packed words
/// for every width. A part starts at a multiple of it, so tiles are the same however a channel is cut.
pub const TILE: usize = 256;

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

/// In which type intermediate results are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Arith {
    /// Everything in f32.
    #[default]
    F32,
    /// Every intermediate is rounded to the weight's own type, as compressed-tensors does on a CPU. The same as `F32`
    /// for types other than bf16 and f16.
    WeightDtype,
}

impl Codes {
    /// Bits per code.
    pub fn bits(self) -> u8 {
        match self {
            Codes::Int { bits, .. } => bits,
            Codes::Fp8E4m3 => 8,
        }
    }

    /// The smallest and largest code's value.
    pub fn limits(self) -> (f32, f32) {
        match self {
            Codes::Int { bits, .. } => {
                let half = (1u32 << (bits - 1)) as f32;
                (-half, half - 1.0)
            }
            Codes::Fp8E4m3 => (-fp8::E4M3_MAX, fp8::E4M3_MAX),
        }
    }

    /// Whether zero points are all zero and not stored.
    pub fn symmetric(self) -> bool {
        match self {
            Codes::Int { symmetric, .. } => symmetric,
            Codes::Fp8E4m3 => true,
        }
    }
}
