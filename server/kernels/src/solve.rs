//! Searching: the errors that a group makes under several scales and zero points, so that the best can be chosen.

mod absolute;

use absolute::SumLanes;

use crate::{
    Arith, Codes, Dtype, Format, Level, Part, Qparams, Range, Scaler, TILE,
    coder::{Asymmetric, Coder, Limits, ROUNDING, Symmetric},
    element::{LANES, Loose, LooseBf16, LooseF16, LooseF32, in_registers, loose},
    half::{Round, ToBf16, ToF16, ToF32},
    level::multiversion,
    part::pieces,
    scale::of_weights,
    simd::Simd,
};

/// What is tried for a group, and which error is to be least.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Search {
    /// 64/64, 63/64, .. 16/64 of the group's range; the sum of (x - y)².
    Mse,
    /// Scales of ranges that are up to three codes narrower, and up to one wider, with zero points on both sides of where they would
    /// lie as real numbers; the sum of |x - y|. HQQ, which fits a real zero point, ends its iterations by the same error.
    Hqq,
}

/// How many codes more than it has a range is divided into: that of the observed range first, so that of equal errors it is taken.
const CODES_MORE: [f32; 10] = [0.0, 0.4, -0.4, 0.8, -0.8, 1.2, -1.2, 1.6, 2.2, 3.0];

/// The same in lanes.
const MORE: [f32; LANES] = {
    let mut more = [0.0; LANES];
    let mut at = 0;
    while at < CODES_MORE.len() {
        more[at] = CODES_MORE[at];
        at += 1;
    }
    more
};

/// Beside those, of symmetric codes, whose zero point is zero.
const HALF_A_STEP_MORE: f32 = 0.2;

impl Search {
    /// How many are tried.
    pub const fn tried(self) -> usize {
        match self {
            Search::Mse => 49,
            // As many as HQQ has iterations.
            Search::Hqq => 2 * CODES_MORE.len(),
        }
    }

    /// Of each group what makes the least error; of equal errors the first. Without a place for zero points, none are written.
    pub fn choose(self, tried: &[Qparams], errors: &[f64], scales: &mut [f32], zero_points: &mut [i32]) {
        let groups = tried.chunks_exact(self.tried()).zip(errors.chunks_exact(self.tried()));
        for (group, ((tried, errors), scale)) in groups.zip(scales).enumerate() {
            let (mut at, mut least) = (0, f64::INFINITY);
            for (index, error) in errors.iter().enumerate() {
                if *error < least {
                    (at, least) = (index, *error);
                }
            }
            *scale = tried[at].scale;
            if let Some(zero_point) = zero_points.get_mut(group) {
                *zero_point = tried[at].zero_point;
            }
        }
    }

    /// Writes what is tried for a group of that range: of equal errors the first is to be taken. What overflows its stored type leaves
    /// another in its place.
    ///
    /// # Panics
    /// If there is no room for exactly so many.
    pub fn write(self, level: Level, scaler: Scaler, range: Range, out: &mut [Qparams]) {
        assert_eq!(out.len(), self.tried(), "room for what is tried");
        match self {
            Search::Mse => narrower(scaler, range, out),
            Search::Hqq => around(level, scaler, range, out),
        }
    }
}

/// Scales and zero points under narrower and narrower ranges. One that overflows leaves the next narrower one in its place.
fn narrower(scaler: Scaler, range: Range, out: &mut [Qparams]) {
    let mut narrower = Qparams { scale: 1.0, zero_point: 0 };
    for (index, params) in out.iter_mut().enumerate().rev() {
        if let Ok(found) = scaler.qparams(times(range, (64 - index) as f32 / 64.0)) {
            narrower = found;
        }
        *params = narrower;
    }
}

multiversion! { fn around(scaler: Scaler, range: Range, out: &mut [Qparams]) -> () = around_body<R>; }

/// Scales around that of the range, and of asymmetric codes two zero points for each. Of symmetric ones as many scales, in smaller steps.
/// One that overflows leaves that of the observed range in its place.
#[inline(always)]
fn around_body<R: Simd>(scaler: Scaler, range: Range, out: &mut [Qparams]) {
    let codes = scaler.format.codes;
    let (low, high) = codes.limits();
    let mut tried = [[0f32; LANES]; 2];
    let mut points = [[0f32; LANES]; 2];
    let mut observed = [0f32; LANES];
    let (least, most, one) = (R::splat(low), R::splat(high), R::splat(1.0));
    let (middle, shift) = (R::splat((low + high) / 2.0), R::splat(ROUNDING));
    let of_range = R::splat(range.min / 2.0 + range.max / 2.0);
    let steps = R::splat(high - low);
    let scales = if codes.symmetric() { 2 } else { 1 };
    for from in (0..LANES).step_by(R::W) {
        let (mut scale, mut zero) = (R::splat(1.0), R::splat(0.0));
        // One scale for two zero points, or two scales. A loop, so that it is compiled once.
        for (second, tried) in tried[..scales].iter_mut().enumerate() {
            let more = R::add(R::load(&MORE, from), R::splat(HALF_A_STEP_MORE * second as f32));
            let by = R::div(steps, R::add(steps, more));
            (scale, zero) = of_weights::<R>(scaler, R::mul(R::splat(range.min), by), R::mul(R::splat(range.max), by));
            R::store(scale, tried, from);
        }
        R::store(zero, &mut observed, from);
        if codes.symmetric() {
            continue;
        }
        R::store(scale, &mut tried[1], from);
        // The middle of the range in the middle of the codes; beyond the codes' ends there is nothing to choose from.
        let exact = R::sub(middle, R::div(of_range, scale));
        let exact = R::min(R::max(exact, R::sub(least, one)), R::add(most, one));
        let near = R::sub(R::add(exact, shift), shift);
        let other = R::select_below(exact, near, R::sub(near, one), R::add(near, one));
        R::store(R::min(R::max(near, least), most), &mut points[0], from);
        R::store(R::min(R::max(other, least), most), &mut points[1], from);
    }
    let mut overflows = false;
    for (at, pair) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        *pair = [
            Qparams { scale: tried[0][at], zero_point: points[0][at] as i32 },
            Qparams { scale: tried[1][at], zero_point: points[1][at] as i32 },
        ];
        overflows |= pair[0].scale.is_infinite() | pair[1].scale.is_infinite();
    }
    let first = Qparams { scale: tried[0][0], zero_point: observed[0] as i32 };
    if overflows {
        replace_infinite(first, out);
    }
    // What is observed is among them, so that nothing is worse than that. A coarsely rounded scale may have it elsewhere.
    if out[0].zero_point != first.zero_point {
        out[1] = out[0];
        out[0] = first;
    }
}

/// Puts what is under the observed scale where a scale is infinite.
#[cold]
fn replace_infinite(observed: Qparams, out: &mut [Qparams]) {
    let first = match (observed.scale.is_finite(), out[0].scale == out[1].scale) {
        // Both zero points of the one scale.
        (true, true) => [out[0], out[1]],
        (true, false) => [observed; 2],
        // What is observed is an error by itself.
        (false, _) => [Qparams { scale: 1.0, zero_point: 0 }; 2],
    };
    for pair in out.as_chunks_mut::<2>().0 {
        for (params, first) in pair.iter_mut().zip(first) {
            if params.scale.is_infinite() {
                *params = first;
            }
        }
    }
}

fn times(range: Range, by: f32) -> Range {
    Range { min: range.min * by, max: range.max * by, finite: range.finite }
}

/// Adds to `errors` the errors of the part's elements under each of `params`, both [`Search::tried`] a group, the first that of
/// the part's first column. Of integers only.
///
/// A tile's piece of a group is summed in f32 over sixteen lanes, pieces in f64 in the order of the columns: the same bits at
/// every level.
///
/// # Panics
/// If a group that the part touches has no place in `params` or `errors`, or the format is none of integers.
pub fn errors(
    level: Level,
    search: Search,
    (format, arith): (Format, Arith),
    part: &Part<'_>,
    params: &[Qparams],
    errors: &mut [f64],
) {
    match (arith, part.dtype) {
        (Arith::WeightDtype, Dtype::Bf16) => bf16(level, search, format, part, params, errors),
        (Arith::WeightDtype, Dtype::F16) => f16(level, search, format, part, params, errors),
        _ => f32(level, search, format, part, params, errors),
    }
}

multiversion! { fn f32(search: Search, format: Format, part: &Part<'_>, params: &[Qparams], errors: &mut [f64]) -> () = body<R, ToF32>; }
multiversion! { fn bf16(search: Search, format: Format, part: &Part<'_>, params: &[Qparams], errors: &mut [f64]) -> () = body<R, ToBf16>; }
multiversion! { fn f16(search: Search, format: Format, part: &Part<'_>, params: &[Qparams], errors: &mut [f64]) -> () = body<R, ToF16>; }

#[inline(always)]
fn body<R: Simd, Step: Round>(search: Search, format: Format, part: &Part<'_>, params: &[Qparams], errors: &mut [f64]) {
    let Codes::Int { bits, packing, symmetric } = format.codes else { panic!("searching is for integers") };
    let limits = Limits::of(bits, packing);
    let sum = match search {
        Search::Mse => Sum::Squares,
        Search::Hqq if Step::IS_F32 => Sum::Steps(format.codes.limits()),
        Search::Hqq => Sum::Magnitudes,
    };
    let tried = Tried { each: search.tried(), sum, params };
    match symmetric {
        true => tiles::<R, Step, _>(tried, part, errors, |params| Symmetric::<Step>::new(params.scale, limits)),
        false => tiles::<R, Step, _>(tried, part, errors, |params| {
            Asymmetric::<Step>::new(params.scale, params.zero_point, limits)
        }),
    }
}

/// What is summed.
#[derive(Clone, Copy, PartialEq)]
enum Sum {
    Squares,
    /// Of errors as they are.
    Magnitudes,
    /// The same by [`absolute`], of codes between these, where scales have reciprocals.
    Steps((f32, f32)),
}

/// So many scales and zero points for each group.
#[derive(Clone, Copy)]
struct Tried<'a> {
    each: usize,
    sum: Sum,
    params: &'a [Qparams],
}

#[inline(always)]
fn tiles<R: Simd, Step: Round, C: Coder>(
    tried: Tried<'_>,
    part: &Part<'_>,
    errors: &mut [f64],
    coder: impl Fn(&Qparams) -> C,
) {
    // Columns counted from the start of the first group.
    let before = part.column - part.column % part.group;
    let (mut wide, mut lanes) = ([0f32; TILE], SumLanes::new());
    for (first, bytes) in part.tiles().map(|(first, bytes)| (first - before, bytes)) {
        let bytes = in_registers(Level(R::KIND), part.dtype, bytes, &mut wide);
        match part.dtype {
            Dtype::Bf16 if Step::READS_BF16 => {
                of_values::<R, LooseBf16, C>(first, loose(bytes), part.group, tried, errors, &mut lanes, &coder);
            }
            Dtype::F16 if Step::READS_F16 => {
                of_values::<R, LooseF16, C>(first, loose(bytes), part.group, tried, errors, &mut lanes, &coder);
            }
            _ if Step::IS_F32 => {
                of_values::<R, LooseF32, C>(first, loose(bytes), part.group, tried, errors, &mut lanes, &coder)
            }
            dtype => unreachable!("{} is not rounded to a narrower type", dtype.name()),
        }
    }
}

#[inline(always)]
fn of_values<R: Simd, V: Loose, C: Coder>(
    first: usize,
    values: &[V],
    group: usize,
    tried: Tried<'_>,
    errors: &mut [f64],
    lanes: &mut SumLanes,
    coder: &impl Fn(&Qparams) -> C,
) {
    for piece in pieces(first, values.len(), group) {
        let values = &values[piece.start..piece.end];
        let of_group = piece.group * tried.each..(piece.group + 1) * tried.each;
        let (params, errors) = (&tried.params[of_group.clone()], &mut errors[of_group]);
        match tried.sum {
            Sum::Steps(limits) if absolute::have_reciprocals(params) => {
                absolute::Reciprocals::new(params, limits).add::<R, V>(values, params, errors, lanes);
            }
            sum => {
                for (params, error) in params.iter().zip(errors) {
                    *error += f64::from(noise::<R, V, C>(sum == Sum::Squares, values, &coder(params)));
                }
            }
        }
    }
}

/// The sum of a piece's errors, or of their squares; zeros follow where it fills no whole sixteen.
#[inline(always)]
fn noise<R: Simd, V: Loose, C: Coder>(squares: bool, values: &[V], coder: &C) -> f32 {
    // A magnitude times itself, or times one.
    let (times, least) = match squares {
        true => (R::splat(1.0), R::splat(0.0)),
        false => (R::splat(0.0), R::splat(1.0)),
    };
    let mut lanes = [0f32; LANES];
    let (sixteens, rest) = values.as_chunks::<LANES>();
    let mut last = [V::ZERO; LANES];
    last[..rest.len()].copy_from_slice(rest);
    let last = if rest.is_empty() { &[][..] } else { std::slice::from_ref(&last) };
    for from in (0..LANES).step_by(R::W) {
        let mut sum = R::splat(0.0);
        for sixteen in sixteens.iter().chain(last) {
            let x = V::lanes::<R>(sixteen, from);
            let coded = coder.code::<R>(x);
            let error = R::abs(R::sub(x, coded.decoded));
            sum = R::add(sum, R::mul(error, R::max(R::mul(error, times), least)));
        }
        R::store(sum, &mut lanes, from);
    }
    R::sum(&lanes)
}
