//! Numbers to numbers: elements in, codes, scales and measured error out.
//!
//! A kernel runs over one *part*: consecutive elements of one output channel. It reads elements as they lie in the
//! message, at any byte alignment, and writes into the caller's buffers; it allocates nothing, knows no Arrow, no async,
//! no environment, and no layer names. What a scheme means is decided in `engine`.
//!
//! Promise: the same bits at every [`Level`], for codes, scales, zero points and sums. Each op is one body over
//! registers (`simd`), compiled once per level (`level::multiversion!`); nothing is contracted, reassociated or approximated, and
//! sums are folded over a fixed tree. Formulas: `proto/SPEC.md`, section "Numbers".

mod block;
mod codebook;
mod coder;
mod dequantize;
mod element;
mod format;
mod half;
mod level;
mod minifloat;
mod pack;
mod part;
mod quantize;
mod range;
mod scale;
mod simd;
mod solve;
mod sums;

pub use block::{Block, mean_square};
pub use codebook::Codebook;
pub use dequantize::{Coded, Decoded, convert, dequantize};
pub use element::Dtype;
pub use format::{Arith, Codes, Format, MxRule, Packing, Scaling};
pub use level::{Level, LevelError};
pub use minifloat::{e4m3_bits, e4m3_value};
pub use pack::packed_bytes;
pub use part::{Grid, Importance, Part};
pub use quantize::{encode, quantize};
pub use range::{Range, first_non_finite, ranges};
pub use scale::{Qparams, ScaleOverflow, Scaler, global_scale};
pub use solve::{Search, errors};
pub use sums::{Metrics, Sums};

/// Columns that a kernel takes at a time: small enough for the first-level cache, and a whole number of packed words
/// for every width. A part starts at a multiple of it, so tiles are the same however a channel is cut.
pub const TILE: usize = 256;
