//! A scale for codes around zero, each of which is tried alone.

use super::{Found, Rows, greatest_signed, load, nearest, store};
use crate::simd::Simd;

/// ggml's `make_q3_quants`: codes from `-half` to `half - 1`, each changed alone where that helps, up to five times over.
#[inline(always)]
pub(in crate::block) fn descended<R: Simd, const N: usize>(rows: &Rows<N>, used: usize, half: i32) -> Found<N> {
    let mut found = Found::new();
    for from in (0..used).step_by(R::W) {
        descended_lanes::<R, N>(rows, from, half, &mut found);
    }
    found
}

#[inline(always)]
fn descended_lanes<R: Simd, const N: usize>(rows: &Rows<N>, from: usize, half: i32, found: &mut Found<N>) {
    let (zero, infinity) = (R::splat(0.0), R::splat(f32::INFINITY));
    let x = load::<R, N>(rows, from);
    let (signed, amax) = greatest_signed::<R, N>(&x);
    let by = R::div(R::splat(-half as f32), signed);
    // Of each element its code, and what it adds to the sums of x·l and of l², weighted by x².
    let (mut codes, mut own_xl, mut own_l2) = (x, x, x);
    let (mut xl, mut l2) = (zero, zero);
    for i in 0..N {
        let code = nearest::<R>(R::mul(by, x[i]), -half, half - 1);
        (codes[i], own_xl[i], own_l2[i]) = (code, xl_of::<R>(x[i], code), l2_of::<R>(x[i], code));
        (xl, l2) = (R::add(xl, own_xl[i]), R::add(l2, own_l2[i]));
    }
    for _ in 0..5 {
        let mut is_changed = false;
        for i in 0..N {
            let (x, code) = (x[i], codes[i]);
            let (others_xl, others_l2) = (R::sub(xl, own_xl[i]), R::sub(l2, own_l2[i]));
            let new = nearest::<R>(R::div(R::mul(x, others_l2), others_xl), -half, half - 1);
            // A branch that is mostly foreseen: then the next element need not wait for this one's division.
            if R::count_differing(new, code) == 0 {
                continue;
            }
            let (new_own_xl, new_own_l2) = (xl_of::<R>(x, new), l2_of::<R>(x, new));
            let (new_xl, new_l2) = (R::add(others_xl, new_own_xl), R::add(others_l2, new_own_l2));
            // All of: others_xl above zero, the code another, new_l2 above zero, and a gain.
            let gained = R::mul(R::mul(new_xl, new_xl), l2);
            let bound = R::mul(R::mul(xl, xl), new_l2);
            let bound = R::select_below(zero, others_xl, bound, infinity);
            let bound = R::select_below(zero, new_l2, bound, infinity);
            let bound = R::select_below(zero, R::abs(R::sub(new, code)), bound, infinity);
            codes[i] = R::select_below(bound, gained, new, code);
            own_xl[i] = R::select_below(bound, gained, new_own_xl, own_xl[i]);
            own_l2[i] = R::select_below(bound, gained, new_own_l2, own_l2[i]);
            xl = R::select_below(bound, gained, new_xl, xl);
            l2 = R::select_below(bound, gained, new_l2, l2);
            is_changed |= R::count_differing(codes[i], code) != 0;
        }
        // Where nothing changed, nothing would.
        if !is_changed {
            break;
        }
    }
    for code in &mut codes {
        *code = R::add(*code, R::splat(half as f32));
    }
    let scale = R::select_below(zero, l2, R::div(xl, l2), zero);
    store::<R, N>(found, from, amax, scale, &codes);
}

/// What an element adds to the sum of x·l, weighted by x².
#[inline(always)]
fn xl_of<R: Simd>(x: R::F, code: R::F) -> R::F {
    R::mul(R::mul(R::mul(x, x), x), code)
}

/// What it adds to the sum of l².
#[inline(always)]
fn l2_of<R: Simd>(x: R::F, code: R::F) -> R::F {
    R::mul(R::mul(R::mul(x, x), code), code)
}
