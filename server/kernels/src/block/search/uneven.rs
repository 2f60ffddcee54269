//! A scale for values that are not evenly spaced.

use super::{Found, LEAST_AMAX, Rows, greatest_signed, load, negated};
use crate::simd::Simd;

/// ggml's `quantize_row_iq4_nl_impl`: a scale for values that are not evenly spaced. `tries` on each side of the first division. Weights
/// are x², if none are given. Codes are left to whoever writes them.
#[inline(always)]
pub(in crate::block) fn uneven<R: Simd, const N: usize>(
    rows: &Rows<N>,
    given: Option<&Rows<N>>,
    used: usize,
    values: &[i8; 16],
    tries: i8,
) -> Found<N> {
    let mut found = Found::new();
    for from in (0..used).step_by(R::W) {
        uneven_lanes::<R, N>(rows, given, from, values, tries, &mut found);
    }
    found
}

#[inline(always)]
fn uneven_lanes<R: Simd, const N: usize>(
    rows: &Rows<N>,
    given: Option<&Rows<N>>,
    from: usize,
    values: &[i8; 16],
    tries: i8,
    found: &mut Found<N>,
) {
    let (zero, infinity) = (R::splat(0.0), R::splat(f32::INFINITY));
    let first = f32::from(values[0]);
    let x = load::<R, N>(rows, from);
    let w = given.map(|given| load::<R, N>(given, from));
    let (signed, amax) = greatest_signed::<R, N>(&x);
    let scale = R::div(negated::<R>(signed), R::splat(first));
    let (qx, q2) = uneven_moments::<R, N>(&x, w.as_ref(), R::div(R::splat(1.0), scale), values);
    let mut scale = R::select_below(zero, q2, R::div(qx, q2), zero);
    let mut best = R::mul(scale, qx);
    for step in -tries..=tries {
        let by = R::div(R::splat(f32::from(step) + first), signed);
        let (qx, q2) = uneven_moments::<R, N>(&x, w.as_ref(), by, values);
        let bound = R::select_below(zero, q2, R::mul(best, q2), infinity);
        let gained = R::mul(qx, qx);
        let this_scale = R::div(qx, q2);
        scale = R::select_below(bound, gained, this_scale, scale);
        best = R::select_below(bound, gained, R::mul(this_scale, qx), best);
    }
    R::store(R::select_below(amax, R::splat(LEAST_AMAX), zero, scale), &mut found.scales, from);
}

#[inline(always)]
fn uneven_moments<R: Simd, const N: usize>(
    x: &[R::F; N],
    w: Option<&[R::F; N]>,
    by: R::F,
    values: &[i8; 16],
) -> (R::F, R::F) {
    let (mut qx, mut q2) = (R::splat(0.0), R::splat(0.0));
    for i in 0..N {
        let x = x[i];
        let (_, value) = nearest_of::<R>(R::mul(by, x), values);
        let weight = match w {
            Some(w) => w[i],
            None => R::mul(x, x),
        };
        let weighted = R::mul(weight, value);
        qx = R::add(qx, R::mul(weighted, x));
        q2 = R::add(q2, R::mul(weighted, value));
    }
    (qx, q2)
}

/// The index of the nearest of rising values, and that value; of two the greater.
#[inline(always)]
pub(in crate::block) fn nearest_of<R: Simd>(value: R::F, values: &[i8; 16]) -> (R::F, R::F) {
    let (mut index, mut found) = (R::splat(0.0), R::splat(f32::from(values[0])));
    for at in 1..16 {
        let (low, high) = (f32::from(values[at - 1]), f32::from(values[at]));
        let middle = R::splat((low + high) * 0.5);
        index = R::select_at_most(middle, value, R::splat(at as f32), index);
        found = R::select_at_most(middle, value, R::splat(high), found);
    }
    (index, found)
}
