//! From a range to a scale and a zero point. Scalar: once a group.
//!
//! Source: compressed-tensors 0.20 `quantization/utils/helpers.py::calculate_qparams` and `generate_gparam`,
//! `utils/mxfp_utils.py::generate_mx_scales`; the other MX rules are torchao's `prototype/mx_formats/mx_tensor.py`. Held bit
//! for bit by tests/golden.

use crate::{
    Arith, Codes, Dtype, Format, MxRule, Range, Scaling,
    half::{Round, ToBf16, ToF16, ToF32},
    minifloat::{self, E4m3},
    simd::One,
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

/// The scale and zero point of a group of finite elements. `global` is the layer's [`global_scale`] with
/// [`Scaling::E4m3`], and not read otherwise.
///
/// # Errors
/// [`ScaleOverflow`] if the stored scale is infinite.
pub fn qparams(
    format: Format,
    arith: Arith,
    dtype: Dtype,
    range: Range,
    global: f32,
) -> Result<Qparams, ScaleOverflow> {
    let codes = format.codes;
    match (format.scaling, dtype.scale_type(), arith) {
        (Scaling::E8m0(rule), ..) => Ok(Qparams { scale: power_of_two(codes, rule, range.amax()), zero_point: 0 }),
        (Scaling::E4m3, Dtype::Bf16, Arith::WeightDtype) => Ok(local::<ToBf16>(codes, range, global)),
        (Scaling::E4m3, Dtype::F16, Arith::WeightDtype) => Ok(local::<ToF16>(codes, range, global)),
        (Scaling::E4m3, ..) => Ok(local::<ToF32>(codes, range, global)),
        (Scaling::Weights, Dtype::Bf16, Arith::F32) => compute::<ToBf16, ToF32>(codes, range, BF16_EPSILON),
        (Scaling::Weights, Dtype::Bf16, Arith::WeightDtype) => compute::<ToBf16, ToBf16>(codes, range, BF16_EPSILON),
        (Scaling::Weights, Dtype::F16, Arith::F32) => compute::<ToF16, ToF32>(codes, range, F16_EPSILON),
        (Scaling::Weights, Dtype::F16, Arith::WeightDtype) => compute::<ToF16, ToF16>(codes, range, F16_EPSILON),
        (Scaling::Weights, ..) => compute::<ToF32, ToF32>(codes, range, f32::EPSILON),
    }
}

/// By what the E4M3 scales of a layer are divided: such that its greatest magnitude `amax` uses the whole range of
/// scales and codes, 448 * 6 / amax; 1 where that is infinite. Layers that are fused share it: `amax` is then the greatest of all.
///
/// The quotient is a reciprocal times a number, as torch evaluates it.
pub fn global_scale(arith: Arith, dtype: Dtype, codes: Codes, amax: f32) -> f32 {
    match (dtype.scale_type(), arith) {
        (Dtype::Bf16, Arith::WeightDtype) => global::<ToBf16>(codes, amax),
        (Dtype::F16, Arith::WeightDtype) => global::<ToF16>(codes, amax),
        _ => global::<ToF32>(codes, amax),
    }
}

fn global<Step: Round>(codes: Codes, amax: f32) -> f32 {
    let (_, high) = codes.limits();
    let (_, scale_max) = Codes::Fp8E4m3.limits();
    let scale = Step::round(Step::round(1.0 / amax) * (scale_max * high));
    if scale.is_finite() { scale } else { 1.0 }
}

/// A group's scale under a global one, which is an f32 and so makes the rest f32. A scale of zero becomes E4M3's epsilon.
fn local<Step: Round>(codes: Codes, range: Range, global: f32) -> Qparams {
    let (_, high) = codes.limits();
    let scale = global * Step::round(range.amax() / high);
    let (_, [scale]) = minifloat::encode::<One, E4m3>([scale]);
    Qparams { scale: if scale == 0.0 { 0.125 } else { scale }, zero_point: 0 }
}

/// 2^(e-127), e within 0..=254. Magnitudes below the smallest normal number count as that of 2^-127 and below.
fn power_of_two(codes: Codes, rule: MxRule, amax: f32) -> f32 {
    let (_, high) = codes.limits();
    let exponent = |value: f32| (value.to_bits() >> 23) as i32;
    let emax = exponent(high) - 127;
    let e = match rule {
        MxRule::Floor => exponent(amax) - emax,
        // compressed-tensors rounds as if to E2M1 for E4M3 too.
        MxRule::Even => {
            let mantissa = if codes == Codes::Fp6E2m3 { 3 } else { 1 };
            ((amax.to_bits() + (1 << (22 - mantissa))) >> 23) as i32 - emax
        }
        MxRule::Rceil => {
            let ratio = (amax / high).to_bits();
            // Of subnormal quotients, those up to 2^-127 have a power of their own.
            if ratio < 1 << 23 { i32::from(ratio > 1 << 22) } else { ((ratio + 0x7f_ffff) >> 23) as i32 }
        }
    };
    let e = e.clamp(0, 254) as u32;
    f32::from_bits(if e == 0 { 1 << 22 } else { e << 23 })
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
