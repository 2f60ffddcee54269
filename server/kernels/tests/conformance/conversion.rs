//! Elements of one type in another, and the first that is no number.

use half::{bf16, f16};
use quarrel_kernels::{Coded, Codes, Decoded, Dtype, Grid, convert, dequantize, first_non_finite};

use crate::{asked, formulas::non_finite, oracle, place::Place};

const ALL_DECODED: [Decoded; 3] = [Decoded::F32, Decoded::Bf16, Decoded::F16];

/// Elements to convert: every bit pattern of the narrow types, and of f32 and f64 a sweep, ties and all exponents.
fn all(dtype: Dtype) -> Vec<u8> {
    let singles = || {
        let sweep = (0..=u32::MAX).step_by(65_537 * asked::stride(16));
        // Around every f16 and bf16, and half-way between two.
        let f16s = (0..0x7c00u16).flat_map(|bits| around(f16::from_bits(bits).to_f32_const(), 1 << 12));
        let bf16s = (0..0x7f80u16).flat_map(|bits| around(bf16::from_bits(bits).to_f32_const(), 1 << 15));
        sweep.chain(f16s.chain(bf16s).step_by(asked::stride(16)))
    };
    match dtype {
        Dtype::F32 => singles().flat_map(u32::to_le_bytes).collect(),
        Dtype::F64 => singles().flat_map(|bits| f64::from(f32::from_bits(bits)).to_le_bytes()).collect(),
        Dtype::F16 | Dtype::Bf16 => (0..=u16::MAX).step_by(asked::stride(7)).flat_map(u16::to_le_bytes).collect(),
        Dtype::F8E4m3 | Dtype::F8E5m2 => (0..=u8::MAX).collect(),
    }
}

fn around(value: f32, half_way: u32) -> [u32; 4] {
    let bits = value.to_bits();
    [bits, bits + half_way - 1, bits + half_way, (bits + half_way + 1) | 1 << 31]
}

#[test]
fn every_element_becomes_the_nearest_of_the_other_type() {
    for dtype in Dtype::ALL {
        let bytes = all(dtype);
        let values = oracle::read(dtype, &bytes);
        for decoded in ALL_DECODED {
            let expected: Vec<f32> = values.iter().map(|value| nearest(decoded, *value)).collect();
            for level in asked::levels() {
                let mut out = Place::Shifted(3).room(values.len() * decoded.bytes(), 0xaa);
                convert(*level, dtype, &bytes, decoded, &mut out);
                let got = oracle::read(as_dtype(decoded), &out);
                for ((value, got), expected) in values.iter().zip(got).zip(&expected) {
                    let is_same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
                    let from = value.to_bits();
                    assert!(is_same, "{level:?}: {value:e} ({from:#x}) in {decoded:?}: {got:e}, expected {expected:e}");
                }
            }
        }
    }
}

#[test]
fn every_level_converts_to_the_same_bits() {
    for dtype in Dtype::ALL {
        let bytes = all(dtype);
        for decoded in ALL_DECODED {
            let converted = |level| {
                let mut out = vec![0xaa; bytes.len() / dtype.bytes() * decoded.bytes()];
                convert(level, dtype, &bytes, decoded, &mut out);
                out
            };
            let scalar = converted(asked::scalar());
            for level in asked::levels() {
                let got = converted(*level);
                let at = scalar.iter().zip(&got).position(|(a, b)| a != b).map(|at| at / decoded.bytes());
                assert_eq!(at, None, "{level:?}: {dtype:?} in {decoded:?}");
            }
        }
    }
}

fn nearest(decoded: Decoded, value: f32) -> f32 {
    match decoded {
        Decoded::F32 => value,
        Decoded::Bf16 => bf16::from_f32_const(value).to_f32_const(),
        Decoded::F16 => f16::from_f32_const(value).to_f32_const(),
    }
}

fn as_dtype(decoded: Decoded) -> Dtype {
    match decoded {
        Decoded::F32 => Dtype::F32,
        Decoded::Bf16 => Dtype::Bf16,
        Decoded::F16 => Dtype::F16,
    }
}

#[test]
fn the_first_number_that_is_none_is_found_wherever_it_stands() {
    for dtype in Dtype::ALL {
        assert_eq!(first_non_finite(dtype, &[]), None);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in asked::lengths() {
                let mut bytes = vec![0; 301 * dtype.bytes()];
                bytes[at * dtype.bytes()..][..dtype.bytes()].copy_from_slice(&non_finite(dtype, bad));
                let last = 300 * dtype.bytes();
                bytes[last..].copy_from_slice(&non_finite(dtype, f32::NAN));
                let (found, value) = first_non_finite(dtype, &bytes).unwrap();
                assert_eq!(found, at, "{dtype:?}");
                assert!(!value.is_finite());
            }
        }
    }
}

/// Every byte, those that no weights are coded as among them: another's file may hold NaN.
#[test]
fn every_byte_of_fp8_decodes_to_its_number_or_nan() {
    let bytes: Vec<u8> = (0..=u8::MAX).collect();
    let values = oracle::read(Dtype::F8E4m3, &bytes);
    assert_eq!(values.iter().filter(|value| value.is_nan()).count(), 2);
    for scale in [1.0, 0.37, -2.5] {
        let grid = Grid { scales: &[scale], magnitudes: &[], zero_points: &[], global: 1.0 };
        for (level, decoded) in asked::levels().iter().flat_map(|level| ALL_DECODED.map(|decoded| (*level, decoded))) {
            let mut out = vec![0xaa; bytes.len() * decoded.bytes()];
            let coded = Coded { codes: Codes::Fp8E4m3, packed: &bytes, column: 0, group: 256, grid };
            dequantize(level, &coded, decoded, &mut out);
            let got = oracle::read(as_dtype(decoded), &out);
            for ((byte, value), got) in bytes.iter().zip(&values).zip(got) {
                let expected = nearest(decoded, value * scale);
                let is_same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
                assert!(is_same, "{level:?}: {byte:#x} times {scale} in {decoded:?}: {got}, expected {expected}");
            }
        }
    }
}

/// A small float times a power of two is a bfloat16 as it is, down to where it is not.
#[test]
fn small_floats_times_any_power_of_two_are_rounded_as_any_number() {
    let packed: Vec<u8> = (0..=u8::MAX).collect();
    // Subnormal ones and all others.
    let powers = (0..23).map(|bit| 1 << bit).chain((1..255).map(|exponent| exponent << 23)).map(f32::from_bits);
    for scale in powers.flat_map(|power| [power, -power]) {
        let grid = Grid { scales: &[scale], magnitudes: &[], zero_points: &[], global: 1.0 };
        for codes in [Codes::Fp8E4m3, Codes::Fp6E2m3, Codes::Fp4E2m1] {
            let coded = Coded { codes, packed: &packed, column: 0, group: 256, grid };
            let decoded_to = |level, decoded: Decoded| {
                let mut out = vec![0xaa; 256 * decoded.bytes()];
                dequantize(level, &coded, decoded, &mut out);
                oracle::read(as_dtype(decoded), &out)
            };
            let values = decoded_to(asked::scalar(), Decoded::F32);
            for level in asked::levels() {
                for (value, got) in values.iter().zip(decoded_to(*level, Decoded::Bf16)) {
                    let expected = nearest(Decoded::Bf16, *value);
                    let is_same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
                    assert!(is_same, "{level:?}: {value} of {codes:?} times {scale}: {got}, expected {expected}");
                }
            }
        }
    }
}
