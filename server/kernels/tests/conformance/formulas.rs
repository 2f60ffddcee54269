//! Codes, scales, zero points, sums and decoded values are what the oracle says, of every format at every level.

use proptest::prelude::*;
use quarrel_kernels::Dtype;

use crate::{
    asked,
    channel::{Case, Grid, Places, channel},
    data::{ARITHS, Element, FORMATS, GROUPS, anchored, elements, grid, scales, store},
    oracle,
};

/// Runs each level over the elements, and the oracle.
fn check(case: &Case, bytes: &[u8], given: Option<&Grid>) {
    let expected = oracle::channel(case, bytes, given);
    for level in asked::levels() {
        let outcome = channel(*level, case, bytes, given, Places::OWN);
        outcome.assert_agrees(&expected, || format!("{level:?}, {case:?}"));
        let metrics = outcome.sums.metrics();
        let all = [metrics.mse, metrics.sqnr_db, metrics.cosine, Some(metrics.max_abs_error), Some(metrics.amax)];
        assert!(all.iter().flatten().all(|metric| !metric.is_nan()), "{level:?}, {case:?}: {metrics:?}");
    }
}

fn cases(dtype: Dtype, group: usize) -> impl Iterator<Item = Case> {
    FORMATS.into_iter().flat_map(move |format| ARITHS.map(|arith| Case { format, arith, dtype, group }))
}

fn dtypes() -> impl Strategy<Value = Dtype> {
    // The narrower a type, the fewer of its numbers are hard: half of the cases are f32.
    prop_oneof![5 => Just(Dtype::F32), 5 => prop::sample::select(&Dtype::ALL[1..])]
}

proptest! {
    #![proptest_config(asked::cases(400))]

    #[test]
    fn a_channel_is_coded_as_the_formula_says(
        elements in elements(), dtype in dtypes(), group in prop::sample::select(&GROUPS[..]), scale in scales(),
    ) {
        for case in cases(dtype, group) {
            check(&case, &store(dtype, &anchored(&case, &elements, scale)), None);
        }
    }

    #[test]
    fn elements_are_coded_on_a_given_grid_as_the_formula_says(
        elements in elements(),
        dtype in dtypes(),
        group in prop::sample::select(&GROUPS[..]),
        scales in prop::collection::vec(scales(), 1..20),
        global in scales(),
    ) {
        for case in cases(dtype, group) {
            let grid = grid(&case, elements.len().div_ceil(group), &scales, global);
            let value = |(index, element): (usize, &Element)| {
                let zero_point = grid.zero_points.get(index / group).copied().unwrap_or(0);
                let scale = grid.scales[index / group] / grid.global;
                element.value(case.format.codes, scale, zero_point)
            };
            let values: Vec<f32> = elements.iter().enumerate().map(value).collect();
            check(&case, &store(dtype, &values), Some(&grid));
        }
    }

    #[test]
    fn a_number_that_is_none_makes_its_group_unfit(
        elements in elements(), dtype in dtypes(), group in prop::sample::select(&GROUPS[..]),
        at: prop::sample::Index, bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
    ) {
        prop_assume!(!elements.is_empty());
        for case in cases(dtype, group) {
            let mut bytes = store(dtype, &anchored(&case, &elements, 1.0));
            let at = at.index(elements.len()) * dtype.bytes();
            bytes[at..at + dtype.bytes()].copy_from_slice(&non_finite(dtype, bad));
            check(&case, &bytes, None);
        }
    }
}

/// A number that is none, in a type.
pub fn non_finite(dtype: Dtype, bad: f32) -> Vec<u8> {
    match dtype {
        Dtype::F32 => bad.to_le_bytes().to_vec(),
        Dtype::F64 if bad.is_infinite() => (f64::from(f32::MAX) * 1.5).copysign(bad.into()).to_le_bytes().to_vec(),
        Dtype::F64 => f64::from(bad).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32_const(bad).to_le_bytes().to_vec(),
        Dtype::Bf16 => half::bf16::from_f32_const(bad).to_le_bytes().to_vec(),
        Dtype::F8E4m3 => vec![if bad.is_sign_negative() { 0xff } else { 0x7f }],
        Dtype::F8E5m2 => vec![half::f16::from_f32_const(bad).to_le_bytes()[1]],
    }
}
