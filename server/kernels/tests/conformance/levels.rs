//! Every level gives the bits of the scalar one, at any length and alignment.

use quarrel_kernels::Dtype;

use crate::{
    asked,
    channel::{Case, Places, channel},
    data::{ARITHS, FORMATS, GROUPS, numbers, store},
    oracle,
    place::Place,
};

#[test]
fn every_level_gives_the_bits_of_the_scalar_one_at_every_length() {
    for len in asked::lengths() {
        for (of, dtype) in Dtype::ALL.into_iter().enumerate() {
            // Ten kinds of numbers and seven groups: each length meets each kind and, with it, different groups.
            let bytes = store(dtype, &numbers(len, len + of));
            for (turn, format) in FORMATS.into_iter().enumerate() {
                let groups = if dtype == Dtype::F32 { &GROUPS[..] } else { &GROUPS[(len + of + turn) % 7..][..1] };
                for (group, arith) in groups.iter().flat_map(|group| ARITHS.map(|arith| (*group, arith))) {
                    let case = Case { format, arith, dtype, group };
                    let scalar = channel(asked::scalar(), &case, &bytes, None, Places::OWN);
                    for level in asked::levels() {
                        let what = || format!("{len} elements, {level:?}, {case:?}");
                        channel(*level, &case, &bytes, None, Places::OWN).assert_same(&scalar, what);
                    }
                }
            }
        }
    }
}

#[test]
fn every_length_is_coded_as_the_formula_says() {
    // Codes are packed 2,048 at a time.
    for len in asked::lengths().chain([2_047, 2_048, 2_049, 4_173]) {
        let bytes = store(Dtype::F32, &numbers(len, len * 3));
        for (turn, format) in FORMATS.into_iter().enumerate() {
            let case = Case { format, arith: ARITHS[len % 2], dtype: Dtype::F32, group: GROUPS[(len + turn) % 7] };
            let level = asked::levels()[(len + turn) % asked::levels().len()];
            let outcome = channel(level, &case, &bytes, None, Places::OWN);
            outcome.assert_agrees(&oracle::channel(&case, &bytes, None), || format!("{len} elements, {case:?}"));
        }
    }
}

/// Every length at every alignment and level; each format meets each element type and group in turn. A quarter of the formats,
/// so that the tests run beside each other.
fn alignment_changes_nothing(quarter: usize) {
    for len in asked::lengths() {
        for (turn, format) in FORMATS.into_iter().enumerate().filter(|(turn, _)| turn % 4 == quarter) {
            let dtype = Dtype::ALL[(len + turn) % 6];
            let case = Case { format, arith: ARITHS[(len + turn) / 6 % 2], dtype, group: GROUPS[(len + turn) % 7] };
            let bytes = store(dtype, &numbers(len, len));
            let aligned = channel(asked::scalar(), &case, &bytes, None, Places::OWN);
            for shift in (0..64).step_by(asked::stride(13)) {
                // Each buffer meets each alignment, and the three never the same.
                let [input, packed, decoded] =
                    [shift, shift * 5 + 21, shift * 9 + 42].map(|by| Place::Shifted(by % 64));
                let places = Places { input, packed, decoded, grid: Place::Shifted(shift * 3 % 16) };
                for level in asked::levels() {
                    let what = || format!("{len} elements, {level:?}, {case:?}, {places:?}");
                    channel(*level, &case, &bytes, None, places).assert_same(&aligned, what);
                }
            }
        }
    }
}

#[test]
fn alignment_changes_nothing_and_nothing_is_written_beside_a_buffer_of_a_first_quarter_of_formats() {
    alignment_changes_nothing(0);
}

#[test]
fn alignment_changes_nothing_and_nothing_is_written_beside_a_buffer_of_a_second_quarter() {
    alignment_changes_nothing(1);
}

#[test]
fn alignment_changes_nothing_and_nothing_is_written_beside_a_buffer_of_a_third_quarter() {
    alignment_changes_nothing(2);
}

#[test]
fn alignment_changes_nothing_and_nothing_is_written_beside_a_buffer_of_a_last_quarter() {
    alignment_changes_nothing(3);
}
