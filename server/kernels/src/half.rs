//! f16 and bf16 in plain integer steps, without branches, so that the loops around them vectorise.

use crate::simd::{One, Simd};

/// Widens binary16, exactly; NaN payloads keep their top bits.
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    let normal = (magnitude << 13) + ((127 - 15) << 23);
    let non_finite = normal + ((255 - 31 - (127 - 15)) << 23);
    // A subnormal is an integer times 2^-24, and small enough that the conversion is exact.
    let subnormal = (magnitude as f32 * f32::from_bits((127 - 24) << 23)).to_bits();
    let finite = if magnitude < 0x0400 { subnormal } else { normal };
    f32::from_bits(sign | if magnitude >= 0x7c00 { non_finite } else { finite })
}

/// The nearest binary16, ties to even, overflowing to infinity; as its bits.
#[inline(always)]
pub(crate) fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = ((bits >> 16) & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    // Below 2^-14 the quantum is 2^-24: adding 0.5 rounds there, since 0.5's own last bit is worth 2^-24.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub((127 - 15) << 23).wrapping_add(0xfff + odd) >> 13;
    let finite = if magnitude < (127 - 14) << 23 { subnormal } else { normal };
    // NaN is made quiet and keeps the top bits of its payload, as F16C does.
    let large = if magnitude > 0x7f80_0000 { 0x7e00 | (magnitude >> 13 & 0x3ff) } else { 0x7c00 };
    sign | (if magnitude >= 0x4780_0000 { large } else { finite }) as u16
}

/// A type in which a result is rounded.
pub(crate) trait Round {
    /// Whether rounding to it changes nothing.
    const IS_F32: bool = false;
    /// Whether elements of bf16 are rounded to it; of f16.
    const READS_BF16: bool = false;
    const READS_F16: bool = false;

    /// The nearest value of the type, ties to even; infinite beyond. Not for NaN.
    fn lanes<S: Simd>(values: S::F) -> S::F;

    /// The same of one number.
    #[inline(always)]
    fn round(value: f32) -> f32 {
        Self::lanes::<One>([value])[0]
    }
}

/// No rounding beyond f32's own.
pub(crate) struct ToF32;
/// To binary16.
pub(crate) struct ToF16;
/// To bfloat16.
pub(crate) struct ToBf16;

impl Round for ToF32 {
    const IS_F32: bool = true;
    const READS_BF16: bool = true;
    const READS_F16: bool = true;

    #[inline(always)]
    fn lanes<S: Simd>(values: S::F) -> S::F {
        values
    }
}

impl Round for ToF16 {
    const READS_F16: bool = true;

    #[inline(always)]
    fn lanes<S: Simd>(values: S::F) -> S::F {
        S::round_f16(values)
    }
}

impl Round for ToBf16 {
    const READS_BF16: bool = true;

    #[inline(always)]
    fn lanes<S: Simd>(values: S::F) -> S::F {
        S::round_bf16(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_widens_as_the_half_crate_says_and_comes_back() {
        for bits in 0..=u16::MAX {
            let wide = f16_to_f32(bits);
            let expected = ::half::f16::from_bits(bits).to_f32_const();
            assert!(wide.to_bits() == expected.to_bits() || wide.is_nan() && expected.is_nan(), "{bits:#x}");
            if !wide.is_nan() {
                assert_eq!(f32_to_f16(wide), bits);
            }
        }
    }

    #[test]
    fn narrowing_rounds_as_the_half_crate_says() {
        // Every 65,537th float, and both neighbours of every tie between two f16 values.
        let sweep = (0..=u32::MAX).step_by(65_537);
        let ties = (0..0x7c00u16).flat_map(|bits| {
            let (low, high) = (f16_to_f32(bits), f16_to_f32(bits + 1));
            let tie = if high.is_finite() { (low + high) / 2.0 } else { 65520.0 };
            [tie.to_bits() - 1, tie.to_bits(), tie.to_bits() + 1]
        });
        for bits in sweep.chain(ties) {
            let value = f32::from_bits(bits);
            if !value.is_nan() {
                assert_eq!(f32_to_f16(value), ::half::f16::from_f32_const(value).to_bits(), "{value:e}");
                assert_eq!(ToBf16::round(value), ::half::bf16::from_f32_const(value).to_f32_const(), "{value:e}");
            } else {
                assert!(f16_to_f32(f32_to_f16(value)).is_nan());
            }
        }
    }
}
