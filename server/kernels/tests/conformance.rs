//! One suite for every format, element type and CPU level: all levels give the bits of the scalar one, at any length and
//! alignment; codes are what the formula says; decoding gives what was measured.

#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;
use quarrel_kernels::{
    Arith, Coded, Codes, Decoded, Dtype, Level, Packing, Part, Range, Sums, bytes_mut, dequantize, packed_bytes,
    qparams, quantize, ranges,
};

fn formats() -> Vec<Codes> {
    let int = |bits, symmetric, packing| Codes::Int { bits, symmetric, packing };
    let dense = (2..=8).flat_map(|bits| [true, false].map(|symmetric| int(bits, symmetric, Packing::Dense)));
    let plain = [true, false].map(|symmetric| int(8, symmetric, Packing::Plain));
    dense.chain(plain).chain([Codes::Fp8E4m3]).collect()
}

/// Values as bytes of a type, each the nearest that the type has.
fn store(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let each = |value: &f32| match dtype {
        Dtype::F32 => value.to_le_bytes().to_vec(),
        Dtype::F64 => f64::from(*value).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32_const(*value).to_le_bytes().to_vec(),
        Dtype::Bf16 => half::bf16::from_f32_const(*value).to_le_bytes().to_vec(),
        // Any byte that is no NaN: exactness is not what these stand here for.
        Dtype::F8E4m3 => vec![(value.to_bits() >> 24) as u8 & 0x7b],
        Dtype::F8E5m2 => vec![(value.to_bits() >> 24) as u8 & 0x7b],
    };
    values.iter().flat_map(each).collect()
}

#[derive(Debug, PartialEq)]
struct Outcome {
    ranges: Vec<Range>,
    scales: Vec<u32>,
    zero_points: Vec<i32>,
    packed: Vec<u8>,
    sums: Sums,
    decoded: Vec<u32>,
}

/// The whole way of one channel: ranges, scales, codes, and back.
fn run(level: Level, codes: Codes, arith: Arith, dtype: Dtype, bytes: &[u8], group: usize) -> Outcome {
    let columns = bytes.len() / dtype.bytes();
    let part = Part { dtype, bytes, column: 0, group };
    let mut found = vec![Range::default(); columns.div_ceil(group)];
    ranges(level, &part, &mut found);
    let params: Vec<_> = found.iter().map(|range| qparams(codes, arith, dtype, *range).unwrap()).collect();
    let scales: Vec<f32> = params.iter().map(|params| params.scale).collect();
    let zero_points: Vec<i32> = match codes.symmetric() {
        true => Vec::new(),
        false => params.iter().map(|params| params.zero_point).collect(),
    };
    let mut packed = vec![0xaa; packed_bytes(codes, columns)];
    let sums = quantize(level, codes, arith, &part, &scales, &zero_points, &mut packed);
    let mut decoded = vec![0f32; columns];
    let coded = Coded { codes, packed: &packed, column: 0, group, scales: &scales, zero_points: &zero_points };
    dequantize(level, &coded, Decoded::F32, bytes_mut(&mut decoded));
    Outcome {
        ranges: found,
        scales: scales.iter().map(|scale| scale.to_bits()).collect(),
        zero_points,
        packed,
        sums,
        decoded: decoded.iter().map(|value| value.to_bits()).collect(),
    }
}

/// Numbers that look random and are the same everywhere.
fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next() * next() * 3.0).collect()
}

#[test]
fn every_level_gives_the_bits_of_the_scalar_one_at_every_length() {
    let levels = Level::available();
    for codes in formats() {
        for dtype in Dtype::ALL {
            for arith in [Arith::F32, Arith::WeightDtype] {
                for len in (0..300).step_by(if dtype == Dtype::F32 { 1 } else { 7 }) {
                    let bytes = store(dtype, &numbers(len, len as u32));
                    for group in [1, 32, 100, 128, len.max(1)] {
                        let scalar = run(levels[0], codes, arith, dtype, &bytes, group);
                        for level in &levels[1..] {
                            let other = run(*level, codes, arith, dtype, &bytes, group);
                            assert_eq!(
                                other, scalar,
                                "{level:?} {codes:?} {dtype:?} {arith:?} {len} elements in {group}s"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn alignment_changes_nothing() {
    for codes in formats() {
        for dtype in Dtype::ALL {
            let bytes = store(dtype, &numbers(300, 7));
            for level in Level::available() {
                let aligned = run(level, codes, Arith::F32, dtype, &bytes, 128);
                for shift in 1..64 {
                    let mut moved = vec![0; shift];
                    moved.extend(&bytes);
                    assert_eq!(run(level, codes, Arith::F32, dtype, &moved[shift..], 128), aligned, "{shift}");
                }
            }
        }
    }
}

#[test]
fn parts_of_a_channel_are_the_channel() {
    let columns = 1_000;
    let bytes = store(Dtype::F32, &numbers(columns, 3));
    for codes in formats() {
        for group in [32, 100, 1_000] {
            let level = Level::detect();
            let whole = run(level, codes, Arith::F32, Dtype::F32, &bytes, group);
            let scales: Vec<f32> = whole.scales.iter().map(|bits| f32::from_bits(*bits)).collect();
            let mut packed = Vec::new();
            for (index, bytes) in bytes.chunks(512 * 4).enumerate() {
                let part = Part { dtype: Dtype::F32, bytes, column: index * 512, group };
                let mut out = vec![0; packed_bytes(codes, bytes.len() / 4)];
                quantize(level, codes, Arith::F32, &part, &scales, &whole.zero_points, &mut out);
                packed.extend(out);
            }
            assert_eq!(packed, whole.packed, "{codes:?} in groups of {group}");
        }
    }
}

proptest! {
    /// The oracle is the formula, element by element in plain f32; and what is decoded is what was measured.
    #[test]
    fn codes_are_what_the_formula_says(
        values in prop::collection::vec(prop_oneof![-1e3f32..1e3, -1e-3f32..1e-3, Just(0.0), Just(-0.0)], 1..200),
        bits in 2u8..=8,
        symmetric: bool,
    ) {
        let codes = Codes::Int { bits, symmetric, packing: if bits == 8 { Packing::Plain } else { Packing::Dense } };
        let outcome = run(Level::detect(), codes, Arith::F32, Dtype::F32, &store(Dtype::F32, &values), values.len());
        let scale = f32::from_bits(outcome.scales[0]);
        let zero_point = outcome.zero_points.first().copied().unwrap_or(0) as f32;
        let (low, high) = codes.limits();
        let mut noise = 0.0;
        for (value, decoded) in values.iter().zip(&outcome.decoded) {
            let code = (value / scale + zero_point).clamp(low, high).round_ties_even();
            let expected = (code - zero_point) * scale;
            let decoded = f32::from_bits(*decoded);
            prop_assert_eq!(decoded, expected);
            noise += (f64::from(*value) - f64::from(decoded)).powi(2);
        }
        prop_assert!((outcome.sums.noise - noise).abs() <= 1e-6 * noise);
        prop_assert_eq!(outcome.sums.elements, values.len() as u64);
        let zero = (0.0 / scale + zero_point).clamp(low, high).round_ties_even();
        prop_assert_eq!((zero - zero_point) * scale, 0.0, "zero is exact");
    }

    #[test]
    fn a_range_is_what_a_fold_says(values in prop::collection::vec(prop::num::f32::ANY, 0..200)) {
        let part_bytes = store(Dtype::F32, &values);
        let part = Part { dtype: Dtype::F32, bytes: &part_bytes, column: 0, group: values.len().max(1) };
        for level in Level::available() {
            let mut found = [Range::default()];
            ranges(level, &part, &mut found);
            let finite = values.iter().all(|value| value.is_finite());
            prop_assert_eq!(found[0].finite, finite);
            if finite {
                prop_assert_eq!(found[0].min, values.iter().copied().fold(0.0, f32::min));
                prop_assert_eq!(found[0].max, values.iter().copied().fold(0.0, f32::max));
            }
        }
    }
}
