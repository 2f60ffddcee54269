//! A scale for codes around zero, each of which is tried alone.

use super::{Found, LEAST_AMAX, Rows, greatest_signed, load, nearest, store};
use crate::{element::LANES, simd::Simd};

/// How often each code is tried at the most.
const PASSES: usize = 5;

/// ggml's `make_q3_quants`: codes from `-half` to `half - 1`, each changed alone where that helps, up to five times over.
///
/// In three of four groups no code would be another one: that is seen of all groups side by side. In the others the sixteen codes
/// of a group are tried side by side, the first that helps is changed, and those behind it are tried anew.
#[inline(always)]
pub(in crate::block) fn descended<R: Simd>(rows: &Rows<LANES>, used: usize, half: i32) -> Found<LANES> {
    let mut found = Found::new();
    for from in (0..used).step_by(R::W) {
        let group = started::<R>(rows, from, half, &mut found);
        for lane in from..(from + R::W).min(used) {
            if group.differs[lane] > 0.0 && group.amax[lane] >= LEAST_AMAX {
                descend::<R>(rows, lane, (group.xl[lane], group.l2[lane]), half, &mut found);
            }
        }
    }
    found
}

/// What is known of each lane's group under its first codes.
struct Started {
    /// By how much a code would be another one, if any would.
    differs: [f32; LANES],
    amax: [f32; LANES],
    /// The sums of x·l and of l², weighted by x².
    xl: [f32; LANES],
    l2: [f32; LANES],
}

/// Codes under the scale that the greatest magnitude gives.
#[inline(always)]
fn started<R: Simd>(rows: &Rows<LANES>, from: usize, half: i32, found: &mut Found<LANES>) -> Started {
    let zero = R::splat(0.0);
    let x = load::<R, LANES>(rows, from);
    let (signed, amax) = greatest_signed::<R, LANES>(&x);
    let by = R::div(R::splat(-half as f32), signed);
    let (mut codes, mut xl, mut l2) = ([zero; LANES], zero, zero);
    for i in 0..LANES {
        codes[i] = nearest::<R>(R::mul(by, x[i]), -half, half - 1);
        xl = R::add(xl, xl_of::<R>(x[i], codes[i]));
        l2 = R::add(l2, l2_of::<R>(x[i], codes[i]));
    }
    let mut differs = zero;
    for i in 0..LANES {
        let (new, others_xl, _) = tried::<R>(x[i], codes[i], (xl, l2), half);
        let away = R::abs(R::sub(new, codes[i]));
        differs = R::max(R::select_below(zero, others_xl, away, zero), differs);
    }
    for code in &mut codes {
        *code = R::add(*code, R::splat(half as f32));
    }
    let scale = R::select_below(zero, l2, R::div(xl, l2), zero);
    store::<R, LANES>(found, from, amax, scale, &codes);
    let zeros = [0.0; LANES];
    let mut group = Started { differs: zeros, amax: zeros, xl: zeros, l2: zeros };
    R::store(differs, &mut group.differs, from);
    R::store(amax, &mut group.amax, from);
    R::store(xl, &mut group.xl, from);
    R::store(l2, &mut group.l2, from);
    group
}

/// Changes the codes of one group, under whose first codes the sums are these.
#[inline(always)]
fn descend<R: Simd>(
    rows: &Rows<LANES>,
    lane: usize,
    (mut xl, mut l2): (f32, f32),
    half: i32,
    found: &mut Found<LANES>,
) {
    let (mut x, mut codes) = ([0f32; LANES], [0f32; LANES]);
    for i in 0..LANES {
        (x[i], codes[i]) = (rows[i][lane], f32::from(found.codes[i][lane]) - half as f32);
    }
    let (mut start, mut passes, mut is_changed) = (0, 0, false);
    loop {
        let changes = Changes::of::<R>(&x, &codes, (xl, l2), half);
        let mut first = changes.first(start);
        if first.is_none() {
            // A pass ends. Where nothing changed, nothing would.
            passes += 1;
            if passes == PASSES || !is_changed {
                break;
            }
            first = changes.first(0);
        }
        let Some(i) = first else { break };
        (codes[i], xl, l2) = (changes.codes[i], changes.xl[i], changes.l2[i]);
        (start, is_changed) = (i + 1, true);
    }
    for (code, row) in codes.iter().zip(&mut found.codes) {
        row[lane] = (code + half as f32) as u8;
    }
    found.scales[lane] = if l2 > 0.0 { xl / l2 } else { 0.0 };
}

/// For each element of a group what changing its code alone would make.
struct Changes {
    codes: [f32; LANES],
    xl: [f32; LANES],
    l2: [f32; LANES],
    /// Above zero where it would be better.
    gains: [f32; LANES],
}

impl Changes {
    #[inline(always)]
    fn of<R: Simd>(x: &[f32; LANES], codes: &[f32; LANES], sums: (f32, f32), half: i32) -> Changes {
        let (zero, infinity) = (R::splat(0.0), R::splat(f32::INFINITY));
        let zeros = [0.0; LANES];
        let mut changes = Changes { codes: zeros, xl: zeros, l2: zeros, gains: zeros };
        let (xl, l2) = (R::splat(sums.0), R::splat(sums.1));
        for from in (0..LANES).step_by(R::W) {
            let (x, code) = (R::load(x, from), R::load(codes, from));
            let (new, others_xl, others_l2) = tried::<R>(x, code, (xl, l2), half);
            let (new_xl, new_l2) = (R::add(others_xl, xl_of::<R>(x, new)), R::add(others_l2, l2_of::<R>(x, new)));
            // All of: others_xl above zero, the code another, new_l2 above zero, and a gain.
            let gained = R::mul(R::mul(new_xl, new_xl), l2);
            let bound = R::mul(R::mul(xl, xl), new_l2);
            let bound = R::select_below(zero, others_xl, bound, infinity);
            let bound = R::select_below(zero, new_l2, bound, infinity);
            let bound = R::select_below(zero, R::abs(R::sub(new, code)), bound, infinity);
            R::store(new, &mut changes.codes, from);
            R::store(new_xl, &mut changes.xl, from);
            R::store(new_l2, &mut changes.l2, from);
            R::store(R::select_below(bound, gained, R::splat(1.0), zero), &mut changes.gains, from);
        }
        changes
    }

    /// The first that would be better, from an element on.
    #[inline(always)]
    fn first(&self, from: usize) -> Option<usize> {
        (from..LANES).find(|i| self.gains[*i] > 0.0)
    }
}

/// The code that is best for an element, all others being as they are, and the sums of the others.
#[inline(always)]
fn tried<R: Simd>(x: R::F, code: R::F, (xl, l2): (R::F, R::F), half: i32) -> (R::F, R::F, R::F) {
    let (others_xl, others_l2) = (R::sub(xl, xl_of::<R>(x, code)), R::sub(l2, l2_of::<R>(x, code)));
    (nearest::<R>(R::div(R::mul(x, others_l2), others_xl), -half, half - 1), others_xl, others_l2)
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
