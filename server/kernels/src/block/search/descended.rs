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
        let powers = Powers::<R>::of(x[i]);
        xl = R::add(xl, powers.xl(codes[i]));
        l2 = R::add(l2, powers.l2(codes[i]));
    }
    let mut differs = zero;
    for i in 0..LANES {
        let (new, others_xl, _) = tried(&Powers::<R>::of(x[i]), codes[i], (xl, l2), half);
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
    let zeros = [0f32; LANES];
    let (mut x, mut squares, mut cubes, mut codes) = (zeros, zeros, zeros, zeros);
    for i in 0..LANES {
        let value = rows[i][lane];
        (x[i], codes[i]) = (value, f32::from(found.codes[i][lane]) - half as f32);
        (squares[i], cubes[i]) = (value * value, value * value * value);
    }
    let (mut start, mut passes, mut is_changed) = (0, 0, false);
    let mut changes = Changes::new();
    loop {
        let better = changes.find::<R>((&x, &squares, &cubes), &codes, (xl, l2), half);
        let mut ahead = better & (u32::MAX << start);
        if ahead == 0 {
            // A pass ends. Where nothing changed, nothing would.
            passes += 1;
            if passes == PASSES || !is_changed || better == 0 {
                break;
            }
            ahead = better;
        }
        let i = ahead.trailing_zeros() as usize % LANES;
        (codes[i], xl, l2) = (changes.codes[i], changes.xl[i], changes.l2[i]);
        (start, is_changed) = (i + 1, true);
    }
    #[allow(clippy::needless_range_loop, reason = "`zip` is a call here")]
    for i in 0..LANES {
        found.codes[i][lane] = (codes[i] + half as f32) as u8;
    }
    found.scales[lane] = if l2 > 0.0 { xl / l2 } else { 0.0 };
}

/// For each element of a group what changing its code alone would make.
struct Changes {
    codes: [f32; LANES],
    xl: [f32; LANES],
    l2: [f32; LANES],
}

impl Changes {
    #[inline(always)]
    fn new() -> Changes {
        Changes { codes: [0.0; LANES], xl: [0.0; LANES], l2: [0.0; LANES] }
    }

    /// Finds them; the bits of elements of which it would be better.
    #[inline(always)]
    fn find<R: Simd>(
        &mut self,
        (x, squares, cubes): (&[f32; LANES], &[f32; LANES], &[f32; LANES]),
        codes: &[f32; LANES],
        sums: (f32, f32),
        half: i32,
    ) -> u32 {
        let (zero, infinity) = (R::splat(0.0), R::splat(f32::INFINITY));
        let (xl, l2) = (R::splat(sums.0), R::splat(sums.1));
        let mut better = 0;
        // Of all, though those before the pass are not asked for: to leave them out was slower.
        for from in (0..LANES).step_by(R::W) {
            let code = R::load(codes, from);
            let powers =
                Powers::<R> { x: R::load(x, from), square: R::load(squares, from), cube: R::load(cubes, from) };
            let (new, others_xl, others_l2) = tried(&powers, code, (xl, l2), half);
            let (new_xl, new_l2) = (R::add(others_xl, powers.xl(new)), R::add(others_l2, powers.l2(new)));
            // All of: others_xl above zero, the code another, new_l2 above zero, and a gain.
            let gained = R::mul(R::mul(new_xl, new_xl), l2);
            let bound = R::mul(R::mul(xl, xl), new_l2);
            let bound = R::select_below(zero, others_xl, bound, infinity);
            let bound = R::select_below(zero, new_l2, bound, infinity);
            let bound = R::select_below(zero, R::abs(R::sub(new, code)), bound, infinity);
            R::store(new, &mut self.codes, from);
            R::store(new_xl, &mut self.xl, from);
            R::store(new_l2, &mut self.l2, from);
            better |= R::below(bound, gained) << from;
        }
        better
    }
}

/// The code that is best for an element, all others being as they are, and the sums of the others.
#[inline(always)]
fn tried<R: Simd>(powers: &Powers<R>, code: R::F, (xl, l2): (R::F, R::F), half: i32) -> (R::F, R::F, R::F) {
    let (others_xl, others_l2) = (R::sub(xl, powers.xl(code)), R::sub(l2, powers.l2(code)));
    (nearest::<R>(R::div(R::mul(powers.x, others_l2), others_xl), -half, half - 1), others_xl, others_l2)
}

/// Elements, their squares, which are their weights, and those times the elements.
struct Powers<R: Simd> {
    x: R::F,
    square: R::F,
    cube: R::F,
}

impl<R: Simd> Powers<R> {
    #[inline(always)]
    fn of(x: R::F) -> Powers<R> {
        let square = R::mul(x, x);
        Powers { x, square, cube: R::mul(square, x) }
    }

    /// What an element adds to the sum of x·l, weighted by x².
    #[inline(always)]
    fn xl(&self, code: R::F) -> R::F {
        R::mul(self.cube, code)
    }

    /// What it adds to the sum of l².
    #[inline(always)]
    fn l2(&self, code: R::F) -> R::F {
        R::mul(R::mul(self.square, code), code)
    }
}
