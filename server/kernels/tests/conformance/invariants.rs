//! What must hold whatever the formula: of cuts, of orders, and of what is coded twice.

use proptest::prelude::*;
use quarrel_kernels::{Arith, Codebook, Codes, Dtype, Level, TILE};

use crate::{
    asked,
    channel::{Case, Outcome, Places, channel, in_parts},
    data::{ARITHS, FORMATS, GROUPS, elements, numbers, store},
    oracle,
};

/// One level for each turn: that all give the same is tested elsewhere.
fn level(turn: usize) -> Level {
    asked::levels()[turn % asked::levels().len()]
}

fn whole(level: Level, case: &Case, bytes: &[u8]) -> Outcome {
    channel(level, case, bytes, None, Places::OWN)
}

#[test]
fn a_channel_cut_at_tiles_is_the_channel() {
    let every_tile = |columns: usize| (0..columns).step_by(TILE).collect();
    for (turn, format) in FORMATS.into_iter().enumerate() {
        // Up to 5,000: codes are packed 2,048 at a time.
        let lengths = [(1_000, Dtype::F32), (513, Dtype::Bf16), (768, Dtype::F16), (600, Dtype::F64)];
        let longer = [(2_049, Dtype::F32), (5_000, Dtype::Bf16)].into_iter().skip(usize::from(turn % 3 != 0));
        for (columns, dtype) in lengths.into_iter().chain(longer) {
            for (group, arith) in GROUPS.iter().flat_map(|group| ARITHS.map(|arith| (*group, arith))) {
                let case = Case { format, arith, dtype, group };
                let bytes = store(dtype, &numbers(columns, turn + columns));
                let whole = whole(level(turn), &case, &bytes);
                let what = |cuts: &[usize]| format!("{columns} elements cut at {cuts:?}, {case:?}");
                // Tile by tile, sums are added in the same order; otherwise they are only as near as f64 is.
                let cuts: Vec<usize> = every_tile(columns);
                in_parts(level(turn), &case, &bytes, &cuts).assert_same(&whole, || what(&cuts));
                for cuts in [vec![0], vec![0, TILE], vec![0, 2 * TILE], vec![0, TILE, 3 * TILE]] {
                    in_parts(level(turn), &case, &bytes, &cuts).assert_agrees(&whole, || what(&cuts));
                }
            }
        }
    }
}

#[test]
fn groups_in_another_order_have_the_same_codes_in_that_order() {
    let order = [4, 0, 3, 6, 1, 5, 2];
    for (turn, format) in FORMATS.into_iter().enumerate() {
        for (group, kind) in [1, 16, 32, 100, 128].into_iter().flat_map(|group| [2, 3, 7].map(|kind| (group, kind))) {
            let case = Case { format, arith: Arith::F32, dtype: Dtype::F32, group };
            let values = numbers(7 * group, kind);
            let moved: Vec<f32> = order.iter().flat_map(|from| &values[from * group..][..group]).copied().collect();
            let before = whole(level(turn), &case, &store(case.dtype, &values));
            let after = whole(level(turn), &case, &store(case.dtype, &moved));
            let (before_grid, after_grid) = (before.grid.unwrap(), after.grid.unwrap());
            let codes = |packed: &[u8]| oracle::unpack(format.codes, packed, 7 * group);
            let (before_codes, after_codes) = (codes(&before.packed), codes(&after.packed));
            for (to, from) in order.into_iter().enumerate() {
                assert_eq!(after_grid.scales[to], before_grid.scales[from], "{case:?}");
                assert_eq!(after_grid.zero_points.get(to), before_grid.zero_points.get(from), "{case:?}");
                assert_eq!(after_codes[to * group..][..group], before_codes[from * group..][..group], "{case:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(asked::cases(300))]

    #[test]
    fn what_was_decoded_has_the_same_codes_again(elements in elements(), group in prop::sample::select(&GROUPS[..])) {
        for (turn, format) in FORMATS.into_iter().enumerate() {
            let case = Case { format, arith: Arith::F32, dtype: Dtype::F32, group };
            // Of a scale that is itself subnormal, decoded values have lost bits that the codes have.
            let values: Vec<f32> = elements.iter().map(|element| element.value(format.codes, 0.37, 0)).collect();
            let values: Vec<f32> = values.iter().map(|value| value.clamp(-1e30, 1e30)).collect();
            let first = whole(level(turn), &case, &store(case.dtype, &values));
            let grid = first.grid.unwrap();
            if grid.scales.iter().any(|scale| scale / grid.global < 1e-30) {
                continue;
            }
            let again = channel(level(turn), &case, &first.decoded[0], Some(&grid), Places::OWN);
            let codes = |packed: &[u8]| {
                let mut codes = oracle::unpack(format.codes, packed, values.len());
                // FP4's zero below zero becomes zero, which has no sign there.
                let is_fp4 = matches!(format.codes, Codes::Fp4E2m1 | Codes::Codebook(Codebook::Fp4));
                codes.iter_mut().filter(|code| is_fp4 && **code == 8).for_each(|code| *code = 0);
                codes
            };
            prop_assert_eq!(codes(&again.packed), codes(&first.packed), "{:?}", case);
        }
    }
}

#[test]
fn zero_decodes_to_zero() {
    for (turn, format) in FORMATS.into_iter().enumerate() {
        for (group, arith) in GROUPS.iter().flat_map(|group| ARITHS.map(|arith| (*group, arith))) {
            let mut values = numbers(300, turn);
            values.iter_mut().step_by(3).for_each(|value| *value = 0.0);
            values.iter_mut().step_by(7).for_each(|value| *value = -0.0);
            let case = Case { format, arith, dtype: Dtype::Bf16, group };
            let outcome = whole(level(turn), &case, &store(case.dtype, &values));
            let decoded = oracle::read(Dtype::F32, &outcome.decoded[0]);
            assert!(values.iter().zip(&decoded).all(|(x, y)| *x != 0.0 || *y == 0.0), "{case:?}");
        }
    }
}
