//! What one group does to its elements: a register of elements to codes and the values that they stand for.

use std::marker::PhantomData;

use crate::{
    Packing,
    half::Round,
    minifloat::{self, Minifloat},
    simd::Simd,
};

/// What elements become.
pub(crate) struct Coded<S: Simd> {
    /// In the lowest byte of each lane.
    pub(crate) codes: S::I,
    /// The values that the codes stand for.
    pub(crate) decoded: S::F,
    /// The elements, or their magnitudes, in codes; and the nearest of them within the codes' range.
    pub(crate) exact: S::F,
    pub(crate) near: S::F,
}

/// What one group does to its elements.
pub(crate) trait Coder {
    /// Whether of two codes of four bits the first is the upper half of a byte, and then the code that fills up the last.
    const HIGH_FIRST: Option<u8> = None;

    /// Codes elements.
    fn code<S: Simd>(&self, values: S::F) -> Coded<S>;

    /// The value that one of these codes stands for: the same bits as above.
    fn decode(&self, code: u8) -> f32;
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

    /// The integer that a code stands for.
    fn whole(&self, code: u8) -> f32 {
        let offset = self.shift - ROUNDING;
        if offset == 0.0 { f32::from(code as i8) } else { f32::from(code) - offset }
    }

    #[inline(always)]
    fn lanes<S: Simd>(&self) -> Limits<S::F> {
        Limits { low: S::splat(self.low), high: S::splat(self.high), shift: S::splat(self.shift) }
    }
}

/// 1.5 * 2^23: f32 numbers of that size are integers.
pub(crate) const ROUNDING: f32 = 12_582_912.0;

/// Integers whose zero is zero.
///
/// By division: with AVX2 or AVX-512 it takes no longer than what else is done to an element. The reciprocal, with a
/// watch for products near to half-way between two codes, was no faster, and slower for bf16, where many are half-way.
pub(crate) struct Symmetric<Step> {
    scale: f32,
    limits: Limits<f32>,
    step: PhantomData<Step>,
}

impl<Step> Symmetric<Step> {
    #[inline(always)]
    pub(crate) fn new(scale: f32, limits: Limits<f32>) -> Symmetric<Step> {
        Symmetric { scale, limits, step: PhantomData }
    }
}

impl<Step: Round> Coder for Symmetric<Step> {
    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F) -> Coded<S> {
        let Limits { low, high, shift } = self.limits.lanes::<S>();
        let scale = S::splat(self.scale);
        let exact = Step::lanes::<S>(S::div(values, scale));
        let near = clamp::<S>(exact, low, high);
        let sum = S::add(near, shift);
        Coded { codes: S::bits(sum), decoded: S::mul(S::sub(sum, shift), scale), exact, near }
    }

    fn decode(&self, code: u8) -> f32 {
        self.limits.whole(code) * self.scale
    }
}

/// Integers with a zero point.
pub(crate) struct Asymmetric<Step> {
    scale: f32,
    zero_point: f32,
    limits: Limits<f32>,
    step: PhantomData<Step>,
}

impl<Step> Asymmetric<Step> {
    #[inline(always)]
    pub(crate) fn new(scale: f32, zero_point: i32, limits: Limits<f32>) -> Asymmetric<Step> {
        Asymmetric { scale, zero_point: zero_point as f32, limits, step: PhantomData }
    }
}

impl<Step: Round> Coder for Asymmetric<Step> {
    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F) -> Coded<S> {
        let Limits { low, high, shift } = self.limits.lanes::<S>();
        let (scale, zero_point) = (S::splat(self.scale), S::splat(self.zero_point));
        let exact = Step::lanes::<S>(S::add(Step::lanes::<S>(S::div(values, scale)), zero_point));
        let near = clamp::<S>(exact, low, high);
        let sum = S::add(near, shift);
        let decoded = S::mul(S::sub(S::sub(sum, shift), zero_point), scale);
        Coded { codes: S::bits(sum), decoded, exact, near }
    }

    fn decode(&self, code: u8) -> f32 {
        (self.limits.whole(code) - self.zero_point) * self.scale
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
pub(crate) struct Multiplied;

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

impl Scaled for Multiplied {
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
    fn code<S: Simd>(&self, values: S::F) -> Coded<S> {
        let exact = Step::lanes::<S>(D::scaled::<S>(values, S::splat(self.by)));
        let (codes, rounded) = minifloat::encode::<S, F>(exact);
        let exact = S::abs(exact);
        let near = S::min(exact, S::splat(F::MAX));
        Coded { codes, decoded: S::mul(rounded, S::splat(self.scale)), exact, near }
    }

    fn decode(&self, code: u8) -> f32 {
        minifloat::decode_one::<F>(code) * self.scale
    }
}

/// Two instructions, and a number within the limits even for NaN.
#[inline(always)]
fn clamp<S: Simd>(values: S::F, low: S::F, high: S::F) -> S::F {
    S::min(S::max(values, low), high)
}
