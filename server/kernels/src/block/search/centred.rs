//! A scale for codes around zero, the best of a few divisions.

use super::{Found, Rows, greatest_signed, load, nearest, store};
use crate::simd::Simd;

/// ggml's `make_qx_quants`: codes from `-half` to `half - 1`, of nineteen divisions that of least error. Weights are x², if none are
/// given.
#[inline(always)]
pub(in crate::block) fn centred<R: Simd, const N: usize>(
    rows: &Rows<N>,
    given: Option<&Rows<N>>,
    used: usize,
    half: i32,
) -> Found<N> {
    let mut found = Found::new();
    for from in (0..used).step_by(R::W) {
        centred_lanes::<R, N>(rows, given, from, half, &mut found);
    }
    found
}

#[inline(always)]
fn centred_lanes<R: Simd, const N: usize>(
    rows: &Rows<N>,
    given: Option<&Rows<N>>,
    from: usize,
    half: i32,
    found: &mut Found<N>,
) {
    let (zero, infinity) = (R::splat(0.0), R::splat(f32::INFINITY));
    let x = load::<R, N>(rows, from);
    let w = match given {
        Some(given) => load::<R, N>(given, from),
        None => product::<R, N>(&x, &x),
    };
    let wx = product::<R, N>(&w, &x);
    let (signed, amax) = greatest_signed::<R, N>(&x);
    let mut by = R::div(R::splat(-half as f32), signed);
    let (xl, l2) = moments::<R, N>(&x, &w, &wx, by, half);
    let mut scale = R::select_at_most(l2, zero, zero, R::div(xl, l2));
    let mut best = R::mul(scale, xl);
    for step in (-9i8..=9).filter(|step| *step != 0) {
        let division = -(half as f32 + 0.1 * f32::from(step));
        let this_by = R::div(R::splat(division), signed);
        let (xl, l2) = moments::<R, N>(&x, &w, &wx, this_by, half);
        let bound = R::select_below(zero, l2, R::mul(best, l2), infinity);
        let gained = R::mul(xl, xl);
        let this_scale = R::div(xl, l2);
        by = R::select_below(bound, gained, this_by, by);
        scale = R::select_below(bound, gained, this_scale, scale);
        best = R::select_below(bound, gained, R::mul(this_scale, xl), best);
    }
    let mut codes = x;
    for code in &mut codes {
        *code = R::add(nearest::<R>(R::mul(by, *code), -half, half - 1), R::splat(half as f32));
    }
    store::<R, N>(found, from, amax, scale, &codes);
    R::store(by, &mut found.by, from);
    if given.is_some() {
        let mut sum = zero;
        for w in w {
            sum = R::add(sum, w);
        }
        R::store(sum, &mut found.weights, from);
    }
}

#[inline(always)]
fn product<R: Simd, const N: usize>(a: &[R::F; N], b: &[R::F; N]) -> [R::F; N] {
    let mut product = *a;
    for (product, b) in product.iter_mut().zip(b) {
        *product = R::mul(*product, *b);
    }
    product
}

/// The weighted sums of x·l and of l².
#[inline(always)]
fn moments<R: Simd, const N: usize>(x: &[R::F; N], w: &[R::F; N], wx: &[R::F; N], by: R::F, half: i32) -> (R::F, R::F) {
    let (mut xl, mut l2) = (R::splat(0.0), R::splat(0.0));
    for i in 0..N {
        let code = nearest::<R>(R::mul(by, x[i]), -half, half - 1);
        xl = R::add(xl, R::mul(wx[i], code));
        l2 = R::add(l2, R::mul(R::mul(w[i], code), code));
    }
    (xl, l2)
}
