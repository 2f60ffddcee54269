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
pub(in crate::block) fn descended<R: Simd>(rows: &Rows<LANES>, groups: &[[f32; LANES]], half: i32) -> Found<LANES> {
    let mut found = Found::new();
    let mut started = Started { differing: 0, xl: [0.0; LANES], l2: [0.0; LANES] };
    for from in (0..groups.len()).step_by(R::W) {
        started.add::<R>(rows, from, half, &mut found);
    }
    let mut differing = started.differing & ((1 << groups.len()) - 1);
    while differing != 0 {
        let lane = differing.trailing_zeros() as usize;
        differing &= differing - 1;
        let (group, sums) = (&groups[lane], (started.xl[lane], started.l2[lane]));
        let mut descent = Descent::new::<R>(group, found.by[lane], sums, half);
        let mut changes = Changes::new();
        while descent.step::<R>(group, &mut changes, half) {}
        descent.end(lane, half, &mut found);
    }
    found
}

/// What is known of each lane's group under its first codes.
struct Started {
    /// A bit for each group of which a code would be another one.
    differing: u32,
    /// The sums of x·l and of l², weighted by x².
    xl: [f32; LANES],
    l2: [f32; LANES],
}

impl Started {
    /// Codes under the scale that the greatest magnitude gives.
    #[inline(always)]
    fn add<R: Simd>(&mut self, rows: &Rows<LANES>, from: usize, half: i32, found: &mut Found<LANES>) {
        let zero = R::splat(0.0);
        let x = load::<R, LANES>(rows, from);
        let (signed, amax) = greatest_signed::<R, LANES>(&x);
        let by = R::div(R::splat(-half as f32), signed);
        let (mut codes, mut xl, mut l2) = ([zero; LANES], zero, zero);
        let (mut own_xl, mut own_l2) = (codes, codes);
        for i in 0..LANES {
            codes[i] = nearest::<R>(R::mul(by, x[i]), -half, half - 1);
            let powers = Powers::<R>::of(x[i]);
            (own_xl[i], own_l2[i]) = (powers.xl(codes[i]), powers.l2(codes[i]));
            (xl, l2) = (R::add(xl, own_xl[i]), R::add(l2, own_l2[i]));
        }
        let mut differs = zero;
        for i in 0..LANES {
            let (others_xl, others_l2) = (R::sub(xl, own_xl[i]), R::sub(l2, own_l2[i]));
            let new = best::<R>(x[i], others_xl, others_l2, half);
            let away = R::abs(R::sub(new, codes[i]));
            differs = R::max(R::select_below(zero, others_xl, away, zero), differs);
        }
        for code in &mut codes {
            *code = R::add(*code, R::splat(half as f32));
        }
        let scale = R::select_below(zero, l2, R::div(xl, l2), zero);
        store::<R, LANES>(found, from, amax, scale, &codes);
        R::store(by, &mut found.by, from);
        R::store(xl, &mut self.xl, from);
        R::store(l2, &mut self.l2, from);
        self.differing |= (R::below(zero, differs) & !R::below(amax, R::splat(LEAST_AMAX))) << from;
    }
}

/// One group, whose codes are changed.
struct Descent {
    codes: [f32; LANES],
    xl: f32,
    l2: f32,
    /// The first element of which this pass has not asked.
    next: u32,
    passes: usize,
}

impl Descent {
    #[inline(always)]
    fn new<R: Simd>(group: &[f32; LANES], by: f32, (xl, l2): (f32, f32), half: i32) -> Descent {
        let mut codes = [0.0; LANES];
        for from in (0..LANES).step_by(R::W) {
            R::store(nearest::<R>(R::mul(R::splat(by), R::load(group, from)), -half, half - 1), &mut codes, from);
        }
        Descent { codes, xl, l2, next: 0, passes: 0 }
    }

    /// Changes the next code that helps; false if none does.
    #[inline(always)]
    fn step<R: Simd>(&mut self, group: &[f32; LANES], changes: &mut Changes, half: i32) -> bool {
        let better = changes.find::<R>(group, &self.codes, (self.xl, self.l2), half);
        let ahead = better & (u32::MAX << self.next);
        // Where none is left a pass ends.
        self.passes += usize::from(ahead == 0);
        let better = if ahead == 0 { better } else { ahead };
        let better = if self.passes < PASSES { better } else { 0 };
        let i = (better | 1 << LANES).trailing_zeros() as usize;
        if better != 0 {
            (self.xl, self.l2) = (changes.xl[i % LANES], changes.l2[i % LANES]);
        }
        self.next = i as u32 + 1;
        // Whole registers: a number that is written alone keeps those waiting that read the sixteen.
        for from in (0..LANES).step_by(R::W) {
            let (old, new) = (R::load(&self.codes, from), R::load(&changes.codes, from));
            let is_it = R::load(&IS_AT[i], from);
            R::store(R::select_below(R::splat(0.0), is_it, new, old), &mut self.codes, from);
        }
        better != 0
    }

    #[inline(always)]
    fn end(&self, lane: usize, half: i32, found: &mut Found<LANES>) {
        for i in 0..LANES {
            found.codes[i][lane] = (self.codes[i] + half as f32) as u8;
        }
        found.scales[lane] = if self.l2 > 0.0 { self.xl / self.l2 } else { 0.0 };
    }
}

/// Row `i` has 1.0 for element `i`; the last has none.
static IS_AT: [[f32; LANES]; LANES + 1] = {
    let mut rows = [[0.0; LANES]; LANES + 1];
    let mut i = 0;
    while i < LANES {
        rows[i][i] = 1.0;
        i += 1;
    }
    rows
};

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
    fn find<R: Simd>(&mut self, x: &[f32; LANES], codes: &[f32; LANES], sums: (f32, f32), half: i32) -> u32 {
        let (zero, infinity) = (R::splat(0.0), R::splat(f32::INFINITY));
        let (xl, l2) = (R::splat(sums.0), R::splat(sums.1));
        let mut better = 0;
        // Of all, though those before the pass are not asked for: to leave them out was slower.
        for from in (0..LANES).step_by(R::W) {
            let code = R::load(codes, from);
            let powers = Powers::<R>::of(R::load(x, from));
            let (others_xl, others_l2) = (R::sub(xl, powers.xl(code)), R::sub(l2, powers.l2(code)));
            let new = best::<R>(powers.x, others_xl, others_l2, half);
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

/// The code that is best for an element, by the sums of the others.
#[inline(always)]
fn best<R: Simd>(x: R::F, others_xl: R::F, others_l2: R::F, half: i32) -> R::F {
    nearest::<R>(R::div(R::mul(x, others_l2), others_xl), -half, half - 1)
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
