//! Sums of |x - y|, for [`Search::Hqq`](super::Search::Hqq) where nothing is rounded to a narrower type: two of them at a time, and in units of
//! the scale, so that the quotients of two zero points under one scale are found and rounded once.
//!
//! An element is multiplied by 1 / scale here, which is off by a rounding: what the codes lose is known to about a ten-thousandth of a step.

use super::MOST;
use crate::{
    Qparams,
    coder::ROUNDING,
    element::{LANES, Loose},
    simd::Simd,
};

/// Whether the reciprocals of all scales are as exact as they; others are left to division.
#[inline(always)]
pub(super) fn have_reciprocals(params: &[Qparams]) -> bool {
    let mut all = true;
    for params in params {
        all &= (1e-30..=1e30).contains(&params.scale);
    }
    all
}

/// What is tried for a group: reciprocals of scales, and the codes less the zero point between which a scale has values; and room for the
/// sums of a piece under each. One for many groups: nothing is cleared between them.
pub(super) struct Reciprocals {
    count: usize,
    reciprocals: [f32; MOST],
    lows: [f32; MOST],
    highs: [f32; MOST],
    sums: [[f32; LANES]; MOST],
}

impl Reciprocals {
    #[inline(always)]
    pub(super) fn new() -> Reciprocals {
        let none = [0.0; MOST];
        Reciprocals { count: 0, reciprocals: none, lows: none, highs: none, sums: [[0.0; LANES]; MOST] }
    }

    /// Those of a group.
    #[inline(always)]
    pub(super) fn fill(&mut self, params: &[Qparams], (low, high): (f32, f32)) {
        self.count = params.len();
        for (at, params) in params.iter().enumerate() {
            let zero = params.zero_point as f32;
            self.reciprocals[at] = 1.0 / params.scale;
            self.lows[at] = low - zero;
            self.highs[at] = high - zero;
        }
    }

    /// Adds to `errors` what a piece's elements lose under each of `params`, by which `self` was filled.
    #[inline(always)]
    pub(super) fn add<R: Simd, V: Loose>(&mut self, values: &[V], params: &[Qparams], errors: &mut [f64]) {
        let (sixteens, rest) = values.as_chunks::<LANES>();
        // Zeros are coded as zero and add nothing.
        let mut last = [V::ZERO; LANES];
        last[..rest.len()].copy_from_slice(rest);
        let parts = [sixteens, std::slice::from_ref(&last)];
        let parts_used = if rest.is_empty() { 1 } else { 2 };
        for at in (0..self.count).step_by(2) {
            // Two registers at a time, where sixteen elements are more than one.
            let step = if R::W < LANES { 2 * R::W } else { R::W };
            for from in (0..LANES).step_by(step) {
                let mut sums = [[R::splat(0.0); 2]; 2];
                // In loops, so that each is compiled once.
                for sixteens in &parts[..parts_used] {
                    if self.reciprocals[at] == self.reciprocals[at + 1] {
                        self.both::<R, V>(at, sixteens, from, &mut sums);
                        continue;
                    }
                    for (which, sums) in sums.iter_mut().enumerate() {
                        self.one::<R, V>(at + which, sixteens, from, sums);
                    }
                }
                let [a, b] = sums;
                R::store(a[0], &mut self.sums[at], from);
                R::store(b[0], &mut self.sums[at + 1], from);
                if R::W < LANES {
                    R::store(a[1], &mut self.sums[at], from + R::W);
                    R::store(b[1], &mut self.sums[at + 1], from + R::W);
                }
            }
        }
        // Afterwards, side by side: one sum takes as long as a pair's elements.
        for ((sums, params), error) in self.sums.iter().zip(params).zip(errors) {
            *error += f64::from(R::sum(sums)) * f64::from(params.scale);
        }
    }

    /// Of one scale and two zero points.
    #[inline(always)]
    fn both<R: Simd, V: Loose>(&self, at: usize, sixteens: &[[V; LANES]], from: usize, sums: &mut [[R::F; 2]; 2]) {
        let reciprocal = R::splat(self.reciprocals[at]);
        let (low_a, high_a) = (R::splat(self.lows[at]), R::splat(self.highs[at]));
        let (low_b, high_b) = (R::splat(self.lows[at + 1]), R::splat(self.highs[at + 1]));
        let [[mut a, mut next_a], [mut b, mut next_b]] = *sums;
        for sixteen in sixteens {
            let exact = R::mul(V::lanes::<R>(sixteen, from), reciprocal);
            let whole = rounded::<R>(exact);
            a = R::add(a, R::abs(R::sub(exact, R::min(R::max(whole, low_a), high_a))));
            b = R::add(b, R::abs(R::sub(exact, R::min(R::max(whole, low_b), high_b))));
            if R::W < LANES {
                let exact = R::mul(V::lanes::<R>(sixteen, from + R::W), reciprocal);
                let whole = rounded::<R>(exact);
                next_a = R::add(next_a, R::abs(R::sub(exact, R::min(R::max(whole, low_a), high_a))));
                next_b = R::add(next_b, R::abs(R::sub(exact, R::min(R::max(whole, low_b), high_b))));
            }
        }
        *sums = [[a, next_a], [b, next_b]];
    }

    #[inline(always)]
    fn one<R: Simd, V: Loose>(&self, at: usize, sixteens: &[[V; LANES]], from: usize, sums: &mut [R::F; 2]) {
        let reciprocal = R::splat(self.reciprocals[at]);
        let (low, high) = (R::splat(self.lows[at]), R::splat(self.highs[at]));
        let [mut sum, mut next] = *sums;
        for sixteen in sixteens {
            let exact = R::mul(V::lanes::<R>(sixteen, from), reciprocal);
            sum = R::add(sum, R::abs(R::sub(exact, R::min(R::max(rounded::<R>(exact), low), high))));
            if R::W < LANES {
                let exact = R::mul(V::lanes::<R>(sixteen, from + R::W), reciprocal);
                next = R::add(next, R::abs(R::sub(exact, R::min(R::max(rounded::<R>(exact), low), high))));
            }
        }
        *sums = [sum, next];
    }
}

/// The nearest integer, ties to even, of magnitudes below 2^22; of others one that is beyond all codes too.
#[inline(always)]
fn rounded<R: Simd>(exact: R::F) -> R::F {
    let shift = R::splat(ROUNDING);
    R::sub(R::add(exact, shift), shift)
}
