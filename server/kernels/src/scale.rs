//! From a range to a scale and a zero point, once a group.
//!
//! Source: compressed-tensors 0.20 `quantization/utils/helpers.py::calculate_qparams` and `generate_gparam`,
//! `utils/mxfp_utils.py::generate_mx_scales`; the other MX rules are torchao's `prototype/mx_formats/mx_tensor.py`. Held bit
//! for bit by tests/golden.

use std::marker::PhantomData;

use crate::{
    Arith, Codes, Dtype, Format, Level, MxRule, Range, Scaling,
    coder::ROUNDING,
    element::LANES,
    half::{Round, ToBf16, ToF16, ToF32},
    level::multiversion,
    minifloat::{self, E4m3},
    range::greatest,
    simd::{One, Simd},
};

/// The scale and zero point of one group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Qparams {
    /// Finite; a value of the stored type, widened. Greater than zero, but for the magnitudes of zeros.
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
        body::<One>(self, &[range], &mut scale, &mut zero_point)?;
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
}

type Done = Result<(), ScaleOverflow>;

multiversion! {
    fn run(scaler: Scaler, ranges: &[Range], scales: &mut [f32], zero_points: &mut [i32]) -> Done = body<R>;
}

#[inline(always)]
fn body<R: Simd>(scaler: Scaler, ranges: &[Range], scales: &mut [f32], zero_points: &mut [i32]) -> Done {
    let Scaler { format: Format { codes, scaling }, arith, dtype, global } = scaler;
    let out = Out { ranges, scales, zero_points };
    match (scaling, dtype.scale_type(), arith) {
        (Scaling::E8m0(rule), ..) => out.fill::<R>(PowerOfTwo { codes, rule }),
        (Scaling::E4m3, Dtype::Bf16, Arith::WeightDtype) => out.fill::<R>(Local::<ToBf16>::new(codes, global)),
        (Scaling::E4m3, Dtype::F16, Arith::WeightDtype) => out.fill::<R>(Local::<ToF16>::new(codes, global)),
        (Scaling::E4m3, ..) => out.fill::<R>(Local::<ToF32>::new(codes, global)),
        (Scaling::Weights, ..) => out.fill::<R>(OfWeights(scaler)),
        (Scaling::Absmax | Scaling::Nested, ..) => out.fill::<R>(Greatest),
        (Scaling::InBlocks, ..) => Ok(()),
    }
}

/// The scales and zero points of a register of ranges with [`Scaling::Weights`]; infinite what their type cannot hold.
#[inline(always)]
pub(crate) fn of_weights<R: Simd>(scaler: Scaler, min: R::F, max: R::F) -> (R::F, R::F) {
    OfWeights(scaler).apply::<R>(min, max)
}

/// What a rule makes of the ends of ranges.
trait Rule {
    /// Scales, infinite where their type cannot hold them, and zero points.
    fn apply<S: Simd>(&self, min: S::F, max: S::F) -> (S::F, S::F);
}

struct Out<'a> {
    ranges: &'a [Range],
    scales: &'a mut [f32],
    zero_points: &'a mut [i32],
}

impl Out<'_> {
    #[inline(always)]
    fn fill<S: Simd>(self, rule: impl Rule) -> Done {
        let count = self.ranges.len();
        let scales = self.scales[..count].chunks_mut(S::W);
        let mut zero_points = match self.zero_points.is_empty() {
            true => &mut [][..],
            false => &mut self.zero_points[..count],
        }
        .chunks_mut(S::W);
        let mut most = 0f32;
        for (ranges, scales) in self.ranges.chunks(S::W).zip(scales) {
            let (mut min, mut max) = ([0f32; LANES], [0f32; LANES]);
            for (range, (min, max)) in ranges.iter().zip(min.iter_mut().zip(&mut max)) {
                (*min, *max) = (range.min, range.max);
            }
            let (found, zeros) = rule.apply::<S>(S::load(&min, 0), S::load(&max, 0));
            S::store(found, &mut min, 0);
            for (scale, found) in scales.iter_mut().zip(min) {
                *scale = found;
                most = greatest(found, most);
            }
            if let Some(zero_points) = zero_points.next() {
                S::store(zeros, &mut max, 0);
                for (zero_point, zero) in zero_points.iter_mut().zip(max) {
                    *zero_point = zero as i32;
                }
            }
        }
        if most.is_infinite() { Err(ScaleOverflow) } else { Ok(()) }
    }
}

/// As [`Range::amax`].
#[inline(always)]
fn amax<S: Simd>(min: S::F, max: S::F) -> S::F {
    S::max(max, S::sub(S::splat(0.0), min))
}

/// The greatest magnitude itself; 0 of zeros.
struct Greatest;

impl Rule for Greatest {
    #[inline(always)]
    fn apply<S: Simd>(&self, min: S::F, max: S::F) -> (S::F, S::F) {
        (amax::<S>(min, max), S::splat(0.0))
    }
}

/// By what the E4M3 scales of a layer are divided: such that its greatest magnitude `amax` uses the whole range of
/// scales and codes, 448 * 6 / amax; 1 where that is infinite, or zero. Layers that are fused share it: `amax` is then the greatest of all.
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
    if scale.is_finite() && scale > 0.0 { scale } else { 1.0 }
}

/// A group's scale under a global one, which is an f32 and so makes the rest f32. A scale of zero becomes E4M3's epsilon.
struct Local<Step> {
    high: f32,
    global: f32,
    step: PhantomData<Step>,
}

impl<Step> Local<Step> {
    fn new(codes: Codes, global: f32) -> Local<Step> {
        Local { high: codes.limits().1, global, step: PhantomData }
    }
}

impl<Step: Round> Rule for Local<Step> {
    #[inline(always)]
    fn apply<S: Simd>(&self, min: S::F, max: S::F) -> (S::F, S::F) {
        let scale = S::div(amax::<S>(min, max), S::splat(self.high));
        let (_, scale) = minifloat::encode::<S, E4m3>(S::mul(S::splat(self.global), Step::lanes::<S>(scale)));
        (S::select_at_most(scale, S::splat(0.0), S::splat(0.125), scale), S::splat(0.0))
    }
}

/// 2^(e-127), e within 0..=254. The exponent of subnormal magnitudes counts as that of 2^-127: as their bits say.
struct PowerOfTwo {
    codes: Codes,
    rule: MxRule,
}

impl Rule for PowerOfTwo {
    #[inline(always)]
    fn apply<S: Simd>(&self, min: S::F, max: S::F) -> (S::F, S::F) {
        let (_, high) = self.codes.limits();
        let emax = (high.to_bits() >> 23) - 127;
        // |min| and |max| are numbers, whose bits have no sign.
        let amax = S::abs(amax::<S>(min, max));
        let greatest_subnormal = f32::from_bits((1 << 23) - 1);
        // e + emax, or emax where that is more: e is no less than 0. It is no more than 254, since emax is at least 2.
        let exponent = match self.rule {
            MxRule::Floor => S::shr::<23>(S::bits(amax)),
            // compressed-tensors rounds as if to E2M1 for E4M3 too.
            MxRule::Even => {
                let mantissa = if self.codes == Codes::Fp6E2m3 { 3 } else { 1 };
                S::shr::<23>(S::add_i(S::bits(amax), S::splat_i(1 << (22 - mantissa))))
            }
            MxRule::Rceil => {
                let ratio = S::div(amax, S::splat(high));
                let above = S::shr::<23>(S::add_i(S::bits(ratio), S::splat_i(0x7f_ffff)));
                // Of subnormal quotients, those up to 2^-127 have a power of their own.
                let (zero, one) = (S::splat_i(emax), S::splat_i(emax + 1));
                let below = S::select_at_most(ratio, S::splat(LOWEST), S::number(zero), S::number(one));
                let normal = S::number(S::add_i(above, S::splat_i(emax)));
                S::bits(S::select_at_most(ratio, S::splat(greatest_subnormal), below, normal))
            }
        };
        let e = S::sub_i(S::max_i(exponent, S::splat_i(emax)), S::splat_i(emax));
        let scale = S::number(S::shl::<23>(e));
        (S::select_at_most(scale, S::splat(0.0), S::splat(LOWEST), scale), S::splat(0.0))
    }
}

/// 2^-127.
const LOWEST: f32 = f32::from_bits(1 << 22);

/// What replaces a scale of zero: the machine epsilon of the stored type.
const BF16_EPSILON: f32 = 0.007_812_5;
const F16_EPSILON: f32 = 0.000_976_562_5;

/// A scale of the weights' own type, and a zero point.
struct Own<Stored, Step> {
    low: f32,
    high: f32,
    symmetric: bool,
    epsilon: f32,
    parameters: PhantomData<(Stored, Step)>,
}

impl<Stored, Step> Own<Stored, Step> {
    fn new(codes: Codes, epsilon: f32) -> Own<Stored, Step> {
        let (low, high) = codes.limits();
        Own { low, high, symmetric: codes.symmetric(), epsilon, parameters: PhantomData }
    }
}

/// [`Own`], of whatever type the weights have.
struct OfWeights(Scaler);

impl Rule for OfWeights {
    #[inline(always)]
    fn apply<S: Simd>(&self, min: S::F, max: S::F) -> (S::F, S::F) {
        let Scaler { format: Format { codes, .. }, arith, dtype, .. } = self.0;
        match (dtype.scale_type(), arith) {
            (Dtype::Bf16, Arith::F32) => Own::<ToBf16, ToF32>::new(codes, BF16_EPSILON).apply::<S>(min, max),
            (Dtype::Bf16, Arith::WeightDtype) => Own::<ToBf16, ToBf16>::new(codes, BF16_EPSILON).apply::<S>(min, max),
            (Dtype::F16, Arith::F32) => Own::<ToF16, ToF32>::new(codes, F16_EPSILON).apply::<S>(min, max),
            (Dtype::F16, Arith::WeightDtype) => Own::<ToF16, ToF16>::new(codes, F16_EPSILON).apply::<S>(min, max),
            _ => Own::<ToF32, ToF32>::new(codes, f32::EPSILON).apply::<S>(min, max),
        }
    }
}

impl<Stored: Round, Step: Round> Rule for Own<Stored, Step> {
    #[inline(always)]
    fn apply<S: Simd>(&self, min: S::F, max: S::F) -> (S::F, S::F) {
        let (low, high, zero) = (S::splat(self.low), S::splat(self.high), S::splat(0.0));
        let steps = self.high - self.low;
        let scale = match self.symmetric {
            true => S::div(amax::<S>(min, max), S::splat(steps / 2.0)),
            false => S::div(Step::lanes::<S>(S::sub(max, min)), S::splat(steps)),
        };
        let scale = Stored::lanes::<S>(scale);
        let zero_point = match self.symmetric {
            true => zero,
            false => {
                let exact = Step::lanes::<S>(S::sub(low, Step::lanes::<S>(S::div(min, scale))));
                let within = S::min(S::max(exact, low), high);
                let whole = S::sub(S::add(within, S::splat(ROUNDING)), S::splat(ROUNDING));
                // Zero over zero, an all-zero group, is NaN: then zero.
                S::select_at_most(exact, S::splat(f32::INFINITY), whole, zero)
            }
        };
        (S::select_at_most(scale, zero, S::splat(self.epsilon), scale), zero_point)
    }
}
