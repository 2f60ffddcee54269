//! Whole numbers of 4, 5 and 8 bits: ggml's first types.

use super::{
    Block, layout,
    plain::{Plain, Scales, greatest_signed, signed_ends},
};
use crate::{
    coder::{Coded, Coder, ROUNDING},
    element::{LANES, LooseF32, Value},
    simd::Simd,
};

/// int8, rounded half away from zero.
#[derive(Clone, Copy, Default)]
pub(super) struct Q8_0 {
    by: f32,
    scale: f32,
    bits: [u8; 2],
}

impl Coder for Q8_0 {
    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F) -> Coded<S> {
        let exact = S::mul(values, S::splat(self.by));
        let magnitude = S::abs(exact);
        let even = S::sub(S::add(magnitude, S::splat(ROUNDING)), S::splat(ROUNDING));
        // A tie that went down goes up.
        let up = S::add(even, S::splat(1.0));
        let rounded = S::select_below(S::sub(magnitude, even), S::splat(0.5), even, up);
        let sign = S::and(S::bits(exact), S::splat_i(0x8000_0000));
        let codes = S::truncated(S::number(S::or(S::bits(rounded), sign)));
        Coded { codes, decoded: S::mul(S::float(codes), S::splat(self.scale)), exact, near: exact }
    }

    fn decode(&self, code: u8) -> f32 {
        f32::from(code as i8) * self.scale
    }
}

impl Plain for Q8_0 {
    const BLOCK: Block = Block::Q8_0;

    #[inline(always)]
    fn of<R: Simd>(values: &[LooseF32], groups: &mut [Q8_0]) {
        let mut most = [0f32; LANES];
        for (most, values) in most.iter_mut().zip(values.chunks_exact(32)) {
            *most = LooseF32::greatest_magnitude::<R>(values);
        }
        let scales = Scales::of::<R>(&most, 127.0);
        for (at, group) in groups.iter_mut().enumerate() {
            *group = Q8_0 { by: scales.by[at], scale: scales.stored[at], bits: scales.bits[at] };
        }
    }

    #[inline(always)]
    fn write_scales(groups: &[Q8_0], out: &mut [u8]) {
        out[..2].copy_from_slice(&groups[0].bits);
    }

    #[inline(always)]
    fn write_codes(codes: &[u8], out: &mut [u8]) {
        out[2..].copy_from_slice(codes);
    }
}

/// Codes 0 to `MAX`, of which the middle, rounded up, is zero. The number of greatest magnitude is code 0.
#[derive(Clone, Copy, Default)]
pub(super) struct Centred<const MAX: u8> {
    by: f32,
    scale: f32,
    bits: [u8; 2],
}

pub(super) type Q4_0 = Centred<15>;
pub(super) type Q5_0 = Centred<31>;

impl<const MAX: u8> Centred<MAX> {
    const MIDDLE: f32 = MAX.div_ceil(2) as f32;

    #[inline(always)]
    fn of<R: Simd>(values: &[LooseF32], groups: &mut [Centred<MAX>]) {
        let scales = Scales::of::<R>(&greatest_signed::<R>(values), -Self::MIDDLE);
        for (at, group) in groups.iter_mut().enumerate() {
            *group = Centred { by: scales.by[at], scale: scales.stored[at], bits: scales.bits[at] };
        }
    }
}

impl<const MAX: u8> Coder for Centred<MAX> {
    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F) -> Coded<S> {
        let max = f32::from(MAX);
        let exact = S::add(S::mul(values, S::splat(self.by)), S::splat(Self::MIDDLE + 0.5));
        let codes = S::truncated(S::min(S::splat(max), exact));
        let decoded = S::mul(S::sub(S::float(codes), S::splat(Self::MIDDLE)), S::splat(self.scale));
        Coded { codes, decoded, exact, near: S::min(S::splat(max + 0.5), exact) }
    }

    fn decode(&self, code: u8) -> f32 {
        (f32::from(code) - Self::MIDDLE) * self.scale
    }
}

impl Plain for Q4_0 {
    const BLOCK: Block = Block::Q4_0;
    const NIBBLES: Option<usize> = Some(2);

    #[inline(always)]
    fn of<R: Simd>(values: &[LooseF32], groups: &mut [Q4_0]) {
        Centred::of::<R>(values, groups);
    }

    #[inline(always)]
    fn write_scales(groups: &[Q4_0], out: &mut [u8]) {
        out[..2].copy_from_slice(&groups[0].bits);
    }
}

impl Plain for Q5_0 {
    const BLOCK: Block = Block::Q5_0;

    #[inline(always)]
    fn of<R: Simd>(values: &[LooseF32], groups: &mut [Q5_0]) {
        Centred::of::<R>(values, groups);
    }

    #[inline(always)]
    fn write_scales(groups: &[Q5_0], out: &mut [u8]) {
        out[..2].copy_from_slice(&groups[0].bits);
    }

    #[inline(always)]
    fn write_codes(codes: &[u8], out: &mut [u8]) {
        out[2..6].copy_from_slice(&layout::fifth_bits(codes));
        layout::nibbles::<32, 16>(codes, &mut out[6..]);
    }
}

/// Codes 0 to `MAX` above the least element.
#[derive(Clone, Copy, Default)]
pub(super) struct Lifted<const MAX: u8> {
    by: f32,
    from: f32,
    scale: f32,
    least: f32,
    bits: [[u8; 2]; 2],
}

pub(super) type Q4_1 = Lifted<15>;
pub(super) type Q5_1 = Lifted<31>;

impl<const MAX: u8> Lifted<MAX> {
    #[inline(always)]
    fn of<R: Simd>(values: &[LooseF32], groups: &mut [Lifted<MAX>]) {
        let (lows, highs) = signed_ends::<R>(values);
        let mut spans = [0f32; LANES];
        for (span, (low, high)) in spans.iter_mut().zip(lows.iter().zip(&highs)) {
            *span = high - low;
        }
        let scales = Scales::of::<R>(&spans, f32::from(MAX));
        let least = Scales::of::<R>(&lows, 1.0);
        for (at, group) in groups.iter_mut().enumerate() {
            *group = Lifted {
                by: scales.by[at],
                from: lows[at],
                scale: scales.stored[at],
                least: least.stored[at],
                bits: [scales.bits[at], least.bits[at]],
            };
        }
    }
}

impl<const MAX: u8> Coder for Lifted<MAX> {
    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F) -> Coded<S> {
        let exact = S::mul(S::sub(values, S::splat(self.from)), S::splat(self.by));
        let codes = S::truncated(S::min(S::splat(f32::from(MAX)), S::add(exact, S::splat(0.5))));
        let decoded = S::add(S::mul(S::float(codes), S::splat(self.scale)), S::splat(self.least));
        Coded { codes, decoded, exact, near: exact }
    }

    fn decode(&self, code: u8) -> f32 {
        f32::from(code) * self.scale + self.least
    }
}

impl Plain for Q4_1 {
    const BLOCK: Block = Block::Q4_1;
    const NIBBLES: Option<usize> = Some(4);

    #[inline(always)]
    fn of<R: Simd>(values: &[LooseF32], groups: &mut [Q4_1]) {
        Lifted::of::<R>(values, groups);
    }

    #[inline(always)]
    fn write_scales(groups: &[Q4_1], out: &mut [u8]) {
        out[..4].copy_from_slice(groups[0].bits.as_flattened());
    }
}

impl Plain for Q5_1 {
    const BLOCK: Block = Block::Q5_1;

    #[inline(always)]
    fn of<R: Simd>(values: &[LooseF32], groups: &mut [Q5_1]) {
        Lifted::of::<R>(values, groups);
    }

    #[inline(always)]
    fn write_scales(groups: &[Q5_1], out: &mut [u8]) {
        out[..4].copy_from_slice(groups[0].bits.as_flattened());
    }

    #[inline(always)]
    fn write_codes(codes: &[u8], out: &mut [u8]) {
        out[4..8].copy_from_slice(&layout::fifth_bits(codes));
        layout::nibbles::<32, 16>(codes, &mut out[8..]);
    }
}
