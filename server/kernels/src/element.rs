//! Element types of weights, read from bytes at any alignment and widened to f32.

use crate::{TILE, fp8, half};

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

/// An element in a loop: an f32, or one at any alignment.
pub(crate) trait Value: Copy {
    fn get(self) -> f32;
}

impl Value for f32 {
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
}

/// Sixteen elements in registers. Indexing the elements where they lie keeps LLVM from seeing a vector.
#[inline(always)]
pub(crate) fn gather<V: Value>(values: &[V; 16]) -> [f32; 16] {
    let mut gathered = [0f32; 16];
    for lane in 0..16 {
        gathered[lane] = values[lane].get();
    }
    gathered
}

/// A little-endian f32 at any alignment. Loops over it vectorise as over f32; loops over `[u8; 4]` do not.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub(crate) struct Loose(u32);

impl Value for Loose {
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from_le(self.0))
    }
}

/// The whole f32 values in `bytes`, where they lie.
#[inline(always)]
pub(crate) fn loose(bytes: &[u8]) -> &[Loose] {
    // SAFETY: `Loose` is four bytes of alignment one, any bits are a value, and the slice stays within `bytes`.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast::<Loose>(), bytes.len() / size_of::<Loose>()) }
}

/// Widens up to [`TILE`] elements into `out`, and returns them.
#[inline(always)]
pub(crate) fn widen<'a>(dtype: Dtype, bytes: &[u8], out: &'a mut [f32; TILE]) -> &'a [f32] {
    match dtype {
        Dtype::F32 => widen_each(bytes, out, |b: [u8; 4]| f32::from_le_bytes(b)),
        Dtype::F16 => widen_each(bytes, out, |b: [u8; 2]| half::f16_to_f32(u16::from_le_bytes(b))),
        Dtype::Bf16 => widen_each(bytes, out, |b: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
        Dtype::F64 => widen_each(bytes, out, |b: [u8; 8]| f64::from_le_bytes(b) as f32),
        Dtype::F8E4m3 => widen_each(bytes, out, |b: [u8; 1]| fp8::e4m3_to_f32(b[0])),
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
