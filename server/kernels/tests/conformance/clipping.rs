//! The errors under narrower ranges: those of the codes that would be written, the same at every level.

use proptest::prelude::*;
use quarrel_kernels::{
    Arith, CLIPS, Codes, Dtype, Format, Importance, Packing, Part, Range, Scaler, Scaling, TILE, clipped,
    squared_errors,
};

use crate::{
    asked,
    channel::{Case, Grid},
    data::{ARITHS, FORMATS, GROUPS, numbers, store},
    oracle,
};

fn scaler(case: &Case) -> Scaler {
    Scaler { format: case.format, arith: case.arith, dtype: case.dtype, global: 1.0 }
}

fn integers() -> impl Iterator<Item = Format> {
    FORMATS.into_iter().filter(|format| matches!(format.codes, Codes::Int { .. }))
}

/// Each group's errors under each range, from every level, which agree.
fn check(case: &Case, bytes: &[u8]) -> Vec<[f64; CLIPS]> {
    let params: Vec<_> = ranges(case, bytes).map(|range| clipped(scaler(case), range)).collect();
    let part =
        Part { dtype: case.dtype, bytes, column: 0, group: case.group, ahead: &[], importance: Importance::NONE };
    let errors = |level| {
        let mut errors = vec![[0.0; CLIPS]; params.len()];
        squared_errors(level, case.format, case.arith, &part, &params, &mut errors);
        errors
    };
    let scalar = errors(asked::scalar());
    // The same of a part that begins within the channel: its first group's errors are added to those before.
    let at = TILE * case.dtype.bytes();
    if bytes.len() > at {
        let mut cut = vec![[0.0; CLIPS]; params.len()];
        let first = Part { bytes: &bytes[..at], ..part };
        squared_errors(asked::scalar(), case.format, case.arith, &first, &params, &mut cut);
        let group = TILE / case.group;
        let second = Part { bytes: &bytes[at..], column: TILE, ..part };
        squared_errors(asked::scalar(), case.format, case.arith, &second, &params[group..], &mut cut[group..]);
        assert_eq!(cut, scalar, "{case:?}");
    }
    for level in asked::levels() {
        let bits =
            |errors: &[[f64; CLIPS]]| errors.as_flattened().iter().map(|error| error.to_bits()).collect::<Vec<_>>();
        assert!(bits(&errors(*level)) == bits(&scalar), "{level:?}, {case:?}");
    }
    scalar
}

fn ranges(case: &Case, bytes: &[u8]) -> impl Iterator<Item = Range> {
    let values = oracle::read(case.dtype, bytes);
    let groups: Vec<Vec<f32>> = values.chunks(case.group).map(<[f32]>::to_vec).collect();
    groups.into_iter().map(|group| {
        let end = |of: fn(f32, f32) -> f32| group.iter().copied().fold(0.0, of);
        Range { min: end(f32::min), max: end(f32::max), finite: true }
    })
}

#[test]
fn every_level_finds_the_same_errors_at_every_length() {
    for len in asked::lengths() {
        for (turn, format) in integers().enumerate() {
            let dtype = Dtype::ALL[(len + turn) % 6];
            let arith = ARITHS[len % 2];
            check(&Case { format, arith, dtype, group: GROUPS[(len + turn) % 7] }, &store(dtype, &numbers(len, len)));
        }
    }
}

#[test]
fn the_widest_range_is_the_groups_own_and_the_narrowest_a_quarter() {
    let format =
        Format { codes: Codes::Int { bits: 4, symmetric: false, packing: Packing::Dense }, scaling: Scaling::Weights };
    let range = Range { min: -3.0, max: 5.0, finite: true };
    let quarter = Range { min: -0.75, max: 1.25, finite: true };
    let scaler = Scaler { format, arith: Arith::F32, dtype: Dtype::Bf16, global: 1.0 };
    let all = clipped(scaler, range);
    assert_eq!(all[0], scaler.qparams(range).unwrap());
    assert_eq!(all[CLIPS - 1], scaler.qparams(quarter).unwrap());
}

#[test]
fn a_range_whose_scale_overflows_has_the_next_narrower_one() {
    let format =
        Format { codes: Codes::Int { bits: 4, symmetric: false, packing: Packing::Dense }, scaling: Scaling::Weights };
    // Their difference is beyond f32 until they are about half as large.
    let scaler = Scaler { format, arith: Arith::F32, dtype: Dtype::F32, global: 1.0 };
    let all = clipped(scaler, Range { min: -3e38, max: 3e38, finite: true });
    let params = |part: f32| {
        let range = Range { min: -3e38 * part, max: 3e38 * part, finite: true };
        scaler.qparams(range)
    };
    let fits = (0..CLIPS).find(|clip| params((64 - clip) as f32 / 64.0).is_ok()).unwrap();
    assert!(fits > 0 && all[..fits].iter().all(|params| *params == all[fits]), "{:?}", &all[..=fits]);
}

proptest! {
    #![proptest_config(asked::cases(100))]

    #[test]
    fn an_error_is_that_of_the_codes_under_its_scale(
        values in prop::collection::vec(-1f32..1.0, 1..300),
        exponent in -6..6,
        dtype in prop::sample::select(&Dtype::ALL[..4]),
        group in prop::sample::select(&GROUPS[..]),
    ) {
        let values: Vec<f32> = values.iter().map(|value| value * 10f32.powi(if dtype == Dtype::F16 { 1 } else { exponent })).collect();
        let bytes = store(dtype, &values);
        for (format, arith) in integers().flat_map(|format| ARITHS.map(|arith| (format, arith))) {
            let case = Case { format, arith, dtype, group };
            let errors = check(&case, &bytes);
            let params: Vec<_> = ranges(&case, &bytes).map(|range| clipped(scaler(&case), range)).collect();
            for (index, bytes) in bytes.chunks(group.saturating_mul(dtype.bytes())).enumerate() {
                for at in [0, 20, CLIPS - 1] {
                    let qparams = params[index][at];
                    let zero_points = if format.codes.symmetric() { vec![] } else { vec![qparams.zero_point] };
                    let grid = Grid { scales: vec![qparams.scale], zero_points, global: 1.0 };
                    let noise = oracle::channel(&case, bytes, Some(&grid)).sums.noise;
                    let error = errors[index][at];
                    prop_assert!((error - noise).abs() <= 1e-5 * noise + 1e-12 * f64::from(qparams.scale).powi(2), "{error:e} instead of {noise:e}: {case:?}");
                }
            }
        }
    }
}
