//! Metrics follow from sums; what is not defined is `None`, and nothing is NaN.

use quarrel_kernels::{Arith, Codes, Dtype, Format, MxRule, Packing, Scaling, Sums};

use crate::{
    asked,
    channel::{Case, Grid, Places, channel},
    data::{FORMATS, numbers, store},
    oracle,
};

/// The sums of `values`, coded by a format as one group.
fn sums(format: Format, values: &[f32], given: Option<&Grid>) -> Sums {
    let case = Case { format, arith: Arith::F32, dtype: Dtype::F32, group: usize::MAX };
    channel(*asked::levels().last().unwrap(), &case, &store(Dtype::F32, values), given, Places::OWN).sums
}

const INT4: Format =
    Format { codes: Codes::Int { bits: 4, symmetric: true, packing: Packing::Dense }, scaling: Scaling::Weights };

#[test]
fn metrics_are_those_of_the_sums() {
    for format in FORMATS {
        let sums = sums(format, &numbers(1000, 0), None);
        let metrics = sums.metrics();
        let near = |got: Option<f64>, expected: f64| (got.unwrap() - expected).abs() <= 1e-12 * expected.abs();
        assert!(near(metrics.mse, sums.noise / 1000.0));
        assert!(near(metrics.sqnr_db, 10.0 * (sums.signal / sums.noise).log10()));
        assert!(near(metrics.cosine, sums.product / (sums.signal * sums.decoded).sqrt()));
        assert_eq!(metrics.max_abs_error, f64::from(sums.max_abs_error));
        assert_eq!(metrics.amax, f64::from(sums.amax));
        assert_eq!((metrics.elements, metrics.saturated), (1000, sums.saturated));
    }
}

#[test]
fn sums_are_within_a_millionth_at_every_magnitude() {
    // A tile whose groups are alike, and tiles whose groups grow smaller, so that the squares of some are lost before those of
    // others.
    for (format, shrinking) in FORMATS.into_iter().flat_map(|format| [0, 1, 5].map(|shrinking| (format, shrinking))) {
        for exponent in (-149..128).step_by(asked::stride(11)) {
            let case = Case { format, arith: Arith::F32, dtype: Dtype::F32, group: 32 };
            let unit = |index: usize| 0.31 * 2f64.powi(exponent - shrinking * (index / 32) as i32);
            let values: Vec<f32> = numbers(256, 0)
                .iter()
                .enumerate()
                .map(|(index, value)| (f64::from(*value) * unit(index)) as f32)
                .collect();
            let bytes = store(case.dtype, &values);
            let outcome = channel(*asked::levels().last().unwrap(), &case, &bytes, None, Places::OWN);
            outcome.assert_agrees(&oracle::channel(&case, &bytes, None), || format!("2^{exponent}, {case:?}"));
        }
    }
}

#[test]
fn what_is_undefined_is_none() {
    let one = Grid { scales: vec![1.0], zero_points: vec![], global: 1.0 };
    let of = |values: &[f32]| {
        let metrics = sums(INT4, values, Some(&one)).metrics();
        (metrics.mse, metrics.sqnr_db, metrics.cosine)
    };
    assert_eq!(of(&[]), (None, None, None), "no elements");
    assert_eq!(of(&[0.0, -0.0]), (Some(0.0), None, None), "no signal and no noise");
    assert_eq!(of(&[1.0, 0.0, -1.0, 0.0, 1.0, 1.0]), (Some(0.0), None, Some(1.0)), "no noise");
    assert_eq!(of(&[0.25, -0.25]), (Some(0.0625), Some(0.0), None), "all lost");
    assert_eq!(Sums::default().metrics(), sums(INT4, &[], Some(&one)).metrics());
}

#[test]
fn an_element_that_decodes_to_infinity_makes_no_metric_nan() {
    // Of the greatest f32, -127.5 steps round to -128, which are more than an f32 holds.
    for scaling in [Scaling::Weights, Scaling::E8m0(MxRule::Even), Scaling::E8m0(MxRule::Rceil)] {
        for format in FORMATS.into_iter().filter(|format| format.scaling == scaling && format.codes.symmetric()) {
            let metrics = sums(format, &[-f32::MAX, 1.0], None).metrics();
            let all = [metrics.mse, metrics.sqnr_db, metrics.cosine, Some(metrics.max_abs_error), Some(metrics.amax)];
            assert!(all.iter().flatten().all(|metric| !metric.is_nan()), "{format:?}: {metrics:?}");
        }
    }
}

#[test]
fn sums_of_two_sets_are_those_of_both() {
    let values = numbers(512, 0);
    let whole = sums(INT4, &values, Some(&Grid { scales: vec![0.3], zero_points: vec![], global: 1.0 }));
    let half = |values| sums(INT4, values, Some(&Grid { scales: vec![0.3], zero_points: vec![], global: 1.0 }));
    assert_eq!(half(&values[..256]).then(&half(&values[256..])), whole);
    assert_eq!(Sums::default().then(&whole), whole);
    assert_eq!(whole.then(&Sums::default()), whole);
}
