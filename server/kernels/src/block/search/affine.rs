//! A scale and a minimum, by least squares.

use super::{Found, Rows, load, nearest, negated};
use crate::simd::Simd;

/// How errors are weighted and measured.
#[derive(Clone, Copy)]
pub(in crate::block) enum Weights {
    /// |x|, and errors as they are.
    Magnitude,
    /// |x| and the root of the mean square of x, and squares of errors.
    MagnitudeAndMean,
    /// Given for each, and squares of errors.
    Given,
}

/// A search for a scale and a minimum: least squares for each of a few divisions of the range.
#[derive(Clone, Copy)]
pub(in crate::block) struct Affine {
    /// The greatest code.
    pub(in crate::block) max: u8,
    pub(in crate::block) start: f32,
    pub(in crate::block) step: f32,
    pub(in crate::block) steps: u8,
    pub(in crate::block) weights: Weights,
}

/// ggml's `make_qkx2_quants`, and `make_qkx3_quants` with weights that are given: codes from 0 to `max`, of which zero is at or below zero.
#[inline(always)]
pub(in crate::block) fn affine<R: Simd, const N: usize>(
    rows: &Rows<N>,
    given: &Rows<N>,
    used: usize,
    rule: Affine,
) -> Found<N> {
    let mut found = Found::new();
    for from in (0..used).step_by(R::W) {
        affine_lanes::<R, N>(rows, given, from, rule, &mut found);
    }
    found
}

#[inline(always)]
fn affine_lanes<R: Simd, const N: usize>(
    rows: &Rows<N>,
    given: &Rows<N>,
    from: usize,
    rule: Affine,
    found: &mut Found<N>,
) {
    let (zero, infinity) = (R::splat(0.0), R::splat(f32::INFINITY));
    let (max, high) = (f32::from(rule.max), i32::from(rule.max));
    let x = load::<R, N>(rows, from);
    let w = match rule.weights {
        Weights::Given => load::<R, N>(given, from),
        kind => weights::<R, N>(&x, kind),
    };
    let is_absolute = matches!(rule.weights, Weights::Magnitude);

    let (mut least, mut most) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (w[0], R::mul(w[0], x[0]));
    for i in 1..N {
        (least, most) = (R::min(x[i], least), R::max(x[i], most));
        sum_w = R::add(sum_w, w[i]);
        sum_x = R::add(sum_x, R::mul(w[i], x[i]));
    }
    least = R::select_below(zero, least, zero, least);

    let mut by = R::div(R::splat(max), R::sub(most, least));
    let mut scale = R::div(R::splat(1.0), by);
    // The codes that are best so far: those of `x - origin` times `by`.
    let mut origin = least;
    let mut best = zero;
    for i in 0..N {
        let code = nearest::<R>(R::mul(by, R::sub(x[i], least)), 0, high);
        best = R::add(best, error::<R>(x[i], w[i], code, scale, least, is_absolute));
    }
    let mut codes = [zero; N];
    for step in 0..=rule.steps {
        let division = rule.start + rule.step * f32::from(step) + max;
        let this_by = R::div(R::splat(division), R::sub(most, least));
        let (mut sum_l, mut sum_l2, mut sum_xl) = (zero, zero, zero);
        for i in 0..N {
            let code = nearest::<R>(R::mul(this_by, R::sub(x[i], least)), 0, high);
            codes[i] = code;
            let weighted = R::mul(w[i], code);
            sum_l = R::add(sum_l, weighted);
            sum_l2 = R::add(sum_l2, R::mul(weighted, code));
            sum_xl = R::add(sum_xl, R::mul(weighted, x[i]));
        }
        let determinant = R::sub(R::mul(sum_w, sum_l2), R::mul(sum_l, sum_l));
        let this_scale = R::div(R::sub(R::mul(sum_w, sum_xl), R::mul(sum_x, sum_l)), determinant);
        let this_least = R::div(R::sub(R::mul(sum_l2, sum_x), R::mul(sum_l, sum_xl)), determinant);
        let this_scale = R::select_below(zero, this_least, R::div(sum_xl, sum_l2), this_scale);
        let this_least = R::select_below(zero, this_least, zero, this_least);
        let mut sum = zero;
        for i in 0..N {
            sum = R::add(sum, error::<R>(x[i], w[i], codes[i], this_scale, this_least, is_absolute));
        }
        // Where the determinant is not above zero, there is no solution.
        let sum = R::select_below(zero, determinant, sum, infinity);
        by = R::select_below(sum, best, this_by, by);
        origin = R::select_below(sum, best, least, origin);
        scale = R::select_below(sum, best, this_scale, scale);
        least = R::select_below(sum, best, this_least, least);
        best = R::select_below(sum, best, sum, best);
    }
    R::store(scale, &mut found.scales, from);
    R::store(negated::<R>(least), &mut found.minima, from);
    R::store(by, &mut found.by, from);
    R::store(origin, &mut found.origins, from);
    R::store(sum_w, &mut found.weights, from);
    for (x, codes) in x.iter().zip(&mut found.codes) {
        let code = nearest::<R>(R::mul(by, R::sub(*x, origin)), 0, high);
        R::store_bytes(R::truncated(code), codes, from);
    }
}

/// What one element adds to a group's error.
#[inline(always)]
fn error<R: Simd>(x: R::F, w: R::F, code: R::F, scale: R::F, least: R::F, is_absolute: bool) -> R::F {
    let off = R::sub(R::add(R::mul(scale, code), least), x);
    R::mul(w, if is_absolute { R::abs(off) } else { R::mul(off, off) })
}

#[inline(always)]
fn weights<R: Simd, const N: usize>(x: &[R::F; N], kind: Weights) -> [R::F; N] {
    let mut mean = R::splat(0.0);
    if let Weights::MagnitudeAndMean = kind {
        for x in x {
            mean = R::add(mean, R::mul(*x, *x));
        }
        mean = R::sqrt(R::div(mean, R::splat(N as f32)));
    }
    let mut weights = *x;
    for weight in &mut weights {
        *weight = match kind {
            Weights::Magnitude => R::abs(*weight),
            Weights::MagnitudeAndMean => R::add(mean, R::abs(*weight)),
            Weights::Given => *weight,
        };
    }
    weights
}
