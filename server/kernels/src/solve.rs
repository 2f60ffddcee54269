//! Searching: the errors that a group makes under several scales and zero points, so that the best can be chosen.

use crate::{
    Arith, Codes, Dtype, Format, Level, Part, Qparams, Range, Scaler, TILE,
    coder::{Asymmetric, Coder, Limits, Symmetric},
    element::{LANES, Loose, LooseBf16, LooseF16, LooseF32, in_registers, loose},
    half::{Round, ToBf16, ToF16, ToF32},
    level::multiversion,
    part::pieces,
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

impl Search {
    /// How many are tried.
    pub const fn tried(self) -> usize {
        match self {
            Search::Mse => 49,
            // As many as HQQ has iterations.
            Search::Hqq => 2 * CODES_MORE.len(),
        }
    }

    /// Writes what is tried for a group of that range: of equal errors the first is to be taken. What overflows its stored type leaves
    /// another in its place.
    ///
    /// # Panics
    /// If there is no room for exactly so many.
    pub fn write(self, scaler: Scaler, range: Range, out: &mut [Qparams]) {
        assert_eq!(out.len(), self.tried(), "room for what is tried");
        match self {
            Search::Mse => narrower(scaler, range, out),
            Search::Hqq => around(scaler, range, out),
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

/// Scales around that of the range, and of asymmetric codes two zero points for each. Of symmetric ones as many scales, in smaller steps.
fn around(scaler: Scaler, range: Range, out: &mut [Qparams]) {
    let codes = scaler.format.codes;
    let (low, high) = codes.limits();
    let steps = high - low;
    let observed = scaler.qparams(range).unwrap_or(Qparams { scale: 1.0, zero_point: 0 });
    let scale =
        |more: f32| scaler.qparams(times(range, steps / (steps + more))).map_or(observed.scale, |found| found.scale);
    if codes.symmetric() {
        for (index, params) in out.iter_mut().enumerate() {
            let (more, half) = (CODES_MORE[index / 2], if index % 2 == 0 { 0.0 } else { 0.2 });
            *params = Qparams { scale: scale(more + half), zero_point: 0 };
        }
        return;
    }
    for (pair, more) in out.as_chunks_mut::<2>().0.iter_mut().zip(CODES_MORE) {
        let scale = scale(more);
        // The middle of the range in the middle of the codes.
        let exact = (low + high) / 2.0 - (range.min / 2.0 + range.max / 2.0) / scale;
        let near = exact.round_ties_even();
        let other = if exact < near { near - 1.0 } else { near + 1.0 };
        *pair = [near, other].map(|zero| Qparams { scale, zero_point: zero.clamp(low, high) as i32 });
    }
    // What is observed is among them, so that nothing is worse than that. A coarsely rounded scale may have it elsewhere.
    let [first, second, ..] = out else { return };
    if first.zero_point != observed.zero_point {
        *second = *first;
        *first = observed;
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
    match symmetric {
        true => {
            tiles::<R, Step, _>(search, part, params, errors, |params| Symmetric::<Step>::new(params.scale, limits))
        }
        false => tiles::<R, Step, _>(search, part, params, errors, |params| {
            Asymmetric::<Step>::new(params.scale, params.zero_point, limits)
        }),
    }
}

#[inline(always)]
fn tiles<R: Simd, Step: Round, C: Coder>(
    search: Search,
    part: &Part<'_>,
    params: &[Qparams],
    errors: &mut [f64],
    coder: impl Fn(&Qparams) -> C,
) {
    // Columns counted from the start of the first group.
    let before = part.column - part.column % part.group;
    let mut wide = [0f32; TILE];
    for (first, bytes) in part.tiles().map(|(first, bytes)| (first - before, bytes)) {
        let bytes = in_registers(Level(R::KIND), part.dtype, bytes, &mut wide);
        match part.dtype {
            Dtype::Bf16 if Step::READS_BF16 => {
                of_values::<R, LooseBf16, C>(first, loose(bytes), part.group, search, params, errors, &coder);
            }
            Dtype::F16 if Step::READS_F16 => {
                of_values::<R, LooseF16, C>(first, loose(bytes), part.group, search, params, errors, &coder);
            }
            _ if Step::IS_F32 => {
                of_values::<R, LooseF32, C>(first, loose(bytes), part.group, search, params, errors, &coder)
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
    search: Search,
    params: &[Qparams],
    errors: &mut [f64],
    coder: &impl Fn(&Qparams) -> C,
) {
    for piece in pieces(first, values.len(), group) {
        let values = &values[piece.start..piece.end];
        let of_group = piece.group * search.tried()..(piece.group + 1) * search.tried();
        for (params, error) in params[of_group.clone()].iter().zip(&mut errors[of_group]) {
            *error += f64::from(noise::<R, V, C>(search, values, &coder(params)));
        }
    }
}

/// The sum of errors of a piece; zeros follow where it fills no whole sixteen.
#[inline(always)]
fn noise<R: Simd, V: Loose, C: Coder>(search: Search, values: &[V], coder: &C) -> f32 {
    // A magnitude times itself, or times one.
    let (times, least) = match search {
        Search::Mse => (R::splat(1.0), R::splat(0.0)),
        Search::Hqq => (R::splat(0.0), R::splat(1.0)),
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
