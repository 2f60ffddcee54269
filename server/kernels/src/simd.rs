//! One register of numbers, whatever its width: what the loops of this crate are written in.
//!
//! Every operation is IEEE's or a plain integer one, so that the same loop gives the same bits at each width. [`Array`] is the
//! specification and the fallback, and with one lane the way of elements that fill no register; the others are the same in
//! intrinsics.
//! Arrays alone, compiled for each level, were three to six times slower here: LLVM does not keep more than a few of
//! them in registers.

mod array;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

pub(crate) use array::Array;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;

use crate::{
    element::{LANES, LooseBf16, LooseF16, LooseF32},
    level::Kind,
};

/// A register's width and operations.
///
/// The methods of a level may only be called where the CPU has its features: inside `level::multiversion!`.
pub(crate) trait Simd: Copy {
    /// Its lanes; a divisor of [`LANES`].
    const W: usize;
    /// The level that it belongs to: for what is no loop of registers.
    const KIND: Kind;
    /// A register of f32.
    type F: Copy;
    /// A register of u32.
    type I: Copy;

    fn splat(value: f32) -> Self::F;
    fn splat_i(value: u32) -> Self::I;
    /// Elements `from .. from + W` of sixteen.
    fn load(values: &[f32; LANES], from: usize) -> Self::F;
    fn load_loose(values: &[LooseF32; LANES], from: usize) -> Self::F;
    fn load_bf16(values: &[LooseBf16; LANES], from: usize) -> Self::F;
    fn load_f16(values: &[LooseF16; LANES], from: usize) -> Self::F;
    /// Sixteen bytes' `from .. from + W`, widened.
    fn load_bytes(bytes: &[u8; LANES], from: usize) -> Self::I;
    fn store(values: Self::F, out: &mut [f32; LANES], from: usize);
    /// The lowest byte of each lane.
    fn store_bytes(values: Self::I, out: &mut [u8; LANES], from: usize);
    /// Little-endian, at any alignment, into exactly as many bytes.
    fn write(values: Self::F, out: &mut [u8]);
    /// The lowest half of each lane, so too.
    fn write_halves(values: Self::I, out: &mut [u8]);
    /// The highest half of each lane of `a`, then of `b`, so too.
    fn write_high_halves(a: Self::I, b: Self::I, out: &mut [u8]);

    fn add(a: Self::F, b: Self::F) -> Self::F;
    fn sub(a: Self::F, b: Self::F) -> Self::F;
    fn mul(a: Self::F, b: Self::F) -> Self::F;
    fn div(a: Self::F, b: Self::F) -> Self::F;
    fn sqrt(a: Self::F) -> Self::F;
    /// `a < b ? a : b`: b where either is NaN.
    fn min(a: Self::F, b: Self::F) -> Self::F;
    /// `a > b ? a : b`: b where either is NaN.
    fn max(a: Self::F, b: Self::F) -> Self::F;
    /// The sum of sixteen lanes as a binary tree: lane i and lane i + 8, then i + 4, i + 2, i + 1.
    fn sum(lanes: &[f32; LANES]) -> f32;
    /// Three such sums.
    fn sums(lanes: [&[f32; LANES]; 3]) -> [f32; 3];
    /// The greatest of sixteen lanes.
    fn greatest(lanes: &[f32; LANES]) -> f32;
    /// The greatest of a register's lanes.
    fn greatest_lane(a: Self::F) -> f32;
    /// The greatest of a register's lanes, of numbers below 2^31.
    fn greatest_i(a: Self::I) -> u32;
    /// How many lanes differ; NaN does not.
    fn count_differing(a: Self::F, b: Self::F) -> u32;
    /// A bit for each lane, the first the lowest: whether `a < b`.
    fn below(a: Self::F, b: Self::F) -> u32;
    /// `then` where `a <= bound`, else `otherwise`.
    fn select_at_most(a: Self::F, bound: Self::F, then: Self::F, otherwise: Self::F) -> Self::F;
    /// `then` where `a < bound`, else `otherwise`.
    fn select_below(a: Self::F, bound: Self::F, then: Self::F, otherwise: Self::F) -> Self::F;
    /// The integers towards zero, two's complement; 2^31 of what an i32 does not hold, and of NaN.
    fn truncated(a: Self::F) -> Self::I;
    /// The nearest f16, ties to even, as a number; infinite beyond.
    fn round_f16(a: Self::F) -> Self::F;
    /// The same as its bits; NaN as `half::f32_to_f16` says.
    fn f16_bits(a: Self::F) -> Self::I;

    fn bits(a: Self::F) -> Self::I;
    fn number(a: Self::I) -> Self::F;
    /// The nearest f32 of each integer below 2^24.
    fn float(a: Self::I) -> Self::F;
    fn add_i(a: Self::I, b: Self::I) -> Self::I;
    fn sub_i(a: Self::I, b: Self::I) -> Self::I;
    fn and(a: Self::I, b: Self::I) -> Self::I;
    fn or(a: Self::I, b: Self::I) -> Self::I;
    fn xor(a: Self::I, b: Self::I) -> Self::I;
    /// The greater, of numbers below 2^31.
    fn max_i(a: Self::I, b: Self::I) -> Self::I;
    /// The lesser, of numbers below 2^31.
    fn min_i(a: Self::I, b: Self::I) -> Self::I;
    /// The greater of each half of a lane, of numbers below 2^15.
    fn max_halves(a: Self::I, b: Self::I) -> Self::I;
    fn shl<const N: u32>(a: Self::I) -> Self::I;
    fn shr<const N: u32>(a: Self::I) -> Self::I;

    #[inline(always)]
    fn abs(a: Self::F) -> Self::F {
        Self::number(Self::and(Self::bits(a), Self::splat_i(0x7fff_ffff)))
    }

    /// The bits of the nearest bfloat16 of numbers, ties to even; infinite beyond.
    #[inline(always)]
    fn bf16_bits_of_numbers(a: Self::F) -> Self::I {
        Self::shr::<16>(Self::bf16_bits_above(a))
    }

    /// The same in the upper half of each lane; the lower means nothing.
    #[inline(always)]
    fn bf16_bits_above(a: Self::F) -> Self::I {
        let bits = Self::bits(a);
        let odd = Self::and(Self::shr::<16>(bits), Self::splat_i(1));
        Self::add_i(Self::add_i(bits, Self::splat_i(0x7fff)), odd)
    }

    /// The same of numbers or none. NaN is made quiet and keeps the top bits of its payload.
    #[inline(always)]
    fn bf16_bits(a: Self::F) -> Self::I {
        let rounded = Self::number(Self::bf16_bits_of_numbers(a));
        let quiet = Self::number(Self::shr::<16>(Self::or(Self::bits(a), Self::splat_i(0x40_0000))));
        Self::bits(Self::select_at_most(a, Self::splat(f32::INFINITY), rounded, quiet))
    }

    /// The nearest bfloat16 as a number.
    #[inline(always)]
    fn round_bf16(a: Self::F) -> Self::F {
        Self::number(Self::shl::<16>(Self::bf16_bits(a)))
    }
}

/// One lane: an element by itself.
pub(crate) type One = Array<1>;

/// Functions of one intrinsic, or of a few.
#[cfg(target_arch = "x86_64")]
macro_rules! intrinsics {
    ($(fn $op:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:expr;)*) => {
        $(#[inline(always)]
        fn $op($($arg: $ty),*) -> $ret {
            // SAFETY: reached only through `level::multiversion!` with a `Level` that proves the features.
            unsafe { $body }
        })*
    };
}

/// The address of element `from`, with the `W` elements that will be read or written there inside the sixteen.
#[cfg(target_arch = "x86_64")]
macro_rules! at {
    ($values:ident, $from:ident) => {{
        assert!($from + Self::W <= LANES);
        $values.as_ptr().add($from)
    }};
    (mut $values:ident, $from:ident) => {{
        assert!($from + Self::W <= LANES);
        $values.as_mut_ptr().add($from)
    }};
}
#[cfg(target_arch = "x86_64")]
use {at, intrinsics};
