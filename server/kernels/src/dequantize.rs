//! Values from codes: `(code - zero point) * scale` in f32, rounded once where a narrower type is asked for.

use crate::{
    Codes, Dtype, Level, Packing, TILE, element::widen, fp8, half, level::multiversion, pack, quantize::pieces,
};

/// The type that decoded values are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decoded {
    /// IEEE binary32: exactly the product.
    F32,
    /// bfloat16, rounded to nearest, ties to even.
    Bf16,
    /// IEEE binary16, rounded to nearest, ties to even; overflows to infinity.
    F16,
}

impl Decoded {
    /// The word on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Decoded::F32 => "f32",
            Decoded::Bf16 => "bf16",
            Decoded::F16 => "f16",
        }
    }

    /// Bytes per element.
    pub const fn bytes(self) -> usize {
        match self {
            Decoded::F32 => 4,
            Decoded::Bf16 | Decoded::F16 => 2,
        }
    }
}

/// Consecutive codes of one output channel.
#[derive(Debug, Clone, Copy)]
pub struct Coded<'a> {
    /// What the codes are.
    pub codes: Codes,
    /// Their bytes: at least those that hold as many elements as are decoded.
    pub packed: &'a [u8],
    /// The column of the first: a multiple of [`TILE`].
    pub column: usize,
    /// Columns that share a scale.
    pub group: usize,
    /// The channel's scales, one a group.
    pub scales: &'a [f32],
    /// The channel's zero points, one a group; empty if symmetric.
    pub zero_points: &'a [i32],
}

/// Decodes as many elements as `out` has room for, little-endian.
///
/// # Panics
/// If `packed`, `scales` or `zero_points` are too short for that.
pub fn dequantize(level: Level, coded: &Coded<'_>, decoded: Decoded, out: &mut [u8]) {
    run(level, coded, decoded, out);
}

multiversion! { fn run(coded: &Coded<'_>, decoded: Decoded, out: &mut [u8]) = body; }

#[inline(always)]
fn body(coded: &Coded<'_>, decoded: Decoded, out: &mut [u8]) {
    let (mut bytes, mut values) = ([0u8; TILE], [0f32; TILE]);
    let bits = coded.codes.bits();
    for (tile, out) in out.chunks_mut(TILE * decoded.bytes()).enumerate() {
        let len = out.len() / decoded.bytes();
        let packed = &coded.packed[tile * TILE / 8 * usize::from(bits)..];
        let (bytes, values) = (&mut bytes[..len], &mut values[..len]);
        pack::unpack(bits, packed, bytes);
        for piece in pieces(coded.column + tile * TILE, len, coded.group) {
            let scale = coded.scales[piece.group];
            let zero_point = coded.zero_points.get(piece.group).copied().unwrap_or(0);
            let (bytes, values) = (&bytes[piece.start..piece.end], &mut values[piece.start..piece.end]);
            match coded.codes {
                Codes::Int { packing: Packing::Dense, .. } => {
                    let offset = (1i32 << (bits - 1)) + zero_point;
                    each(bytes, values, |code| (i32::from(code) - offset) as f32 * scale);
                }
                Codes::Int { packing: Packing::Plain, .. } => {
                    each(bytes, values, |code| (i32::from(code as i8) - zero_point) as f32 * scale);
                }
                Codes::Fp8E4m3 => each(bytes, values, |code| fp8::e4m3_to_f32(code) * scale),
            }
        }
        narrow(values, decoded, out);
    }
}

#[inline(always)]
fn each(codes: &[u8], values: &mut [f32], f: impl Fn(u8) -> f32) {
    for (value, code) in values.iter_mut().zip(codes) {
        *value = f(*code);
    }
}

#[inline(always)]
fn write<const N: usize>(values: &[f32], out: &mut [u8], f: impl Fn(f32) -> [u8; N]) {
    for (bytes, value) in out.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *bytes = f(*value);
    }
}

/// The bytes of numbers, so that [`dequantize`] can write into a buffer that is then handed on as f32.
pub fn bytes_mut(values: &mut [f32]) -> &mut [u8] {
    let bytes = size_of_val(values);
    // SAFETY: the same memory, exclusively borrowed for as long; u8 has no alignment and every bit pattern is an f32.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), bytes) }
}

/// Rewrites elements of one type in another, through f32: what `dequantize` does with layers that were kept.
///
/// # Panics
/// If `out` is shorter than the elements.
pub fn convert(level: Level, dtype: Dtype, bytes: &[u8], decoded: Decoded, out: &mut [u8]) {
    run_convert(level, dtype, bytes, decoded, out);
}

multiversion! { fn run_convert(dtype: Dtype, bytes: &[u8], decoded: Decoded, out: &mut [u8]) = convert_body; }

#[inline(always)]
fn convert_body(dtype: Dtype, bytes: &[u8], decoded: Decoded, out: &mut [u8]) {
    let mut tile = [0f32; TILE];
    for (bytes, out) in bytes.chunks(TILE * dtype.bytes()).zip(out.chunks_mut(TILE * decoded.bytes())) {
        narrow(widen(dtype, bytes, &mut tile), decoded, out);
    }
}

#[inline(always)]
fn narrow(values: &[f32], decoded: Decoded, out: &mut [u8]) {
    match decoded {
        Decoded::F32 => write(values, out, f32::to_le_bytes),
        Decoded::Bf16 => write(values, out, |value| half::f32_to_bf16(value).to_le_bytes()),
        Decoded::F16 => write(values, out, |value| half::f32_to_f16(value).to_le_bytes()),
    }
}
