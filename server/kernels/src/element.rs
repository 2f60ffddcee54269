//! Element types of weights, read from bytes at any alignment and widened to f32.

use crate::{
    Level, TILE, half,
    level::multiversion,
    minifloat::{self, E4m3},
    simd::Simd,
};

/// The element type of weights, as it stands in the column `dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE binary64; rounded once to f32 on reading, and non-finite if that overflows.
    F64,
    /// `float8_e4m3fn`.
    F8E4m3,
    /// `float8_e5m2`.
    F8E5m2,
}

impl Dtype {
    /// Every type.
    pub const ALL: [Dtype; 6] = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F64, Dtype::F8E4m3, Dtype::F8E5m2];

    /// The word on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
            Dtype::F64 => "f64",
            Dtype::F8E4m3 => "f8_e4m3",
            Dtype::F8E5m2 => "f8_e5m2",
        }
    }

    /// The type of that name.
    pub fn named(name: &str) -> Option<Dtype> {
        Dtype::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Bytes per element.
    pub const fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::F64 => 8,
            Dtype::F8E4m3 | Dtype::F8E5m2 => 1,
        }
    }

    /// The type in which scales of such weights are stored: their own, and f32 for f32, f64 and f8.
    pub const fn scale_type(self) -> Dtype {
        match self {
            Dtype::F16 => Dtype::F16,
            Dtype::Bf16 => Dtype::Bf16,
            Dtype::F32 | Dtype::F64 | Dtype::F8E4m3 | Dtype::F8E5m2 => Dtype::F32,
        }
    }
}

/// Elements side by side, in which sums have their lanes: one AVX-512 register, two of AVX2.
pub(crate) const LANES: usize = 16;

/// An element in a loop: an f32, or one of a narrower type, at any alignment.
pub(crate) trait Value: Copy {
    fn get(self) -> f32;

    /// `S::W` of sixteen elements, in a register.
    fn lanes<S: Simd>(values: &[Self; LANES], from: usize) -> S::F;

    /// The greatest magnitude, or an infinity or NaN if there is one.
    fn greatest_magnitude<S: Simd>(values: &[Self]) -> f32;
}

/// A little-endian f32 at any alignment. Loops over it vectorise as over f32; loops over `[u8; 4]` do not.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub(crate) struct LooseF32(u32);

/// A little-endian bf16 at any alignment.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub(crate) struct LooseBf16(u16);

/// A little-endian f16 at any alignment.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub(crate) struct LooseF16(u16);

impl Value for LooseF32 {
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from_le(self.0))
    }

    #[inline(always)]
    fn lanes<S: Simd>(values: &[Self; LANES], from: usize) -> S::F {
        S::load_loose(values, from)
    }

    #[inline(always)]
    fn greatest_magnitude<S: Simd>(values: &[Self]) -> f32 {
        greatest_f32::<S, Self>(values)
    }
}

impl Value for LooseBf16 {
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(u16::from_le(self.0)) << 16)
    }

    #[inline(always)]
    fn lanes<S: Simd>(values: &[Self; LANES], from: usize) -> S::F {
        S::load_bf16(values, from)
    }

    #[inline(always)]
    fn greatest_magnitude<S: Simd>(values: &[Self]) -> f32 {
        // Less than a register of two in a lane is read one in a lane.
        match values.len() < 2 * LANES {
            true => greatest_f32::<S, Self>(values),
            false => Self(greatest_u16::<S>(bytes_of(values)).to_le()).get(),
        }
    }
}

impl Value for LooseF16 {
    #[inline(always)]
    fn get(self) -> f32 {
        half::f16_to_f32(u16::from_le(self.0))
    }

    #[inline(always)]
    fn lanes<S: Simd>(values: &[Self; LANES], from: usize) -> S::F {
        S::load_f16(values, from)
    }

    #[inline(always)]
    fn greatest_magnitude<S: Simd>(values: &[Self]) -> f32 {
        // Less than a register of two in a lane is read one in a lane.
        match values.len() < 2 * LANES {
            true => greatest_f32::<S, Self>(values),
            false => Self(greatest_u16::<S>(bytes_of(values)).to_le()).get(),
        }
    }
}

/// Magnitudes are in the order of their bits.
#[inline(always)]
fn greatest_f32<S: Simd, V: Value>(values: &[V]) -> f32 {
    let mask = S::splat_i(0x7fff_ffff);
    let (sixteens, rest) = values.as_chunks::<LANES>();
    let mut found = S::splat_i(0);
    // Small groups are many: the first sixteen without the loop.
    if let Some((first, others)) = sixteens.split_first() {
        for from in (0..LANES).step_by(S::W) {
            found = S::max_i(S::and(S::bits(V::lanes::<S>(first, from)), mask), found);
        }
        for sixteen in others {
            for from in (0..LANES).step_by(S::W) {
                found = S::max_i(S::and(S::bits(V::lanes::<S>(sixteen, from)), mask), found);
            }
        }
    }
    let rest = rest.iter().map(|value| value.get().to_bits() & 0x7fff_ffff);
    f32::from_bits(rest.fold(S::greatest_i(found), u32::max))
}

/// The greatest of the halves without their signs, two in a lane.
#[inline(always)]
fn greatest_u16<S: Simd>(bytes: &[u8]) -> u16 {
    let mask = S::splat_i(0x7fff_7fff);
    let pairs = loose::<LooseF32>(bytes);
    let (sixteens, rest) = pairs.as_chunks::<LANES>();
    let mut found = S::splat_i(0);
    for sixteen in sixteens {
        for from in (0..LANES).step_by(S::W) {
            found = S::max_halves(S::and(S::bits(S::load_loose(sixteen, from)), mask), found);
        }
    }
    let found = S::and(S::max_halves(found, S::shr::<16>(found)), S::splat_i(0xffff));
    let (halves, _) = bytes[(pairs.len() - rest.len()) * 4..].as_chunks::<2>();
    let rest = halves.iter().map(|bytes| u32::from(u16::from_le_bytes(*bytes) & 0x7fff));
    rest.fold(S::greatest_i(found), u32::max) as u16
}

/// The bytes of elements.
#[inline(always)]
fn bytes_of<V: Loose>(values: &[V]) -> &[u8] {
    // SAFETY: a `Loose` type is plain bytes, all of them initialised, and the slice is the same memory.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) }
}

/// The whole values of a type in `bytes`, where they lie.
#[inline(always)]
pub(crate) fn loose<V: Loose>(bytes: &[u8]) -> &[V] {
    const { assert!(align_of::<V>() == 1) };
    // SAFETY: a `Loose` type is plain bytes of alignment one, any bits are a value, and the slice stays within `bytes`.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<V>(), bytes.len() / size_of::<V>()) }
}

/// A type that [`loose`] may see in any bytes: of alignment one, with no invalid bits.
pub(crate) trait Loose: Value {
    const ZERO: Self;
}

impl Loose for LooseF32 {
    const ZERO: LooseF32 = LooseF32(0);
}

impl Loose for LooseBf16 {
    const ZERO: LooseBf16 = LooseBf16(0);
}

impl Loose for LooseF16 {
    const ZERO: LooseF16 = LooseF16(0);
}

/// A tile's elements as they are, if registers take their type; else widened to f32, in `wide`.
#[inline(always)]
pub(crate) fn in_registers<'a>(level: Level, dtype: Dtype, bytes: &'a [u8], wide: &'a mut [f32; TILE]) -> &'a [u8] {
    match dtype {
        Dtype::F32 | Dtype::Bf16 | Dtype::F16 => bytes,
        Dtype::F64 | Dtype::F8E4m3 | Dtype::F8E5m2 => {
            widen_tile(level, dtype, bytes, wide);
            bytes_of_f32(&wide[..bytes.len() / dtype.bytes()])
        }
    }
}

/// A tile's elements as f32: as they are, or widened, in `wide`.
#[inline(always)]
pub(crate) fn as_f32<'a>(dtype: Dtype, bytes: &'a [u8], wide: &'a mut [f32; TILE]) -> &'a [u8] {
    match dtype {
        Dtype::F32 => bytes,
        _ => bytes_of_f32(widen(dtype, bytes, wide)),
    }
}

multiversion! { fn widen_tile(dtype: Dtype, bytes: &[u8], wide: &mut [f32; TILE]) -> () = widen_body<R>; }

#[inline(always)]
fn widen_body<R: Simd>(dtype: Dtype, bytes: &[u8], wide: &mut [f32; TILE]) {
    widen(dtype, bytes, wide);
}

/// The bytes of numbers.
#[inline(always)]
pub(crate) fn bytes_of_f32(values: &[f32]) -> &[u8] {
    // SAFETY: an f32 is four bytes, all of them initialised, and the slice is the same memory.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) }
}

/// Widens up to [`TILE`] elements into `out`, and returns them.
#[inline(always)]
pub(crate) fn widen<'a>(dtype: Dtype, bytes: &[u8], out: &'a mut [f32; TILE]) -> &'a [f32] {
    match dtype {
        Dtype::F32 => widen_each(bytes, out, |b: [u8; 4]| f32::from_le_bytes(b)),
        Dtype::F16 => widen_each(bytes, out, |b: [u8; 2]| half::f16_to_f32(u16::from_le_bytes(b))),
        Dtype::Bf16 => widen_each(bytes, out, |b: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
        Dtype::F64 => widen_each(bytes, out, |b: [u8; 8]| f64::from_le_bytes(b) as f32),
        Dtype::F8E4m3 => widen_each(bytes, out, |b: [u8; 1]| minifloat::decode_one::<E4m3>(b[0])),
        Dtype::F8E5m2 => widen_each(bytes, out, |b: [u8; 1]| half::f16_to_f32(u16::from(b[0]) << 8)),
    }
}

#[inline(always)]
fn widen_each<'a, const N: usize>(bytes: &[u8], out: &'a mut [f32; TILE], f: impl Fn([u8; N]) -> f32) -> &'a [f32] {
    let (elements, _) = bytes.as_chunks::<N>();
    let out = &mut out[..elements.len()];
    for (value, element) in out.iter_mut().zip(elements) {
        *value = f(*element);
    }
    out
}
