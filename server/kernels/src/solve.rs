//! Searching: the errors that a group makes under several scales and zero points, so that the best can be chosen.

mod absolute;

use absolute::Reciprocals;

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
    /// Scales of ranges that are some codes narrower and some wider, with zero points on both sides of where they would lie as real
    /// numbers; the sum of |x - y|. HQQ, which fits a real zero point, ends its iterations by the same error.
    Hqq,
}

/// How many codes more than it has a range is divided into, of codes of 2 to 4 bits: that of the observed range first, so that of equal
/// errors it is taken.
const CODES_MORE: [f32; 10] = [0.0, 0.4, -0.4, 0.8, -0.8, 1.2, -1.2, 1.6, 2.2, 3.0];

/// Of wider codes [`WIDE_SCALES`], with even steps: what a step is, and how many of them lie below the observed range. The more codes, the
/// less is lost by a wider range, and the more is won by where the codes happen to lie.
const STEPS_MORE: [(f32, usize); 4] = [(0.35, 11), (0.4, 16), (0.5, 18), (0.6, 20)];
const WIDE_SCALES: usize = 24;

/// All scales that are tried, in lanes.
type Scales = [[f32; LANES]; 2];

/// [`CODES_MORE`], and those of 5, 6, 7 and 8 bits; and what symmetric codes, whose zero point is zero, have beside each.
const MORE: [(Scales, f32); 1 + STEPS_MORE.len()] = {
    let mut more = [([[0.0; LANES]; 2], 0.2); 1 + STEPS_MORE.len()];
    let mut at = 0;
    while at < CODES_MORE.len() {
        more[0].0[0][at] = CODES_MORE[at];
        at += 1;
    }
    let mut of = 0;
    while of < STEPS_MORE.len() {
        let (step, below) = STEPS_MORE[of];
        more[1 + of].1 = step / 2.0;
        // After the observed range.
        let mut at = 1;
        while at < WIDE_SCALES {
            let steps = if at <= below { at as f32 - 1.0 - below as f32 } else { (at - below) as f32 };
            more[1 + of].0[at / LANES][at % LANES] = steps * step;
            at += 1;
        }
        of += 1;
    }
    more
};

/// The most that are tried by [`Search::Hqq`].
const MOST: usize = 2 * WIDE_SCALES;

/// Which of [`MORE`].
const fn width(codes: Codes) -> usize {
    match codes {
        Codes::Int { bits, .. } if bits > 4 => bits as usize - 4,
        _ => 0,
    }
}

impl Search {
    /// How many are tried for such codes.
    pub const fn tried(self, codes: Codes) -> usize {
        match self {
            Search::Mse => 49,
            // As many as HQQ has iterations; of wider codes more, where a real zero point is worth more.
            Search::Hqq if width(codes) == 0 => 2 * CODES_MORE.len(),
            Search::Hqq => MOST,
        }
    }

    /// Of each group what makes the least error; of equal errors the first. Without a place for zero points, none are written.
    pub fn choose(self, codes: Codes, tried: &[Qparams], errors: &[f64], scales: &mut [f32], zero_points: &mut [i32]) {
        let each = self.tried(codes);
        let groups = tried.chunks_exact(each).zip(errors.chunks_exact(each));
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
        assert_eq!(out.len(), self.tried(scaler.format.codes), "room for what is tried");
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
    let (more_codes, beside) = &MORE[width(codes)];
    let (mut tried, mut points) = ([Scales::default(); 2], [Scales::default(); 2]);
    let mut observed = 0.0;
    let (least, most, one) = (R::splat(low), R::splat(high), R::splat(1.0));
    let (middle, shift) = (R::splat((low + high) / 2.0), R::splat(ROUNDING));
    let of_range = R::splat(range.min / 2.0 + range.max / 2.0);
    let steps = R::splat(high - low);
    let scales = if codes.symmetric() { 2 } else { 1 };
    for from in (0..out.len() / 2).step_by(R::W) {
        let (sixteen, from) = (from / LANES, from % LANES);
        let (mut scale, mut zero) = (R::splat(1.0), R::splat(0.0));
        // One scale for two zero points, or two scales. A loop, so that it is compiled once.
        for (second, tried) in tried[..scales].iter_mut().enumerate() {
            let more = R::add(R::load(&more_codes[sixteen], from), R::splat(*beside * second as f32));
            let by = R::div(steps, R::add(steps, more));
            (scale, zero) = of_weights::<R>(scaler, R::mul(R::splat(range.min), by), R::mul(R::splat(range.max), by));
            R::store(scale, &mut tried[sixteen], from);
        }
        if codes.symmetric() {
            continue;
        }
        // The middle of the range in the middle of the codes; beyond the codes' ends there is nothing to choose from.
        let exact = R::sub(middle, R::div(of_range, scale));
        let exact = R::min(R::max(exact, R::sub(least, one)), R::add(most, one));
        let near = R::sub(R::add(exact, shift), shift);
        let other = R::select_below(exact, near, R::sub(near, one), R::add(near, one));
        R::store(scale, &mut tried[1][sixteen], from);
        R::store(R::min(R::max(near, least), most), &mut points[0][sixteen], from);
        R::store(R::min(R::max(other, least), most), &mut points[1][sixteen], from);
        if (sixteen, from) == (0, 0) {
            let mut zeros = [0f32; LANES];
            R::store(zero, &mut zeros, 0);
            observed = zeros[0];
        }
    }
    let [tried, points] = [&tried, &points].map(|both| both.each_ref().map(|scales| scales.as_flattened()));
    let mut overflows = false;
    for (at, pair) in out.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        *pair = [
            Qparams { scale: tried[0][at], zero_point: points[0][at] as i32 },
            Qparams { scale: tried[1][at], zero_point: points[1][at] as i32 },
        ];
        overflows |= pair[0].scale.is_infinite() | pair[1].scale.is_infinite();
    }
    let first = Qparams { scale: tried[0][0], zero_point: observed as i32 };
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
    let tried = Tried { each: search.tried(format.codes), sum, params };
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
    let (mut wide, mut reciprocals) = ([0f32; TILE], Reciprocals::new());
    for (first, bytes) in part.tiles().map(|(first, bytes)| (first - before, bytes)) {
        let bytes = in_registers(Level(R::KIND), part.dtype, bytes, &mut wide);
        match part.dtype {
            Dtype::Bf16 if Step::READS_BF16 => {
                of_values::<R, LooseBf16, C>(first, loose(bytes), part.group, tried, errors, &mut reciprocals, &coder);
            }
            Dtype::F16 if Step::READS_F16 => {
                of_values::<R, LooseF16, C>(first, loose(bytes), part.group, tried, errors, &mut reciprocals, &coder);
            }
            _ if Step::IS_F32 => {
                of_values::<R, LooseF32, C>(first, loose(bytes), part.group, tried, errors, &mut reciprocals, &coder)
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
    reciprocals: &mut Reciprocals,
    coder: &impl Fn(&Qparams) -> C,
) {
    for piece in pieces(first, values.len(), group) {
        let values = &values[piece.start..piece.end];
        let of_group = piece.group * tried.each..(piece.group + 1) * tried.each;
        let (params, errors) = (&tried.params[of_group.clone()], &mut errors[of_group]);
        match tried.sum {
            Sum::Steps(limits) if absolute::have_reciprocals(params) => {
                reciprocals.fill(params, limits);
                reciprocals.add::<R, V>(values, params, errors);
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
