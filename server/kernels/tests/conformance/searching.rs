//! The errors under scales that are tried: those of the codes that would be written, the same at every level.

use proptest::prelude::*;
use quarrel_kernels::{
    Arith, Codes, Dtype, Format, Importance, Packing, Part, Qparams, Range, Scaler, Scaling, Search, TILE, errors,
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

const SEARCHES: [Search; 2] = [Search::Mse, Search::Hqq];

/// What every level tries alike.
fn tried(search: Search, scaler: Scaler, range: Range) -> Vec<Qparams> {
    let of = |level| {
        let mut all = vec![Qparams { scale: 0.0, zero_point: 0 }; search.tried(scaler.format.codes)];
        search.write(level, scaler, range, &mut all);
        all
    };
    let scalar = of(asked::scalar());
    for level in asked::levels() {
        assert_eq!(of(*level), scalar, "{level:?}, {search:?}, {range:?}");
    }
    scalar
}

/// Each group's errors under what is tried, from every level, which agree.
fn check(search: Search, case: &Case, bytes: &[u8]) -> Vec<f64> {
    let params: Vec<_> = ranges(case, bytes).flat_map(|range| tried(search, scaler(case), range)).collect();
    let part =
        Part { dtype: case.dtype, bytes, column: 0, group: case.group, ahead: &[], importance: Importance::NONE };
    let format = (case.format, case.arith);
    let found = |level| {
        let mut found = vec![0.0; params.len()];
        errors(level, search, format, &part, &params, &mut found);
        found
    };
    let scalar = found(asked::scalar());
    // The same of a part that begins within the channel: its first group's errors are added to those before.
    let at = TILE * case.dtype.bytes();
    if bytes.len() > at {
        let mut cut = vec![0.0; params.len()];
        let first = Part { bytes: &bytes[..at], ..part };
        errors(asked::scalar(), search, format, &first, &params, &mut cut);
        let from = TILE / case.group * search.tried(case.format.codes);
        let second = Part { bytes: &bytes[at..], column: TILE, ..part };
        errors(asked::scalar(), search, format, &second, &params[from..], &mut cut[from..]);
        assert_eq!(cut, scalar, "{case:?}");
    }
    for level in asked::levels() {
        let bits = |errors: &[f64]| errors.iter().map(|error| error.to_bits()).collect::<Vec<_>>();
        assert!(bits(&found(*level)) == bits(&scalar), "{level:?}, {search:?}, {case:?}");
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
            let case = Case { format, arith, dtype, group: GROUPS[(len + turn) % 7] };
            check(SEARCHES[(len / 2 + turn) % 2], &case, &store(dtype, &numbers(len, len)));
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
    let all = tried(Search::Mse, scaler, range);
    assert_eq!(all[0], scaler.qparams(range).unwrap());
    assert_eq!(all[48], scaler.qparams(quarter).unwrap());
}

#[test]
fn a_range_whose_scale_overflows_has_the_next_narrower_one() {
    let format =
        Format { codes: Codes::Int { bits: 4, symmetric: false, packing: Packing::Dense }, scaling: Scaling::Weights };
    // Their difference is beyond f32 until they are about half as large.
    let scaler = Scaler { format, arith: Arith::F32, dtype: Dtype::F32, global: 1.0 };
    let all = tried(Search::Mse, scaler, Range { min: -3e38, max: 3e38, finite: true });
    let params = |part: f32| {
        let range = Range { min: -3e38 * part, max: 3e38 * part, finite: true };
        scaler.qparams(range)
    };
    let fits = (0..49).find(|clip| params((64 - clip) as f32 / 64.0).is_ok()).unwrap();
    assert!(fits > 0 && all[..fits].iter().all(|params| *params == all[fits]), "{:?}", &all[..=fits]);
}

#[test]
fn hqq_tries_zero_points_on_both_sides_of_the_real_one() {
    let codes = |symmetric| Codes::Int { bits: 4, symmetric, packing: Packing::Dense };
    let format = |symmetric| Format { codes: codes(symmetric), scaling: Scaling::Weights };
    let scaler = Scaler { format: format(false), arith: Arith::F32, dtype: Dtype::F32, global: 1.0 };
    let range = Range { min: -3.0, max: 5.0, finite: true };
    let all = tried(Search::Hqq, scaler, range);
    assert_eq!(all[0].scale, 8.0 / 15.0);
    for pair in all.as_chunks::<2>().0 {
        assert_eq!(pair[0].scale, pair[1].scale);
        let exact = -0.5 - 1.0 / pair[0].scale;
        let mut points = pair.map(|params| params.zero_point as f32);
        assert!((points[0] - exact).abs() <= 0.5, "{points:?} beside {exact}");
        points.sort_by(f32::total_cmp);
        assert!(points[0] <= exact && exact <= points[1] && points[1] - points[0] == 1.0, "{points:?} beside {exact}");
    }
    // Subnormal in f16: its steps are as large as the scale.
    let small = Range { min: -3.1e-6, max: 5.3e-6, finite: true };
    let coarse = Scaler { dtype: Dtype::F16, ..scaler };
    let observed = coarse.qparams(small).unwrap();
    assert_eq!(tried(Search::Hqq, coarse, small)[0], observed);
    let widths = all.as_chunks::<2>().0.iter().map(|pair| 8.0 / pair[0].scale);
    let expected = [15.0, 15.4, 14.6, 15.8, 14.2, 16.2, 13.8, 16.6, 17.2, 18.0];
    assert!(widths.zip(expected).all(|(width, expected)| (width - expected).abs() < 1e-4), "{all:?}");
    // Of more bits more, of which most are wider.
    for (bits, step, below) in [(5, 0.35, 11), (6, 0.4, 16), (7, 0.5, 18), (8, 0.6, 20)] {
        let codes = Codes::Int { bits, symmetric: false, packing: Packing::Dense };
        let all = tried(Search::Hqq, Scaler { format: Format { codes, scaling: Scaling::Weights }, ..scaler }, range);
        let steps = (1 << bits) - 1;
        assert_eq!((all.len(), all[0].scale), (48, 8.0 / steps as f32));
        let more = all.as_chunks::<2>().0.iter().map(|pair| 8.0 / pair[0].scale - steps as f32);
        let mut expected: Vec<i32> = (-below..24 - below).filter(|at| *at != 0).collect();
        expected.insert(0, 0);
        assert!(more.zip(expected).all(|(more, at)| (more - at as f32 * step).abs() < 1e-3), "{bits}: {all:?}");
    }
    let symmetric = tried(Search::Hqq, Scaler { format: format(true), ..scaler }, range);
    assert!(symmetric.iter().all(|params| params.zero_point == 0));
    assert_eq!(symmetric[0].scale, 5.0 / 7.5);
    // Nothing is zero: exactly what is coded.
    let zeros = tried(Search::Hqq, scaler, Range { min: 0.0, max: 0.0, finite: true });
    assert_eq!(zeros[0], Qparams { scale: f32::EPSILON, zero_point: 0 });
    // One side only: the points stay within the codes.
    for range in [Range { min: 0.0, max: 1.0, finite: true }, Range { min: -1.0, max: 0.0, finite: true }] {
        assert!(tried(Search::Hqq, scaler, range).iter().all(|params| (-8..=7).contains(&params.zero_point)));
    }
}

#[test]
fn hqq_takes_the_observed_scale_where_a_wider_one_overflows() {
    let format =
        Format { codes: Codes::Int { bits: 2, symmetric: false, packing: Packing::Dense }, scaling: Scaling::Weights };
    let scaler = Scaler { format, arith: Arith::F32, dtype: Dtype::F16, global: 1.0 };
    let range = Range { min: -65504.0, max: 65504.0, finite: true };
    let observed = scaler.qparams(range).unwrap().scale;
    let all = tried(Search::Hqq, scaler, range);
    // 1.2 codes less than three are too few for f16, 0.8 are not.
    assert_eq!(all[6 * 2].scale, observed);
    assert!(all[4 * 2].scale > observed && all.iter().all(|params| params.scale.is_finite()), "{all:?}");
}

#[test]
fn scales_without_a_reciprocal_are_divided_by() {
    let format =
        Format { codes: Codes::Int { bits: 4, symmetric: false, packing: Packing::Dense }, scaling: Scaling::Weights };
    let case = Case { format, arith: Arith::F32, dtype: Dtype::F32, group: 32 };
    // The last is among subnormal numbers: the reciprocal of its scale is infinite.
    for unit in [1.0, 1e33, 1e-33, 1e-38] {
        let values: Vec<f32> = numbers(64, 7).iter().map(|value| value.clamp(-1.0, 1.0) * unit).collect();
        let bytes = store(Dtype::F32, &values);
        let errors = check(Search::Hqq, &case, &bytes);
        let tried = ranges(&case, &bytes).flat_map(|range| tried(Search::Hqq, scaler(&case), range));
        for (at, (params, error)) in tried.zip(errors).enumerate() {
            let (scale, zero) = (f64::from(params.scale), f64::from(params.zero_point));
            let each = values.chunks(32).nth(at / 20).unwrap().iter().map(|value| {
                let code = (f64::from(*value) / scale + zero).round_ties_even().clamp(-8.0, 7.0);
                (f64::from(*value) - (code - zero) * scale).abs()
            });
            let expected: f64 = each.sum();
            assert!(
                (error - expected).abs() <= 1e-5 * expected + 1e-4 * scale,
                "{unit:e}: {error:e}, not {expected:e}"
            );
        }
    }
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
            let search = SEARCHES[usize::from(format.codes.bits()) % 2];
            let errors = check(search, &case, &bytes);
            let params: Vec<_> = ranges(&case, &bytes).flat_map(|range| tried(search, scaler(&case), range)).collect();
            for (index, bytes) in bytes.chunks(group.saturating_mul(dtype.bytes())).enumerate() {
                let each = search.tried(format.codes);
                for at in [0, 7, each - 1].map(|at| index * each + at) {
                    let qparams = params[at];
                    let zero_points = if format.codes.symmetric() { vec![] } else { vec![qparams.zero_point] };
                    let grid = Grid { scales: vec![qparams.scale], zero_points, global: 1.0 };
                    let [decoded, ..] = oracle::channel(&case, bytes, Some(&grid)).decoded;
                    let decoded = oracle::read(Dtype::F32, &decoded);
                    let each = oracle::read(dtype, bytes).into_iter().zip(decoded).map(|(x, y)| f64::from(x - y).abs());
                    let scale = f64::from(qparams.scale);
                    let (noise, unit) = match search {
                        Search::Mse => (each.map(|error| error * error).sum::<f64>(), 1e-12 * scale.powi(2)),
                        // A quotient of up to 2^bits codes is off by half of its last place, twice.
                        Search::Hqq => {
                            let off = f64::from(format.codes.bits()).exp2() * f64::from(f32::EPSILON);
                            (each.sum(), off * scale * group.min(values.len()) as f64)
                        }
                    };
                    let error = errors[at];
                    prop_assert!((error - noise).abs() <= 1e-5 * noise + unit, "{error:e} instead of {noise:e}: {case:?}");
                }
            }
        }
    }
}
