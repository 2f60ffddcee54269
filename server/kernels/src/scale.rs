//! From a range to a scale and a zero point. Scalar: once a group.
//!
//! Source: compressed-tensors 0.20 `quantization/utils/helpers.py::calculate_qparams`; held bit for bit by tests/golden.

use crate::{
    Arith, Codes, Dtype, Range,
    half::{Round, ToBf16, ToF16, ToF32},
};

/// The scale and zero point of one group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Qparams {
    /// Greater than zero and finite; a value of the stored type, widened.
    pub scale: f32,
    /// Within the codes' limits; zero if symmetric.
    pub zero_point: i32,
}

/// The scale, before it is stored, is larger than its stored type can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScaleOverflow;

/// The scale and zero point of a group of finite elements.
///
/// # Errors
/// [`ScaleOverflow`] if the stored scale is infinite.
pub fn qparams(codes: Codes, arith: Arith, dtype: Dtype, range: Range) -> Result<Qparams, ScaleOverflow> {
    match (dtype.scale_type(), arith) {
        (Dtype::Bf16, Arith::F32) => compute::<ToBf16, ToF32>(codes, range, BF16_EPSILON),
        (Dtype::Bf16, Arith::WeightDtype) => compute::<ToBf16, ToBf16>(codes, range, BF16_EPSILON),
        (Dtype::F16, Arith::F32) => compute::<ToF16, ToF32>(codes, range, F16_EPSILON),
        (Dtype::F16, Arith::WeightDtype) => compute::<ToF16, ToF16>(codes, range, F16_EPSILON),
        _ => compute::<ToF32, ToF32>(codes, range, f32::EPSILON),
    }
}

/// What replaces a scale of zero: the machine epsilon of the stored type.
const BF16_EPSILON: f32 = 0.007_812_5;
const F16_EPSILON: f32 = 0.000_976_562_5;

fn compute<Stored: Round, Step: Round>(codes: Codes, range: Range, epsilon: f32) -> Result<Qparams, ScaleOverflow> {
    let (low, high) = codes.limits();
    let scale = match codes.symmetric() {
        true => range.amax() / ((high - low) / 2.0),
        false => Step::round(range.max - range.min) / (high - low),
    };
    let scale = Stored::round(scale);
    if scale.is_infinite() {
        return Err(ScaleOverflow);
    }
    let zero_point = match codes.symmetric() {
        true => 0,
        // Zero over zero, an all-zero group, is NaN, which the cast makes 0.
        false => Step::round(low - Step::round(range.min / scale)).clamp(low, high).round_ties_even() as i32,
    };
    Ok(Qparams { scale: if scale == 0.0 { epsilon } else { scale }, zero_point })
}
