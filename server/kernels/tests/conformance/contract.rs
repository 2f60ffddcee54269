//! A caller's mistake panics, as the documentation says, and is not passed over.

use std::panic::{AssertUnwindSafe, catch_unwind};

use quarrel_kernels::{
    Arith, Coded, Codes, Decoded, Dtype, Format, Grid, Importance, Packing, Part, Range, Scaling, convert, dequantize,
    encode, packed_bytes, quantize, ranges,
};

use crate::{asked, data::ARITHS};

/// 600 elements, so more than two tiles, in groups of 100; asymmetric, so with zero points.
const COLUMNS: usize = 600;
const GROUP: usize = 100;
const INT4: Format =
    Format { codes: Codes::Int { bits: 4, symmetric: false, packing: Packing::Dense }, scaling: Scaling::Weights };

/// How long each buffer is.
#[derive(Debug, Clone, Copy)]
struct Lengths {
    ranges: usize,
    scales: usize,
    zero_points: usize,
    packed: usize,
    decoded: usize,
}

const RIGHT: Lengths =
    Lengths { ranges: 6, scales: 6, zero_points: 6, packed: COLUMNS / 2, decoded: COLUMNS * size_of::<f32>() };

#[derive(Debug, Clone, Copy, PartialEq)]
enum Op {
    Ranges,
    Quantize,
    Encode,
    Dequantize,
    Convert,
}

/// Whether an op panics on buffers of such lengths, at any level.
fn check(op: Op, lengths: Lengths) -> bool {
    let bytes = vec![0; COLUMNS * 4];
    let part =
        Part { dtype: Dtype::F32, bytes: &bytes, column: 0, group: GROUP, ahead: &[], importance: Importance::NONE };
    let (scales, zero_points) = (vec![1.0; lengths.scales], vec![0; lengths.zero_points]);
    let grid = Grid { scales: &scales, magnitudes: &[], zero_points: &zero_points, global: 1.0 };
    let panicked = asked::levels().iter().map(|level| {
        let mut found = vec![Range::default(); lengths.ranges];
        let (mut packed, mut decoded) = (vec![0; lengths.packed], vec![0; lengths.decoded]);
        let run = || match op {
            Op::Ranges => ranges(*level, INT4.codes, &part, &mut found),
            Op::Quantize => drop(quantize(*level, INT4, Arith::F32, &part, grid, &mut packed)),
            Op::Encode => encode(*level, INT4, &part, grid, &mut packed),
            Op::Dequantize => {
                let coded = Coded { codes: INT4.codes, packed: &packed, column: 0, group: GROUP, grid };
                dequantize(*level, &coded, Decoded::F32, &mut decoded);
            }
            Op::Convert => convert(*level, Dtype::F32, &bytes, Decoded::F32, &mut decoded),
        };
        catch_unwind(AssertUnwindSafe(run)).is_err()
    });
    let panicked: Vec<bool> = panicked.collect();
    assert!(panicked.iter().all(|this| *this == panicked[0]), "{op:?}: levels differ");
    panicked[0]
}

#[test]
fn buffers_that_are_too_short_panic() {
    assert_eq!(packed_bytes(INT4.codes, COLUMNS), RIGHT.packed);
    for op in [Op::Ranges, Op::Quantize, Op::Encode, Op::Dequantize, Op::Convert] {
        assert!(!check(op, RIGHT), "{op:?}");
    }
    // One less; less by the whole last tile, of 88 columns; and none. No zero points mean that there are none.
    let cases = [
        (Op::Ranges, [5, 3, 0].map(|ranges| Lengths { ranges, ..RIGHT }).to_vec()),
        (Op::Quantize, [299, 256, 0].map(|packed| Lengths { packed, ..RIGHT }).to_vec()),
        (Op::Quantize, [5, 3, 0].map(|scales| Lengths { scales, ..RIGHT }).to_vec()),
        (Op::Quantize, [5, 3].map(|zero_points| Lengths { zero_points, ..RIGHT }).to_vec()),
        (Op::Encode, [299, 256, 0].map(|packed| Lengths { packed, ..RIGHT }).to_vec()),
        (Op::Encode, [5, 3, 0].map(|scales| Lengths { scales, ..RIGHT }).to_vec()),
        (Op::Encode, [5, 3].map(|zero_points| Lengths { zero_points, ..RIGHT }).to_vec()),
        (Op::Dequantize, [299, 256, 0].map(|packed| Lengths { packed, ..RIGHT }).to_vec()),
        (Op::Dequantize, [5, 3, 0].map(|scales| Lengths { scales, ..RIGHT }).to_vec()),
        (Op::Dequantize, [5, 3].map(|zero_points| Lengths { zero_points, ..RIGHT }).to_vec()),
        (Op::Convert, [2399, 2048, 0].map(|decoded| Lengths { decoded, ..RIGHT }).to_vec()),
    ];
    let silent: Vec<_> = cases
        .iter()
        .flat_map(|(op, lengths)| lengths.iter().map(|lengths| (*op, *lengths)))
        .filter(|(op, lengths)| !check(*op, *lengths))
        .collect();
    assert!(silent.is_empty(), "no panic: {silent:#?}");
}

#[test]
fn codes_under_scales_that_they_never_have_panic() {
    // A static, for the reason that `data::FORMATS` is one.
    static ODD: [Format; 4] = [
        Format { codes: Codes::Fp4E2m1, scaling: Scaling::Weights },
        Format { codes: Codes::Fp6E2m3, scaling: Scaling::Weights },
        Format { codes: Codes::Fp8E4m3, scaling: Scaling::E4m3 },
        Format { codes: Codes::Fp6E2m3, scaling: Scaling::E4m3 },
    ];
    let part =
        Part { dtype: Dtype::F16, bytes: &[0; 4], column: 0, group: 2, ahead: &[], importance: Importance::NONE };
    let grid = Grid { scales: &[1.0], magnitudes: &[], zero_points: &[], global: 1.0 };
    for (format, arith) in ODD.iter().flat_map(|odd| ARITHS.map(|arith| (*odd, arith))) {
        let mut out = vec![0; packed_bytes(format.codes, 2)];
        let run = || quantize(asked::scalar(), format, arith, &part, grid, &mut out);
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err(), "{format:?}");
    }
}
