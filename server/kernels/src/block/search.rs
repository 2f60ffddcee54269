//! ggml's searches for the scale of a few elements, sixteen groups side by side.
//!
//! Each lane is one group, so that its sums are added in the order of its elements, as ggml adds them, at any register's width. A
//! lane's choices are selections; what ggml skips is computed and thrown away.

mod affine;
mod centred;
mod descended;
mod positive;
mod uneven;

use crate::{coder::ROUNDING, element::LANES, simd::Simd};

pub(super) use affine::{Affine, Weights, affine};
pub(super) use centred::centred;
pub(super) use descended::descended;
pub(super) use positive::positive;
pub(super) use uneven::{nearest_of, uneven};

/// Row `i` holds the element `i` of each group.
pub(super) type Rows<const N: usize> = [[f32; LANES]; N];

/// Groups, a lane each.
pub(super) struct Lanes<'a, const N: usize> {
    /// As they came, at most sixteen.
    pub(super) groups: &'a [[f32; N]],
    pub(super) rows: &'a Rows<N>,
    /// Where there is an importance.
    pub(super) weights: &'a Rows<N>,
}

/// What was found for each group.
pub(super) struct Found<const N: usize> {
    pub(super) scales: [f32; LANES],
    /// What is taken away from the decoded values, not below zero; zero where nothing is.
    pub(super) minima: [f32; LANES],
    /// Codes are the nearest to `(x - origin) * by`, unless all are zero.
    pub(super) by: [f32; LANES],
    pub(super) origins: [f32; LANES],
    /// The sums of the weights, where they are given.
    pub(super) weights: [f32; LANES],
    /// Codes under these, as rows.
    pub(super) codes: [[u8; LANES]; N],
}

impl<const N: usize> Found<N> {
    pub(super) fn new() -> Found<N> {
        let zeros = [0.0; LANES];
        Found { scales: zeros, minima: zeros, by: zeros, origins: zeros, weights: zeros, codes: [[0; LANES]; N] }
    }
}

/// Below this, ggml takes a group for zeros.
pub(super) const LEAST_AMAX: f32 = 1e-15;

/// The nearest integer from `low` to `high`, ties to even: by the low bits of a sum, as ggml has it also where the sum holds no integer.
#[inline(always)]
fn nearest<R: Simd>(value: R::F, low: i32, high: i32) -> R::F {
    let biased = |whole: i32| R::splat_i((0x40_0000 + whole) as u32);
    let bits = R::and(R::bits(R::add(value, R::splat(ROUNDING))), R::splat_i(0x7f_ffff));
    let held = R::min_i(R::max_i(bits, biased(low)), biased(high));
    // The exponent of ROUNDING, whose mantissa is 0x40_0000.
    R::sub(R::number(R::or(held, R::splat_i(0x4b00_0000))), R::splat(ROUNDING))
}

/// The same of one number, not held within bounds.
#[inline(always)]
pub(super) fn nearest_one(value: f32) -> i32 {
    ((value + ROUNDING).to_bits() & 0x7f_ffff) as i32 - 0x40_0000
}

#[inline(always)]
fn load<R: Simd, const N: usize>(rows: &Rows<N>, from: usize) -> [R::F; N] {
    let mut loaded = [R::splat(0.0); N];
    for i in 0..N {
        loaded[i] = R::load(&rows[i], from);
    }
    loaded
}

#[inline(always)]
fn negated<R: Simd>(value: R::F) -> R::F {
    R::number(R::xor(R::bits(value), R::splat_i(0x8000_0000)))
}

/// The first element of the greatest magnitude in each lane, and that magnitude.
#[inline(always)]
fn greatest_signed<R: Simd, const N: usize>(x: &[R::F; N]) -> (R::F, R::F) {
    let (mut amax, mut signed) = (R::splat(0.0), R::splat(0.0));
    for x in x {
        let magnitude = R::abs(*x);
        signed = R::select_below(amax, magnitude, *x, signed);
        amax = R::select_below(amax, magnitude, magnitude, amax);
    }
    (signed, amax)
}

/// Stores scales and codes, but zeros where a group is taken for zeros.
#[inline(always)]
fn store<R: Simd, const N: usize>(found: &mut Found<N>, from: usize, amax: R::F, scale: R::F, codes: &[R::F; N]) {
    let (zero, least) = (R::splat(0.0), R::splat(LEAST_AMAX));
    R::store(R::select_below(amax, least, zero, scale), &mut found.scales, from);
    #[allow(clippy::needless_range_loop, reason = "`zip` is a call here")]
    for i in 0..N {
        R::store_bytes(R::truncated(R::select_below(amax, least, zero, codes[i])), &mut found.codes[i], from);
    }
}
