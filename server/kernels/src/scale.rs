//! From a range to a scale and a zero point, once a group.
//!
//! Source: compressed-tensors 0.20 `quantization/utils/helpers.py::calculate_qparams` and `generate_gparam`,
//! `utils/mxfp_utils.py::generate_mx_scales`; the other MX rules are torchao's `prototype/mx_formats/mx_tensor.py`. Held bit
//! for bit by tests/golden.

use crate::{
    Arith, Codes, Dtype, Format, Level, MxRule, Range, Scaling,
    half::{Round, ToBf16, ToF16, ToF32},
    level::multiversion,
    minifloat::{self, E4m3},
    range::greatest,
    simd::{One, Simd},
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

/// How ranges of finite elements become scales.
#[derive(Debug, Clone, Copy)]
pub struct Scaler {
    /// What the scales are for.
    pub format: Format,
    /// In which type it is computed.
    pub arith: Arith,
    /// The type of the elements.
    pub dtype: Dtype,
    /// The layer's [`global_scale`] with [`Scaling::E4m3`]; not read otherwise.
    pub global: f32,
}

impl Scaler {
    /// The scale and zero point of one group.
    ///
    /// # Errors
    /// [`ScaleOverflow`] if the stored scale is infinite.
    pub fn qparams(self, range: Range) -> Result<Qparams, ScaleOverflow> {
        let (mut scale, mut zero_point) = ([0.0], [0]);
        self.each(&[range], &mut scale, &mut zero_point)?;
        Ok(Qparams { scale: scale[0], zero_point: zero_point[0] })
    }

    /// The scales and zero points of groups, in order. Without a place for zero points, none are written.
    ///
    /// # Errors
    /// [`ScaleOverflow`] if a stored scale is infinite. What was written means nothing then.
    ///
    /// # Panics
    /// If there are fewer scales than ranges, or fewer zero points but some.
    pub fn write(
        self,
        level: Level,
        ranges: &[Range],
        scales: &mut [f32],
        zero_points: &mut [i32],
    ) -> Result<(), ScaleOverflow> {
        run(level, self, ranges, scales, zero_points)
    }

    #[inline(always)]
    fn each(self, ranges: &[Range], scales: &mut [f32], zero_points: &mut [i32]) -> Result<(), ScaleOverflow> {
        let Scaler { format: Format { codes, scaling }, arith, dtype, global } = self;
        let powers = |rule| move |range: Range| (power_of_two(codes, rule, range.amax()), 0);
        match (scaling, dtype.scale_type(), arith) {
            // The rule is a constant in each loop.
            (Scaling::E8m0(MxRule::Floor), ..) => fill(ranges, scales, zero_points, powers(MxRule::Floor)),
            (Scaling::E8m0(MxRule::Rceil), ..) => fill(ranges, scales, zero_points, powers(MxRule::Rceil)),
            (Scaling::E8m0(MxRule::Even), ..) => fill(ranges, scales, zero_points, powers(MxRule::Even)),
            (Scaling::E4m3, Dtype::Bf16, Arith::WeightDtype) => {
                fill(ranges, scales, zero_points, |range| (local::<ToBf16>(codes, range, global), 0))
            }
            (Scaling::E4m3, Dtype::F16, Arith::WeightDtype) => {
                fill(ranges, scales, zero_points, |range| (local::<ToF16>(codes, range, global), 0))
            }
            (Scaling::E4m3, ..) => fill(ranges, scales, zero_points, |range| (local::<ToF32>(codes, range, global), 0)),
            (Scaling::Weights, Dtype::Bf16, Arith::F32) => {
                fill(ranges, scales, zero_points, |range| compute::<ToBf16, ToF32>(codes, range, BF16_EPSILON))
            }
            (Scaling::Weights, Dtype::Bf16, Arith::WeightDtype) => {
                fill(ranges, scales, zero_points, |range| compute::<ToBf16, ToBf16>(codes, range, BF16_EPSILON))
            }
            (Scaling::Weights, Dtype::F16, Arith::F32) => {
                fill(ranges, scales, zero_points, |range| compute::<ToF16, ToF32>(codes, range, F16_EPSILON))
            }
            (Scaling::Weights, Dtype::F16, Arith::WeightDtype) => {
                fill(ranges, scales, zero_points, |range| compute::<ToF16, ToF16>(codes, range, F16_EPSILON))
            }
            (Scaling::Weights, ..) => {
                fill(ranges, scales, zero_points, |range| compute::<ToF32, ToF32>(codes, range, f32::EPSILON))
            }
        }
    }
}

type Done = Result<(), ScaleOverflow>;

multiversion! {
    fn run(scaler: Scaler, ranges: &[Range], scales: &mut [f32], zero_points: &mut [i32]) -> Done = body<R>;
}

#[inline(always)]
fn body<R: Simd>(scaler: Scaler, ranges: &[Range], scales: &mut [f32], zero_points: &mut [i32]) -> Done {
    scaler.each(ranges, scales, zero_points)
}

/// No early return, so that the loops vectorise.
#[inline(always)]
fn fill(ranges: &[Range], scales: &mut [f32], zero_points: &mut [i32], of: impl Fn(Range) -> (f32, i32)) -> Done {
    let mut most = 0f32;
    if zero_points.is_empty() {
        for (range, scale) in ranges.iter().zip(&mut scales[..ranges.len()]) {
            (*scale, _) = of(*range);
            most = greatest(*scale, most);
        }
    } else {
        let zero_points = &mut zero_points[..ranges.len()];
        for ((range, scale), zero_point) in ranges.iter().zip(&mut scales[..ranges.len()]).zip(zero_points) {
            (*scale, *zero_point) = of(*range);
            most = greatest(*scale, most);
        }
    }
    if most.is_infinite() { Err(ScaleOverflow) } else { Ok(()) }
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
#[inline(always)]
fn local<Step: Round>(codes: Codes, range: Range, global: f32) -> f32 {
    let (_, high) = codes.limits();
    let scale = global * Step::round(range.amax() / high);
    let (_, [scale]) = minifloat::encode::<One, E4m3>([scale]);
    if scale == 0.0 { 0.125 } else { scale }
}

/// 2^(e-127), e within 0..=254. Magnitudes below the smallest normal number count as that of 2^-127 and below.
#[inline(always)]
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

/// A scale, infinite if its stored type cannot hold it, and a zero point.
#[inline(always)]
fn compute<Stored: Round, Step: Round>(codes: Codes, range: Range, epsilon: f32) -> (f32, i32) {
    let (low, high) = codes.limits();
    let scale = match codes.symmetric() {
        true => range.amax() / ((high - low) / 2.0),
        false => Step::round(range.max - range.min) / (high - low),
    };
    let scale = Stored::round(scale);
    let zero_point = match codes.symmetric() {
        true => 0,
        // Zero over zero, an all-zero group, is NaN, which the cast makes 0.
        false => round_ties_even(Step::round(low - Step::round(range.min / scale)).clamp(low, high)) as i32,
    };
    (if scale == 0.0 { epsilon } else { scale }, zero_point)
}

/// Of a number below 2^22. The standard library's is a call where the CPU has no instruction for it.
#[inline(always)]
fn round_ties_even(value: f32) -> f32 {
    const ROUNDING: f32 = 12_582_912.0;
    (value + ROUNDING) - ROUNDING
}
