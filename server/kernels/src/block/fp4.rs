//! FP4 in ggml's blocks: MXFP4 and NVFP4, each by its own rule.

use super::{Block, E2M1_DOUBLED, e8m0_halved, layout, plain::Plain, ue4m3_halved};
use crate::{
    coder::{Coded, Coder},
    element::{LooseF32, Value},
    simd::Simd,
};

/// FP4: the nearest, of two the lesser; a number below zero that is nearest to zero is zero.
#[derive(Clone, Copy, Default)]
struct Fp4 {
    /// Half of the scale, as the values are doubled.
    scale: f32,
}

impl Fp4 {
    #[inline(always)]
    fn code<S: Simd>(self, values: S::F) -> Coded<S> {
        let (zero, scale) = (S::splat(0.0), S::splat(self.scale));
        let magnitude = S::abs(values);
        // Errors are compared as they are in f32: of numbers far beyond the largest value all are the same, and zero is the first.
        let (mut error, mut code, mut near) = (magnitude, zero, zero);
        for (index, value) in E2M1_DOUBLED[..8].iter().enumerate().skip(1) {
            let value = S::mul(S::splat(f32::from(*value)), scale);
            let other = S::abs(S::sub(value, magnitude));
            code = S::select_below(other, error, S::splat(index as f32), code);
            near = S::select_below(other, error, value, near);
            error = S::select_below(other, error, other, error);
        }
        let signed = S::select_below(zero, code, S::add(code, S::splat(8.0)), code);
        let code = S::select_below(values, zero, signed, code);
        let sign = S::and(S::bits(values), S::splat_i(0x8000_0000));
        Coded {
            codes: S::truncated(code),
            decoded: S::number(S::or(S::bits(near), sign)),
            exact: magnitude,
            near: S::min(magnitude, S::mul(S::splat(12.0), scale)),
        }
    }

    fn decode(self, code: u8) -> f32 {
        f32::from(E2M1_DOUBLED[usize::from(code & 15)]) * self.scale
    }
}

/// 32 under a power of two.
#[derive(Clone, Copy, Default)]
pub(super) struct Mxfp4 {
    fp4: Fp4,
    exponent: u8,
}

impl Coder for Mxfp4 {
    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F) -> Coded<S> {
        self.fp4.code::<S>(values)
    }

    fn decode(&self, code: u8) -> f32 {
        self.fp4.decode(code)
    }
}

impl Plain for Mxfp4 {
    const BLOCK: Block = Block::Mxfp4;
    const NIBBLES: Option<usize> = Some(1);

    #[inline(always)]
    fn of<R: Simd>(values: &[LooseF32], groups: &mut [Mxfp4]) {
        for (group, values) in groups.iter_mut().zip(values.chunks_exact(32)) {
            let amax = LooseF32::greatest_magnitude::<R>(values);
            // Of numbers below 2^-125 the exponent is below zero, and ggml keeps its low byte; nothing is left of them either way.
            let exponent = if amax > 0.0 { (floor_log2f(amax) - 2 + 127) as u8 } else { 0 };
            *group = Mxfp4 { fp4: Fp4 { scale: e8m0_halved(exponent) }, exponent };
        }
    }

    #[inline(always)]
    fn write_scales(groups: &[Mxfp4], out: &mut [u8]) {
        out[0] = groups[0].exponent;
    }
}

/// The floor of the logarithm that C's `log2f` gives: the next integer where f32 has nothing between.
#[inline(always)]
fn floor_log2f(value: f32) -> i32 {
    let bits = value.to_bits();
    match bits & 0x7f_ffff >= 0x7f_f000 || bits < 0x80_0000 {
        false => (bits >> 23) as i32 - 127,
        true => libm::floorf(libm::log2(f64::from(value)) as f32) as i32,
    }
}

/// 16 under half of an unsigned E4M3.
#[derive(Clone, Copy, Default)]
pub(super) struct Nvfp4 {
    fp4: Fp4,
    bits: u8,
}

impl Coder for Nvfp4 {
    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F) -> Coded<S> {
        self.fp4.code::<S>(values)
    }

    fn decode(&self, code: u8) -> f32 {
        self.fp4.decode(code)
    }
}

impl Plain for Nvfp4 {
    const BLOCK: Block = Block::Nvfp4;
    const GROUP: usize = 16;

    #[inline(always)]
    fn of<R: Simd>(values: &[LooseF32], groups: &mut [Nvfp4]) {
        for (group, values) in groups.iter_mut().zip(values.chunks_exact(16)) {
            let bits = ue4m3_bits(LooseF32::greatest_magnitude::<R>(values) / 6.0);
            *group = Nvfp4 { fp4: Fp4 { scale: ue4m3_halved(bits) }, bits };
        }
    }

    #[inline(always)]
    fn write_scales(groups: &[Nvfp4], out: &mut [u8]) {
        for (group, scale) in groups.iter().zip(out) {
            *scale = group.bits;
        }
    }

    #[inline(always)]
    fn write_codes(codes: &[u8], out: &mut [u8]) {
        layout::nibbles::<16, 8>(codes, &mut out[4..]);
    }
}

/// An unsigned E4M3 of at most 448, half up.
fn ue4m3_bits(value: f32) -> u8 {
    if value < f32::from_bits((127 - 6) << 23) {
        // Eight steps up to the smallest normal number; ggml keeps the eighth out.
        return ((value * 512.0 + 0.5) as u8).min(7);
    }
    // Exponent and mantissa as one number, into which rounding carries. From 256 on ggml has but one.
    let bits = (value.to_bits() - ((127 - 7) << 23) + (1 << 19)) >> 20;
    if bits < 0x78 { bits as u8 } else { 0x7e }
}
