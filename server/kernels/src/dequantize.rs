//! Values from codes: `(code - zero point) * scale` in f32, rounded once where a narrower type is asked for.

use std::marker::PhantomData;

use crate::{
    Codebook, Codes, Dtype, Grid, Level, Packing, TILE, block,
    codebook::{Fp4, Looked, Nf4, Rowwise},
    element::{LANES, widen},
    level::multiversion,
    minifloat::{self, E2m1, E2m3, E4m3, Minifloat},
    pack,
    part::pieces,
    quantize::assert_whole,
    simd::{One, Simd},
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
    /// The channel's scales and zero points.
    pub grid: Grid<'a>,
}

/// Decodes as many elements as `out` has room for, little-endian. Scales over the global one are numbers, finite; a value
/// is NaN only if its code is, or the scale in its block.
///
/// # Panics
/// If `packed`, the scales or the zero points are too short for that.
pub fn dequantize(level: Level, coded: &Coded<'_>, decoded: Decoded, out: &mut [u8]) {
    let elements = out.len() / decoded.bytes();
    assert!(coded.packed.len() >= pack::packed_bytes(coded.codes, elements), "bytes of the codes");
    assert_whole(coded.codes, elements);
    run(level, coded, decoded, out);
}

multiversion! { fn run(coded: &Coded<'_>, decoded: Decoded, out: &mut [u8]) = body<R>; }

#[inline(always)]
fn body<R: Simd>(coded: &Coded<'_>, decoded: Decoded, out: &mut [u8]) {
    if let Codes::Block(block) = coded.codes {
        return block::dequantize::<R>(block, coded.packed, decoded, out);
    }
    match decoded {
        Decoded::F32 => tiles::<R, AsF32>(coded, out),
        Decoded::Bf16 => tiles::<R, NumbersAsBf16>(coded, out),
        Decoded::F16 => tiles::<R, AsF16>(coded, out),
    }
}

#[inline(always)]
fn tiles<R: Simd, N: Narrow>(coded: &Coded<'_>, out: &mut [u8]) {
    let bits = coded.codes.bits();
    let mut bytes = [0u8; TILE];
    for (index, out) in out.chunks_mut(TILE * N::BYTES).enumerate() {
        let len = out.len() / N::BYTES;
        let packed = &coded.packed[index * TILE / 8 * usize::from(bits)..];
        let bytes = match bits {
            8 => &packed[..len],
            _ => {
                let mut turned = [0u8; TILE / 2];
                let packed = match coded.codes {
                    Codes::Codebook(_) => {
                        let turned = &mut turned[..len.div_ceil(2)];
                        turned.copy_from_slice(&packed[..len.div_ceil(2)]);
                        pack::halves_turned(turned, false, 0);
                        turned
                    }
                    _ => packed,
                };
                pack::unpack(Level(R::KIND), bits, packed, &mut bytes[..len]);
                &bytes[..len]
            }
        };
        for piece in pieces(coded.column + index * TILE, len, coded.group) {
            let scale = coded.grid.scales[piece.group] / coded.grid.global;
            let zero_points = coded.grid.zero_points;
            let zero_point = if zero_points.is_empty() { 0 } else { zero_points[piece.group] };
            let (bytes, out) = (&bytes[piece.start..piece.end], &mut out[piece.start * N::BYTES..piece.end * N::BYTES]);
            match coded.codes {
                Codes::Rowwise => each::<R, N, Rowwise>(bytes, out, scale, 0),
                Codes::Codebook(Codebook::Nf4) => each::<R, N, Looked<Nf4>>(bytes, out, scale, 0),
                Codes::Codebook(Codebook::Fp4) => each::<R, N, Looked<Fp4>>(bytes, out, scale, 0),
                Codes::Int { packing: Packing::Dense, .. } => {
                    each::<R, N, Whole>(bytes, out, scale, zero_point + (1 << (bits - 1)));
                }
                Codes::Int { packing: Packing::Plain, .. } => each::<R, N, Signed>(bytes, out, scale, zero_point),
                Codes::Fp8E4m3 => minis::<R, N, E4m3>(bytes, out, scale),
                Codes::Fp6E2m3 => minis::<R, N, E2m3>(bytes, out, scale),
                Codes::Fp4E2m1 => minis::<R, N, E2m1>(bytes, out, scale),
                Codes::Block(_) => unreachable!("blocks are decoded by themselves"),
            }
        }
    }
}

/// Decodes small floats that share a scale.
#[inline(always)]
fn minis<R: Simd, N: Narrow, F: Minifloat>(codes: &[u8], out: &mut [u8], scale: f32) {
    // From 2^-124 on, since the least of them is 2^-9, and the least bfloat16 2^-133.
    let is_power_of_two = scale.to_bits().is_multiple_of(1 << 23) && scale >= f32::from_bits(3 << 23);
    match is_power_of_two {
        true => each::<R, N::OfFewBits, Mini<F>>(codes, out, scale, 0),
        false => each::<R, N, Mini<F>>(codes, out, scale, 0),
    }
}

/// What a code's byte stands for, before it is scaled.
pub(crate) trait Unit {
    /// `zero` is the byte's number that stands for zero.
    fn unit<S: Simd>(codes: S::I, zero: S::I) -> S::F;

    /// The value of such a number.
    #[inline(always)]
    fn scaled<S: Simd>(unit: S::F, scale: S::F) -> S::F {
        S::mul(unit, scale)
    }
}

/// Offset binary.
struct Whole;
/// Two's complement.
pub(crate) struct Signed;
/// A small float.
struct Mini<F>(PhantomData<F>);

impl Unit for Whole {
    #[inline(always)]
    fn unit<S: Simd>(codes: S::I, zero: S::I) -> S::F {
        S::float(S::sub_i(codes, zero))
    }
}

impl Unit for Signed {
    #[inline(always)]
    fn unit<S: Simd>(codes: S::I, zero: S::I) -> S::F {
        // Offset by 128, and back.
        let whole = S::xor(codes, S::splat_i(128));
        S::float(S::sub_i(S::sub_i(whole, S::splat_i(128)), zero))
    }
}

impl<F: Minifloat> Unit for Mini<F> {
    #[inline(always)]
    fn unit<S: Simd>(codes: S::I, _: S::I) -> S::F {
        minifloat::decode::<S, F>(codes)
    }
}

/// The type that values are written in.
pub(crate) trait Narrow {
    const BYTES: usize;
    /// The same where values are known to be bfloat16.
    type OfFewBits: Narrow;
    /// A register of values into the bytes of sixteen.
    fn write<S: Simd>(values: S::F, out: &mut [u8], from: usize);

    /// Two registers of values, one behind the other.
    #[inline(always)]
    fn write_two<S: Simd>(a: S::F, b: S::F, out: &mut [u8], from: usize) {
        Self::write::<S>(a, out, from);
        Self::write::<S>(b, out, from + S::W);
    }
}

pub(crate) struct AsF32;
pub(crate) struct AsBf16;
/// Of numbers, and of NaN without a payload.
struct NumbersAsBf16;
/// Of what is bfloat16 already.
pub(crate) struct ExactBf16;
pub(crate) struct AsF16;

impl Narrow for AsF32 {
    const BYTES: usize = 4;
    type OfFewBits = AsF32;

    #[inline(always)]
    fn write<S: Simd>(values: S::F, out: &mut [u8], from: usize) {
        S::write(values, &mut out[from * 4..(from + S::W) * 4]);
    }
}

impl Narrow for AsBf16 {
    const BYTES: usize = 2;
    type OfFewBits = ExactBf16;

    #[inline(always)]
    fn write<S: Simd>(values: S::F, out: &mut [u8], from: usize) {
        S::write_halves(S::bf16_bits(values), &mut out[from * 2..(from + S::W) * 2]);
    }
}

impl Narrow for NumbersAsBf16 {
    const BYTES: usize = 2;
    type OfFewBits = ExactBf16;

    #[inline(always)]
    fn write<S: Simd>(values: S::F, out: &mut [u8], from: usize) {
        S::write_halves(S::bf16_bits_of_numbers(values), &mut out[from * 2..(from + S::W) * 2]);
    }

    #[inline(always)]
    fn write_two<S: Simd>(a: S::F, b: S::F, out: &mut [u8], from: usize) {
        let (a, b) = (S::bf16_bits_above(a), S::bf16_bits_above(b));
        S::write_high_halves(a, b, &mut out[from * 2..(from + 2 * S::W) * 2]);
    }
}

impl Narrow for ExactBf16 {
    const BYTES: usize = 2;
    type OfFewBits = ExactBf16;

    #[inline(always)]
    fn write<S: Simd>(values: S::F, out: &mut [u8], from: usize) {
        S::write_halves(S::shr::<16>(S::bits(values)), &mut out[from * 2..(from + S::W) * 2]);
    }

    #[inline(always)]
    fn write_two<S: Simd>(a: S::F, b: S::F, out: &mut [u8], from: usize) {
        S::write_high_halves(S::bits(a), S::bits(b), &mut out[from * 2..(from + 2 * S::W) * 2]);
    }
}

impl Narrow for AsF16 {
    const BYTES: usize = 2;
    type OfFewBits = AsF16;

    #[inline(always)]
    fn write<S: Simd>(values: S::F, out: &mut [u8], from: usize) {
        S::write_halves(S::f16_bits(values), &mut out[from * 2..(from + S::W) * 2]);
    }
}

/// Decodes codes that share a scale.
#[inline(always)]
fn each<R: Simd, N: Narrow, U: Unit>(codes: &[u8], out: &mut [u8], scale: f32, zero: i32) {
    let (pairs, rest) = codes.as_chunks::<{ 2 * LANES }>();
    let (whole, out) = out.split_at_mut(pairs.len() * 2 * LANES * N::BYTES);
    for (codes, out) in pairs.iter().zip(whole.chunks_exact_mut(2 * LANES * N::BYTES)) {
        let (codes, _) = codes.as_chunks::<LANES>();
        for from in (0..2 * LANES).step_by(2 * R::W) {
            let a = value::<R, U>(&codes[from / LANES], from % LANES, scale, zero);
            let b = value::<R, U>(&codes[(from + R::W) / LANES], (from + R::W) % LANES, scale, zero);
            N::write_two::<R>(a, b, out, from);
        }
    }
    let (sixteens, rest) = rest.as_chunks::<LANES>();
    let (whole, tail) = out.split_at_mut(sixteens.len() * LANES * N::BYTES);
    for (codes, out) in sixteens.iter().zip(whole.chunks_exact_mut(LANES * N::BYTES)) {
        for from in (0..LANES).step_by(R::W) {
            N::write::<R>(value::<R, U>(codes, from, scale, zero), out, from);
        }
    }
    for (code, out) in rest.iter().zip(tail.chunks_exact_mut(N::BYTES)) {
        let unit = U::unit::<One>([u32::from(*code)], [zero as u32]);
        N::write::<One>(U::scaled::<One>(unit, [scale]), out, 0);
    }
}

/// A register of the values of sixteen codes.
#[inline(always)]
fn value<R: Simd, U: Unit>(codes: &[u8; LANES], from: usize, scale: f32, zero: i32) -> R::F {
    U::scaled::<R>(U::unit::<R>(R::load_bytes(codes, from), R::splat_i(zero as u32)), R::splat(scale))
}

/// Rewrites elements of one type in another, through f32: what `dequantize` does with layers that were kept.
///
/// # Panics
/// If `out` is shorter than the elements.
pub fn convert(level: Level, dtype: Dtype, bytes: &[u8], decoded: Decoded, out: &mut [u8]) {
    assert!(out.len() >= bytes.len() / dtype.bytes() * decoded.bytes(), "bytes for the values");
    run_convert(level, dtype, bytes, decoded, out);
}

multiversion! { fn run_convert(dtype: Dtype, bytes: &[u8], decoded: Decoded, out: &mut [u8]) = convert_body<R>; }

#[inline(always)]
fn convert_body<R: Simd>(dtype: Dtype, bytes: &[u8], decoded: Decoded, out: &mut [u8]) {
    let mut tile = [0f32; TILE];
    for (bytes, out) in bytes.chunks(TILE * dtype.bytes()).zip(out.chunks_mut(TILE * decoded.bytes())) {
        let values = widen(dtype, bytes, &mut tile);
        match decoded {
            Decoded::F32 => narrow::<R, AsF32>(values, out),
            Decoded::Bf16 => narrow::<R, AsBf16>(values, out),
            Decoded::F16 => narrow::<R, AsF16>(values, out),
        }
    }
}

#[inline(always)]
fn narrow<R: Simd, N: Narrow>(values: &[f32], out: &mut [u8]) {
    let (sixteens, rest) = values.as_chunks::<LANES>();
    let (whole, tail) = out.split_at_mut(sixteens.len() * LANES * N::BYTES);
    for (values, out) in sixteens.iter().zip(whole.chunks_exact_mut(LANES * N::BYTES)) {
        for from in (0..LANES).step_by(R::W) {
            N::write::<R>(R::load(values, from), out, from);
        }
    }
    for (value, out) in rest.iter().zip(tail.chunks_exact_mut(N::BYTES)) {
        N::write::<One>([*value], out, 0);
    }
}
