//! ggml's searches for the scale of a few elements, sixteen groups side by side.
//!
//! Each lane is one group, so that its sums are added in the order of its elements, as ggml adds them, at any register's width. A
//! lane's choices are selections; what ggml skips is computed and thrown away.

use crate::{coder::ROUNDING, element::LANES, simd::Simd};

/// Row `i` holds the element `i` of each group.
pub(super) type Rows<const N: usize> = [[f32; LANES]; N];

/// What was found for each group.
pub(super) struct Found<const N: usize> {
    pub(super) scales: [f32; LANES],
    /// What is taken away from the decoded values, not below zero; zero where nothing is.
    pub(super) minima: [f32; LANES],
    /// Codes under these, as rows.
    pub(super) codes: [[u8; LANES]; N],
}

impl<const N: usize> Found<N> {
    pub(super) fn new() -> Found<N> {
        Found { scales: [0.0; LANES], minima: [0.0; LANES], codes: [[0; LANES]; N] }
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
pub(super) fn nearest_one(value: f32) -> i32 {
    ((value + ROUNDING).to_bits() & 0x7f_ffff) as i32 - 0x40_0000
}

#[inline(always)]
fn load<R: Simd, const N: usize>(rows: &Rows<N>, from: usize) -> [R::F; N] {
    let mut loaded = [R::splat(0.0); N];
    for (register, row) in loaded.iter_mut().zip(rows) {
        *register = R::load(row, from);
    }
    loaded
}

#[inline(always)]
fn negated<R: Simd>(value: R::F) -> R::F {
    R::sub(R::splat(0.0), value)
}

/// How errors are weighted and measured.
#[derive(Clone, Copy)]
pub(super) enum Weights {
    /// |x|, and errors as they are.
    Magnitude,
    /// |x| and the root of the mean square of x, and squares of errors.
    MagnitudeAndMean,
}

/// A search for a scale and a minimum: least squares for each of a few divisions of the range.
#[derive(Clone, Copy)]
pub(super) struct Affine {
    /// The greatest code.
    pub(super) max: u8,
    pub(super) start: f32,
    pub(super) steps: u8,
    pub(super) weights: Weights,
}

/// ggml's `make_qkx2_quants`: codes from 0 to `max`, of which zero is at or below zero.
#[inline(always)]
pub(super) fn affine<R: Simd, const N: usize>(rows: &Rows<N>, used: usize, rule: Affine) -> Found<N> {
    let mut found = Found::new();
    for from in (0..used).step_by(R::W) {
        affine_lanes::<R, N>(rows, from, rule, &mut found);
    }
    found
}

#[inline(always)]
fn affine_lanes<R: Simd, const N: usize>(rows: &Rows<N>, from: usize, rule: Affine, found: &mut Found<N>) {
    let (zero, infinity) = (R::splat(0.0), R::splat(f32::INFINITY));
    let (max, high) = (f32::from(rule.max), i32::from(rule.max));
    let x = load::<R, N>(rows, from);
    let w = weights::<R, N>(&x, rule.weights);
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
        let division = rule.start + 0.1 * f32::from(step) + max;
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
        };
    }
    weights
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
    for (code, out) in codes.iter().zip(&mut found.codes) {
        R::store_bytes(R::truncated(R::select_below(amax, least, zero, *code)), out, from);
    }
}

/// ggml's `make_qx_quants` with weights x²: codes from `-half` to `half - 1`, of nineteen divisions that of least error.
#[inline(always)]
pub(super) fn centred<R: Simd, const N: usize>(rows: &Rows<N>, used: usize, half: i32) -> Found<N> {
    let mut found = Found::new();
    for from in (0..used).step_by(R::W) {
        centred_lanes::<R, N>(rows, from, half, &mut found);
    }
    found
}

#[inline(always)]
fn centred_lanes<R: Simd, const N: usize>(rows: &Rows<N>, from: usize, half: i32, found: &mut Found<N>) {
    let (zero, infinity) = (R::splat(0.0), R::splat(f32::INFINITY));
    let x = load::<R, N>(rows, from);
    let (signed, amax) = greatest_signed::<R, N>(&x);
    let mut by = R::div(R::splat(-half as f32), signed);
    let (xl, l2) = moments::<R, N>(&x, by, half);
    let mut scale = R::select_at_most(l2, zero, zero, R::div(xl, l2));
    let mut best = R::mul(scale, xl);
    for step in (-9i8..=9).filter(|step| *step != 0) {
        let division = -(half as f32 + 0.1 * f32::from(step));
        let this_by = R::div(R::splat(division), signed);
        let (xl, l2) = moments::<R, N>(&x, this_by, half);
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
}

/// The sums of x·l and of l², weighted by x².
#[inline(always)]
fn moments<R: Simd, const N: usize>(x: &[R::F; N], by: R::F, half: i32) -> (R::F, R::F) {
    let (mut xl, mut l2) = (R::splat(0.0), R::splat(0.0));
    for x in x {
        let code = nearest::<R>(R::mul(by, *x), -half, half - 1);
        xl = R::add(xl, xl_of::<R>(*x, code));
        l2 = R::add(l2, l2_of::<R>(*x, code));
    }
    (xl, l2)
}

/// ggml's `make_q3_quants`: codes from `-half` to `half - 1`, each changed alone where that helps, up to five times over.
#[inline(always)]
pub(super) fn descended<R: Simd, const N: usize>(rows: &Rows<N>, used: usize, half: i32) -> Found<N> {
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

/// ggml's `quantize_row_iq4_nl_impl` with weights x²: a scale for values that are not evenly spaced. `tries` on each side of the
/// first division. Codes are left to whoever writes them.
#[inline(always)]
pub(super) fn uneven<R: Simd, const N: usize>(rows: &Rows<N>, used: usize, values: &[i8; 16], tries: i8) -> Found<N> {
    let mut found = Found::new();
    for from in (0..used).step_by(R::W) {
        uneven_lanes::<R, N>(rows, from, values, tries, &mut found);
    }
    found
}

#[inline(always)]
fn uneven_lanes<R: Simd, const N: usize>(
    rows: &Rows<N>,
    from: usize,
    values: &[i8; 16],
    tries: i8,
    found: &mut Found<N>,
) {
    let (zero, infinity) = (R::splat(0.0), R::splat(f32::INFINITY));
    let first = f32::from(values[0]);
    let x = load::<R, N>(rows, from);
    let (signed, amax) = greatest_signed::<R, N>(&x);
    let scale = R::div(negated::<R>(signed), R::splat(first));
    let (qx, q2) = uneven_moments::<R, N>(&x, R::div(R::splat(1.0), scale), values);
    let mut scale = R::select_below(zero, q2, R::div(qx, q2), zero);
    let mut best = R::mul(scale, qx);
    for step in -tries..=tries {
        let by = R::div(R::splat(f32::from(step) + first), signed);
        let (qx, q2) = uneven_moments::<R, N>(&x, by, values);
        let bound = R::select_below(zero, q2, R::mul(best, q2), infinity);
        let gained = R::mul(qx, qx);
        let this_scale = R::div(qx, q2);
        scale = R::select_below(bound, gained, this_scale, scale);
        best = R::select_below(bound, gained, R::mul(this_scale, qx), best);
    }
    R::store(R::select_below(amax, R::splat(LEAST_AMAX), zero, scale), &mut found.scales, from);
}

#[inline(always)]
fn uneven_moments<R: Simd, const N: usize>(x: &[R::F; N], by: R::F, values: &[i8; 16]) -> (R::F, R::F) {
    let (mut qx, mut q2) = (R::splat(0.0), R::splat(0.0));
    for x in x {
        let (_, value) = nearest_of::<R>(R::mul(by, *x), values);
        let weighted = R::mul(R::mul(*x, *x), value);
        qx = R::add(qx, R::mul(weighted, *x));
        q2 = R::add(q2, R::mul(weighted, value));
    }
    (qx, q2)
}

/// The index of the nearest of rising values, and that value; of two the greater.
#[inline(always)]
pub(super) fn nearest_of<R: Simd>(value: R::F, values: &[i8; 16]) -> (R::F, R::F) {
    let (mut index, mut found) = (R::splat(0.0), R::splat(f32::from(values[0])));
    for at in 1..16 {
        let (low, high) = (f32::from(values[at - 1]), f32::from(values[at]));
        let middle = R::splat((low + high) * 0.5);
        index = R::select_at_most(middle, value, R::splat(at as f32), index);
        found = R::select_at_most(middle, value, R::splat(high), found);
    }
    (index, found)
}
