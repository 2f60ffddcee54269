//! Codes that stand for sixteen given values, and integers of a row: bitsandbytes' formats, by a block's greatest magnitude.
//!
//! Source: bitsandbytes 0.50 `functional.py::get_4bit_type`, `backends/default/ops.py::quantize_4bit` and `int8_vectorwise_quant`.
//! Held bit for bit by tests/golden.

use std::marker::PhantomData;

use crate::{
    coder::{Coded, Coder, ROUNDING},
    dequantize::{Signed, Unit},
    simd::Simd,
};

/// Sixteen values from -1 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codebook {
    /// NormalFloat: quantiles of a normal distribution, rising with the code.
    Nf4,
    /// A sign, two bits of exponent, one of mantissa; not E2M1, in values and in order.
    Fp4,
}

impl Codebook {
    /// bitsandbytes' name.
    pub const fn name(self) -> &'static str {
        match self {
            Codebook::Nf4 => "nf4",
            Codebook::Fp4 => "fp4",
        }
    }

    /// What each code stands for, times the block's greatest magnitude; that of zero with a sign where the code has one.
    pub const fn values(self) -> [f32; 16] {
        match self {
            Codebook::Nf4 => by_code::<Nf4>(),
            Codebook::Fp4 => by_code::<Fp4>(),
        }
    }
}

/// A codebook's values in rising order, and their codes.
pub(crate) trait Book {
    const VALUES: [f32; 16];
    const CODES: [u8; 16];
    /// The code of zero, which fills up a last byte.
    const ZERO: u8;
}

pub(crate) struct Nf4;
pub(crate) struct Fp4;

impl Book for Nf4 {
    #[allow(clippy::excessive_precision, reason = "as bitsandbytes writes them")]
    const VALUES: [f32; 16] = [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ];
    const CODES: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    const ZERO: u8 = 7;
}

impl Book for Fp4 {
    /// A number above zero that is nearest to it has the code of -0.0.
    const VALUES: [f32; 16] = [
        -1.0,
        -8.0 / 12.0,
        -6.0 / 12.0,
        -4.0 / 12.0,
        -3.0 / 12.0,
        -2.0 / 12.0,
        -0.0625 / 12.0,
        0.0,
        -0.0,
        0.0625 / 12.0,
        2.0 / 12.0,
        3.0 / 12.0,
        4.0 / 12.0,
        6.0 / 12.0,
        8.0 / 12.0,
        1.0,
    ];
    const CODES: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];
    const ZERO: u8 = 0;
}

const fn by_code<B: Book>() -> [f32; 16] {
    let mut values = [0.0; 16];
    let mut rank = 0;
    while rank < 16 {
        values[B::CODES[rank] as usize] = B::VALUES[rank];
        rank += 1;
    }
    values
}

/// The nearest value; half-way between two, the lower.
pub(crate) struct Looked<B> {
    by: f32,
    scale: f32,
    book: PhantomData<B>,
}

impl<B> Looked<B> {
    /// Of a block of that greatest magnitude, which is decoded by that scale.
    #[inline(always)]
    pub(crate) fn new(magnitude: f32, scale: f32) -> Looked<B> {
        Looked { by: 1.0 / magnitude.max(1e-38), scale, book: PhantomData }
    }
}

impl<B: Book> Coder for Looked<B> {
    const HIGH_FIRST: Option<u8> = Some(B::ZERO);

    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F) -> Coded<S> {
        let exact = S::mul(values, S::splat(self.by));
        let near = S::min(S::max(exact, S::splat(-1.0)), S::splat(1.0));
        let (mut code, mut unit) = (S::splat(f32::from(B::CODES[0])), S::splat(B::VALUES[0]));
        for rank in 1..16 {
            let middle = S::splat((B::VALUES[rank - 1] + B::VALUES[rank]) / 2.0);
            code = S::select_below(middle, near, S::splat(f32::from(B::CODES[rank])), code);
            unit = S::select_below(middle, near, S::splat(B::VALUES[rank]), unit);
        }
        // The greatest magnitude may lie a rounding beyond 1, which is no loss.
        Coded { codes: S::truncated(code), decoded: S::mul(unit, S::splat(self.scale)), exact: near, near }
    }

    fn decode(&self, code: u8) -> f32 {
        let values = const { by_code::<B>() };
        values[usize::from(code & 15)] * self.scale
    }
}

impl<B: Book> Unit for Looked<B> {
    #[inline(always)]
    fn unit<S: Simd>(codes: S::I, _: S::I) -> S::F {
        let values = const { by_code::<B>() };
        let codes = S::float(codes);
        let mut unit = S::splat(values[0]);
        for (code, value) in values.iter().enumerate().skip(1) {
            unit = S::select_at_most(S::splat(code as f32), codes, S::splat(*value), unit);
        }
        unit
    }
}

/// int8 of a row whose greatest magnitude is 127.
pub(crate) struct Rowwise {
    by: f32,
    scale: f32,
}

/// What a product of a code and a magnitude is multiplied by: bitsandbytes' 1/127.
const ONE_127TH: f32 = 1.0 / 127.0;

impl Rowwise {
    #[inline(always)]
    pub(crate) fn new(scale: f32) -> Rowwise {
        // A reciprocal times a number, as torch evaluates the quotient. Where it would be infinite, bitsandbytes has no numbers.
        Rowwise { by: if scale == 0.0 { 0.0 } else { (1.0 / scale * 127.0).min(f32::MAX) }, scale }
    }
}

impl Unit for Rowwise {
    #[inline(always)]
    fn unit<S: Simd>(codes: S::I, _: S::I) -> S::F {
        Signed::unit::<S>(codes, S::splat_i(0))
    }

    #[inline(always)]
    fn scaled<S: Simd>(unit: S::F, scale: S::F) -> S::F {
        S::mul(S::mul(unit, scale), S::splat(ONE_127TH))
    }
}

impl Coder for Rowwise {
    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F) -> Coded<S> {
        let exact = S::mul(values, S::splat(self.by));
        let near = S::min(S::max(exact, S::splat(-127.0)), S::splat(127.0));
        let sum = S::add(near, S::splat(ROUNDING));
        let whole = S::sub(sum, S::splat(ROUNDING));
        let decoded = S::mul(S::mul(whole, S::splat(self.scale)), S::splat(ONE_127TH));
        Coded { codes: S::bits(sum), decoded, exact: near, near }
    }

    fn decode(&self, code: u8) -> f32 {
        f32::from(code as i8) * self.scale * ONE_127TH
    }
}
