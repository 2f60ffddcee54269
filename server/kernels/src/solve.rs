//! Clipping: the errors that a group makes under narrower and narrower ranges, so that the best can be chosen.

use crate::{
    Arith, Codes, Dtype, Format, Level, Part, Qparams, Range, Scaler, TILE,
    coder::{Asymmetric, Coder, Limits, Symmetric},
    element::{LANES, Loose, LooseBf16, LooseF16, LooseF32, in_registers, loose},
    half::{Round, ToBf16, ToF16, ToF32},
    level::multiversion,
    part::pieces,
    simd::Simd,
};

/// How many ranges are tried: 64/64, 63/64, .. 16/64 of a group's own.
pub const CLIPS: usize = 49;

/// A group's scales and zero points under each of these ranges, the widest first. One that overflows its stored type leaves
/// the next narrower one in its place.
pub fn clipped(scaler: Scaler, range: Range) -> [Qparams; CLIPS] {
    let mut all = [Qparams { scale: 1.0, zero_point: 0 }; CLIPS];
    let mut narrower = all[0];
    for (index, params) in all.iter_mut().enumerate().rev() {
        let part = (64 - index) as f32 / 64.0;
        let range = Range { min: range.min * part, max: range.max * part, finite: range.finite };
        if let Ok(found) = scaler.qparams(range) {
            narrower = found;
        }
        *params = narrower;
    }
    all
}

/// Adds to `errors` the sums of (x - y)² over the part's elements under each of `params`, both one a group, the first that of
/// the part's first column. Of integers only.
///
/// A tile's piece of a group is summed in f32 over sixteen lanes, pieces in f64 in the order of the columns: the same bits at
/// every level.
///
/// # Panics
/// If a group that the part touches has no place in `params` or `errors`, or the format is none of integers.
pub fn squared_errors(
    level: Level,
    format: Format,
    arith: Arith,
    part: &Part<'_>,
    params: &[[Qparams; CLIPS]],
    errors: &mut [[f64; CLIPS]],
) {
    match (arith, part.dtype) {
        (Arith::WeightDtype, Dtype::Bf16) => bf16(level, format, part, params, errors),
        (Arith::WeightDtype, Dtype::F16) => f16(level, format, part, params, errors),
        _ => f32(level, format, part, params, errors),
    }
}

type Params<'a> = &'a [[Qparams; CLIPS]];
type Errors<'a> = &'a mut [[f64; CLIPS]];

multiversion! { fn f32(format: Format, part: &Part<'_>, params: Params<'_>, errors: Errors<'_>) -> () = body<R, ToF32>; }
multiversion! { fn bf16(format: Format, part: &Part<'_>, params: Params<'_>, errors: Errors<'_>) -> () = body<R, ToBf16>; }
multiversion! { fn f16(format: Format, part: &Part<'_>, params: Params<'_>, errors: Errors<'_>) -> () = body<R, ToF16>; }

#[inline(always)]
fn body<R: Simd, Step: Round>(format: Format, part: &Part<'_>, params: Params<'_>, errors: Errors<'_>) {
    let Codes::Int { bits, packing, symmetric } = format.codes else { panic!("clipping is for integers") };
    let limits = Limits::of(bits, packing);
    match symmetric {
        true => tiles::<R, Step, _>(part, params, errors, |params| Symmetric::<Step>::new(params.scale, limits)),
        false => tiles::<R, Step, _>(part, params, errors, |params| {
            Asymmetric::<Step>::new(params.scale, params.zero_point, limits)
        }),
    }
}

#[inline(always)]
fn tiles<R: Simd, Step: Round, C: Coder>(
    part: &Part<'_>,
    params: Params<'_>,
    errors: Errors<'_>,
    coder: impl Fn(&Qparams) -> C,
) {
    // Columns counted from the start of the first group.
    let before = part.column - part.column % part.group;
    let mut wide = [0f32; TILE];
    for (first, bytes) in part.tiles().map(|(first, bytes)| (first - before, bytes)) {
        let bytes = in_registers(Level(R::KIND), part.dtype, bytes, &mut wide);
        match part.dtype {
            Dtype::Bf16 if Step::READS_BF16 => {
                of_values::<R, LooseBf16, C>(first, loose(bytes), part.group, params, errors, &coder);
            }
            Dtype::F16 if Step::READS_F16 => {
                of_values::<R, LooseF16, C>(first, loose(bytes), part.group, params, errors, &coder);
            }
            _ if Step::IS_F32 => of_values::<R, LooseF32, C>(first, loose(bytes), part.group, params, errors, &coder),
            dtype => unreachable!("{} is not rounded to a narrower type", dtype.name()),
        }
    }
}

#[inline(always)]
fn of_values<R: Simd, V: Loose, C: Coder>(
    first: usize,
    values: &[V],
    group: usize,
    params: Params<'_>,
    errors: Errors<'_>,
    coder: &impl Fn(&Qparams) -> C,
) {
    for piece in pieces(first, values.len(), group) {
        let values = &values[piece.start..piece.end];
        for (params, error) in params[piece.group].iter().zip(&mut errors[piece.group]) {
            *error += f64::from(noise::<R, V, C>(values, &coder(params)));
        }
    }
}

/// The sum of squared errors of a piece; zeros follow where it fills no whole sixteen.
#[inline(always)]
fn noise<R: Simd, V: Loose, C: Coder>(values: &[V], coder: &C) -> f32 {
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
            let error = R::sub(x, coded.decoded);
            sum = R::add(sum, R::mul(error, error));
        }
        R::store(sum, &mut lanes, from);
    }
    R::sum(&lanes)
}
