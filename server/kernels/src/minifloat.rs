//! Small floating-point types: a sign, a few bits of exponent, a few of mantissa; subnormals, no infinity.
//!
//! Sources: `float8_e4m3fn`, "FP8 Formats for Deep Learning" (arXiv 2209.05433), table 1; E2M1 and E2M3, "OCP
//! Microscaling Formats (MX) Specification v1.0", section 5.3.

use crate::simd::{One, Simd};

/// A type's parameters. Codes are `sign, exponent, mantissa`, the sign the highest of [`Minifloat::BITS`].
pub(crate) trait Minifloat {
    /// Bits of a code.
    const BITS: u32;
    /// Bits of its mantissa.
    const MANTISSA: u32;
    /// The exponent of the smallest normal number, 2^e, as f32 stores it: e + 127.
    const LEAST: u32;
    /// The largest finite value.
    const MAX: f32;
    /// Whether the magnitude after the largest is NaN.
    const HAS_NAN: bool;
    /// Whether -0.0 has the code of 0.0, and only numbers below zero have a sign: compressed-tensors' way with E2M1.
    const ZERO_HAS_NO_SIGN: bool;
}

/// `float8_e4m3fn`: NaN is 0x7f and 0xff.
#[derive(Clone, Copy)]
pub(crate) struct E4m3;
/// FP4.
#[derive(Clone, Copy)]
pub(crate) struct E2m1;
/// FP6.
#[derive(Clone, Copy)]
pub(crate) struct E2m3;

impl Minifloat for E4m3 {
    const BITS: u32 = 8;
    const MANTISSA: u32 = 3;
    const LEAST: u32 = 127 - 6;
    const MAX: f32 = 448.0;
    const HAS_NAN: bool = true;
    const ZERO_HAS_NO_SIGN: bool = false;
}

impl Minifloat for E2m1 {
    const BITS: u32 = 4;
    const MANTISSA: u32 = 1;
    const LEAST: u32 = 127;
    const MAX: f32 = 6.0;
    const HAS_NAN: bool = false;
    const ZERO_HAS_NO_SIGN: bool = true;
}

impl Minifloat for E2m3 {
    const BITS: u32 = 6;
    const MANTISSA: u32 = 3;
    const LEAST: u32 = 127;
    const MAX: f32 = 7.5;
    const HAS_NAN: bool = false;
    const ZERO_HAS_NO_SIGN: bool = false;
}

/// The nearest code, ties to even, and its value; what lies beyond the largest becomes the largest.
///
/// Adding 2^(e+23-m) to a number in the binade of 2^e leaves it rounded to its m bits of mantissa, in the sum's low bits.
/// Below the smallest normal number the binade is that number's.
#[inline(always)]
pub(crate) fn encode<S: Simd, F: Minifloat>(value: S::F) -> (S::I, S::F) {
    // Adding 0.0 takes the sign off -0.0 and changes nothing else.
    let value = if F::ZERO_HAS_NO_SIGN { S::add(value, S::splat(0.0)) } else { value };
    let magnitude = S::min(S::abs(value), S::splat(F::MAX));
    let least = S::splat_i(F::LEAST << 23);
    let exponent = S::max_i(S::and(S::bits(magnitude), S::splat_i(0x7f80_0000)), least);
    let shift = S::add_i(exponent, S::splat_i((23 - F::MANTISSA) << 23));
    let sum = S::add(magnitude, S::number(shift));
    let binade = down_mantissa::<S, F>(S::sub_i(exponent, least));
    let code = S::add_i(S::sub_i(S::bits(sum), shift), binade);
    let sign = S::and(S::bits(value), S::splat_i(0x8000_0000));
    let rounded = S::number(S::or(S::bits(S::sub(sum, S::number(shift))), sign));
    (S::or(code, down_sign::<S, F>(sign)), rounded)
}

/// The value of a code, exactly. Bits above the code's must be zero.
///
/// With one added to the exponent, v = 2^e (1 + m): a normal number is v/2, a subnormal one is v less the smallest normal
/// number; and each is the lesser of the two.
#[inline(always)]
pub(crate) fn decode<S: Simd, F: Minifloat>(code: S::I) -> S::F {
    let magnitude = S::and(code, S::splat_i((1 << (F::BITS - 1)) - 1));
    let doubled = S::number(S::add_i(up_mantissa::<S, F>(magnitude), S::splat_i(F::LEAST << 23)));
    let subnormal = S::sub(doubled, S::splat(f32::from_bits(F::LEAST << 23)));
    let value = S::min(subnormal, S::mul(doubled, S::splat(0.5)));
    // A magnitude that is NaN would be the one after the largest.
    let value = match F::HAS_NAN {
        true => S::select_at_most(value, S::splat(F::MAX), value, S::splat(f32::NAN)),
        false => value,
    };
    let sign = S::and(up_sign::<S, F>(code), S::splat_i(0x8000_0000));
    S::number(S::or(S::bits(value), sign))
}

/// The nearest `float8_e4m3fn`, ties to even, as its bits.
pub fn e4m3_bits(value: f32) -> u8 {
    encode::<One, E4m3>([value]).0[0] as u8
}

/// The value of a `float8_e4m3fn`.
pub fn e4m3_value(bits: u8) -> f32 {
    decode_one::<E4m3>(bits)
}

// A shift's width is a constant of the intrinsic, and a type's constant is none to the compiler.

#[inline(always)]
fn down_mantissa<S: Simd, F: Minifloat>(bits: S::I) -> S::I {
    const { assert!(F::MANTISSA == 1 || F::MANTISSA == 3) };
    if F::MANTISSA == 1 { S::shr::<22>(bits) } else { S::shr::<20>(bits) }
}

#[inline(always)]
fn up_mantissa<S: Simd, F: Minifloat>(bits: S::I) -> S::I {
    const { assert!(F::MANTISSA == 1 || F::MANTISSA == 3) };
    if F::MANTISSA == 1 { S::shl::<22>(bits) } else { S::shl::<20>(bits) }
}

#[inline(always)]
fn down_sign<S: Simd, F: Minifloat>(sign: S::I) -> S::I {
    match F::BITS {
        4 => S::shr::<28>(sign),
        6 => S::shr::<26>(sign),
        _ => S::shr::<24>(sign),
    }
}

#[inline(always)]
fn up_sign<S: Simd, F: Minifloat>(code: S::I) -> S::I {
    match F::BITS {
        4 => S::shl::<28>(code),
        6 => S::shl::<26>(code),
        _ => S::shl::<24>(code),
    }
}

/// The value of one code.
pub(crate) fn decode_one<F: Minifloat>(code: u8) -> f32 {
    decode::<One, F>([u32::from(code)])[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every code of a type in order of magnitude, with the largest last.
    fn check<F: Minifloat>() {
        let half = 1u16 << (F::BITS - 1);
        let codes: Vec<u8> = (0..half - u16::from(F::HAS_NAN)).map(|code| code as u8).collect();
        for code in (codes.len() as u16..half).flat_map(|code| [code, code | half]) {
            assert!(decode_one::<F>(code as u8).is_nan(), "{code:#x}");
        }
        let encode = |value: f32| {
            let (code, rounded) = encode::<One, F>([value]);
            (code[0] as u8, rounded[0])
        };
        let decode = decode_one::<F>;
        for code in &codes {
            let value = decode(*code);
            assert_eq!(encode(value), (*code, value), "{code:#x}");
            let negative = *code | half as u8;
            let sign = if *code == 0 && F::ZERO_HAS_NO_SIGN { 0 } else { negative };
            assert_eq!(encode(-value).0, sign);
            assert_eq!(decode(negative), -value);
        }
        assert_eq!(decode(*codes.last().unwrap_or(&0)), F::MAX);
        for pair in codes.windows(2) {
            let (low, high) = (decode(pair[0]), decode(pair[1]));
            let tie = (low + high) / 2.0;
            let even = if pair[0] % 2 == 0 { pair[0] } else { pair[1] };
            assert_eq!(encode(tie).0, even, "{tie}");
            assert_eq!(encode(tie.next_down()).0, pair[0]);
            assert_eq!(encode(tie.next_up()).0, pair[1]);
            assert_eq!(encode(-tie).0, even | half as u8, "a tiny negative keeps its sign");
        }
        for beyond in [F::MAX.next_up(), 1e30, f32::MAX] {
            assert_eq!(encode(beyond).1, F::MAX);
            assert_eq!(encode(-beyond).1, -F::MAX);
        }
    }

    #[test]
    fn every_code_comes_back_and_every_tie_goes_to_the_even_code() {
        check::<E4m3>();
        check::<E2m1>();
        check::<E2m3>();
        assert!(decode_one::<E4m3>(0x7f).is_nan() && decode_one::<E4m3>(0xff).is_nan());
    }

    #[test]
    fn the_values_are_those_of_the_specification() {
        assert_eq!((0..8).map(decode_one::<E2m1>).collect::<Vec<_>>(), [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]);
        assert_eq!([1, 7, 8, 9, 31].map(decode_one::<E2m3>), [0.125, 0.875, 1.0, 1.125, 7.5]);
        assert_eq!([1, 8, 0x7e].map(decode_one::<E4m3>), [2f32.powi(-9), 2f32.powi(-6), 448.0]);
    }
}
