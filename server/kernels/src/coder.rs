//! What one group does to its elements: a register of elements to codes and the values that they stand for.

use std::marker::PhantomData;

use crate::{
    Packing,
    half::Round,
    minifloat::{self, Minifloat},
    simd::Simd,
    sums::Registers,
};

/// What elements become.
pub(crate) struct Coded<S: Simd> {
    /// In the lowest byte of each lane.
    pub(crate) codes: S::I,
    /// The values that the codes stand for.
    pub(crate) decoded: S::F,
}

/// Whether the codes of a piece are sure.
pub(crate) struct Watch<S: Simd> {
    /// The greatest distance of an element from its code, in codes.
    doubt: S::F,
    /// The least element, and 0.
    lowest: S::F,
}

impl<S: Simd> Watch<S> {
    #[inline(always)]
    pub(crate) fn new() -> Watch<S> {
        Watch { doubt: S::splat(0.0), lowest: S::splat(0.0) }
    }

    #[inline(always)]
    pub(crate) fn is_sure(&self, coder: &impl Coder) -> bool {
        let Bounds { doubt, lowest } = coder.bounds();
        S::all_less(self.doubt, S::splat(doubt)) & S::all_less(S::splat(lowest), self.lowest)
    }
}

/// Within these a piece's codes are sure; else its tile is coded again, exactly.
pub(crate) struct Bounds {
    /// The doubt must be less.
    doubt: f32,
    /// The least element must be greater.
    lowest: f32,
}

/// What one group does to its elements.
pub(crate) trait Coder {
    /// Codes elements, and counts those that lie outside the codes' range.
    fn code<S: Simd>(&self, values: S::F, sums: &mut Registers<S>, watch: &mut Watch<S>) -> Coded<S>;

    /// Of a coder that is always sure there are none.
    #[inline(always)]
    fn bounds(&self) -> Bounds {
        Bounds { doubt: f32::INFINITY, lowest: f32::NEG_INFINITY }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct Limits<T> {
    low: T,
    high: T,
    /// Adding it rounds to an integer, ties to even, whose offset binary is the sum's low byte.
    shift: T,
}

impl Limits<f32> {
    #[inline(always)]
    pub(crate) fn of(bits: u8, packing: Packing) -> Limits<f32> {
        let half = (1u32 << (bits - 1)) as f32;
        let offset = match packing {
            Packing::Dense => half,
            Packing::Plain => 0.0,
        };
        Limits { low: -half, high: half - 1.0, shift: ROUNDING + offset }
    }

    #[inline(always)]
    fn lanes<S: Simd>(&self) -> Limits<S::F> {
        Limits { low: S::splat(self.low), high: S::splat(self.high), shift: S::splat(self.shift) }
    }
}

/// 1.5 * 2^23: f32 numbers of that size are integers.
const ROUNDING: f32 = 12_582_912.0;

/// Integers, by division.
pub(crate) struct Exact<Step> {
    scale: f32,
    zero_point: f32,
    limits: Limits<f32>,
    step: PhantomData<Step>,
}

impl<Step> Exact<Step> {
    #[inline(always)]
    pub(crate) fn new(scale: f32, zero_point: i32, limits: Limits<f32>) -> Exact<Step> {
        Exact { scale, zero_point: zero_point as f32, limits, step: PhantomData }
    }
}

impl<Step: Round> Coder for Exact<Step> {
    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F, sums: &mut Registers<S>, _: &mut Watch<S>) -> Coded<S> {
        let Limits { low, high, shift } = self.limits.lanes::<S>();
        let (scale, zero_point) = (S::splat(self.scale), S::splat(self.zero_point));
        let exact = Step::lanes::<S>(S::add(Step::lanes::<S>(S::div(values, scale)), zero_point));
        sums.count(S::count_outside(exact, low, high));
        let sum = S::add(clamp::<S>(exact, low, high), shift);
        let decoded = S::mul(S::sub(S::sub(sum, shift), zero_point), scale);
        Coded { codes: S::bits(sum), decoded }
    }
}

/// Symmetric integers by multiplication with the reciprocal, several times faster than division.
///
/// With r = 1/s and x*r rounded each, the product is within 3 * 2^-24 of the rounded quotient, relatively. So the codes are
/// the same unless the product is that near to half-way between two, which is the doubt. Half-way to the lowest code lies the
/// least element of half of all groups, since scales are made such; so there the element itself is compared.
pub(crate) struct Swift {
    scale: f32,
    reciprocal: f32,
    /// The quotient is above the highest code if the element is greater.
    above: f32,
    /// The code is the lowest if the element is not greater.
    lowest: f32,
    limits: Limits<f32>,
}

impl Swift {
    #[inline(always)]
    pub(crate) fn new(scale: f32, limits: Limits<f32>) -> Swift {
        let (above, lowest) = (reach(limits.high, scale), -attain(-limits.low - 0.5, scale));
        Swift { scale, reciprocal: 1.0 / scale, above, lowest, limits }
    }
}

/// The greatest x of which x/scale, rounded, is not above `limit`: quotients up to half-way to the next number round to
/// `limit`, half-way too, since its last bit is even. The product is exact in f64: 24 bits times 25.
#[inline(always)]
fn reach(limit: f32, scale: f32) -> f32 {
    let next = f32::from_bits(limit.to_bits() + 1);
    let product = f64::from(scale) * ((f64::from(limit) + f64::from(next)) / 2.0);
    let nearest = product as f32;
    if f64::from(nearest) > product { f32::from_bits(nearest.to_bits() - 1) } else { nearest }
}

/// The least x of which x/scale, rounded, is at least `limit`, whose last bit is even.
#[inline(always)]
fn attain(limit: f32, scale: f32) -> f32 {
    let last = f32::from_bits(limit.to_bits() - 1);
    let product = f64::from(scale) * ((f64::from(limit) + f64::from(last)) / 2.0);
    let nearest = product as f32;
    if f64::from(nearest) < product { f32::from_bits(nearest.to_bits() + 1) } else { nearest }
}

impl Coder for Swift {
    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F, sums: &mut Registers<S>, watch: &mut Watch<S>) -> Coded<S> {
        let Limits { low, high, shift } = self.limits.lanes::<S>();
        sums.count(S::count_above(values, S::splat(self.above)));
        let inner = clamp::<S>(S::mul(values, S::splat(self.reciprocal)), S::splat(self.limits.low + 0.6), high);
        let near = S::select_at_most(values, S::splat(self.lowest), low, inner);
        let sum = S::add(near, shift);
        let whole = S::sub(sum, shift);
        watch.doubt = S::max_magnitude(watch.doubt, S::sub(near, whole));
        watch.lowest = S::min(values, watch.lowest);
        Coded { codes: S::bits(sum), decoded: S::mul(whole, S::splat(self.scale)) }
    }

    /// Elements below the lowest code's range, which this does not count, are as rare as they are few: absmax scales have none.
    #[inline(always)]
    fn bounds(&self) -> Bounds {
        // Outside this range the reciprocal is subnormal or infinite, and not as exact.
        let is_exact = self.scale >= f32::MIN_POSITIVE && self.scale <= 1.0 / f32::MIN_POSITIVE;
        let doubt = if is_exact { 0.5 - (self.limits.high + 2.0) / (1 << 22) as f32 } else { 0.0 };
        Bounds { doubt, lowest: -reach(-self.limits.low, self.scale).next_up() }
    }
}

/// Small floats.
pub(crate) struct Mini<F, Step, D> {
    pub(crate) scale: f32,
    pub(crate) by: f32,
    pub(crate) parameters: PhantomData<(F, Step, D)>,
}

/// How an element is divided by its scale.
pub(crate) trait Scaled {
    fn by(scale: f32) -> f32;
    fn scaled<S: Simd>(values: S::F, by: S::F) -> S::F;
}

pub(crate) struct Divided;

/// By multiplication, which is as exact: the reciprocal of 2^(e-127) is 2^(127-e), a number too.
pub(crate) struct PowerOfTwo;

impl Scaled for Divided {
    #[inline(always)]
    fn by(scale: f32) -> f32 {
        scale
    }

    #[inline(always)]
    fn scaled<S: Simd>(values: S::F, by: S::F) -> S::F {
        S::div(values, by)
    }
}

impl Scaled for PowerOfTwo {
    #[inline(always)]
    fn by(scale: f32) -> f32 {
        1.0 / scale
    }

    #[inline(always)]
    fn scaled<S: Simd>(values: S::F, by: S::F) -> S::F {
        S::mul(values, by)
    }
}

impl<F: Minifloat, Step: Round, D: Scaled> Coder for Mini<F, Step, D> {
    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F, sums: &mut Registers<S>, _: &mut Watch<S>) -> Coded<S> {
        let exact = Step::lanes::<S>(D::scaled::<S>(values, S::splat(self.by)));
        sums.count(S::count_outside(exact, S::splat(-F::MAX), S::splat(F::MAX)));
        let (codes, rounded) = minifloat::encode::<S, F>(exact);
        Coded { codes, decoded: S::mul(rounded, S::splat(self.scale)) }
    }
}

/// Two instructions, and a number within the limits even for NaN.
#[inline(always)]
fn clamp<S: Simd>(values: S::F, low: S::F, high: S::F) -> S::F {
    S::min(S::max(values, low), high)
}
