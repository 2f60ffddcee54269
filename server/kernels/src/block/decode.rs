//! Blocks to values: whole numbers, each group's multiplied by its scale, and its lift taken away.

use super::{Block, E2M1_DOUBLED, IQ4_NL, e8m0_halved, layout, ue4m3_halved};
use crate::{
    TILE,
    dequantize::{AsBf16, AsF16, AsF32, Decoded, Narrow},
    element::LANES,
    half,
    simd::Simd,
};

/// What the codes of a tile stand for, before they are scaled, and the scale and lift of each sixteen.
struct Units {
    units: [u8; TILE],
    scales: [f32; LANES],
    /// What is added; not where `lifts` is not: adding 0.0 would make -0.0 of a product 0.0.
    added: [f32; LANES],
    lifts: bool,
}

/// Decodes as many elements as `out` has room for: whole blocks.
#[inline(always)]
pub(crate) fn dequantize<R: Simd>(block: Block, bytes: &[u8], decoded: Decoded, out: &mut [u8]) {
    match decoded {
        Decoded::F32 => tiles::<R, AsF32>(block, bytes, out),
        Decoded::Bf16 => tiles::<R, AsBf16>(block, bytes, out),
        Decoded::F16 => tiles::<R, AsF16>(block, bytes, out),
    }
}

#[inline(always)]
fn tiles<R: Simd, N: Narrow>(block: Block, bytes: &[u8], out: &mut [u8]) {
    let tile_bytes = TILE / block.elements() * block.bytes();
    let mut tile = Units { units: [0; TILE], scales: [0.0; LANES], added: [0.0; LANES], lifts: false };
    for (bytes, out) in bytes.chunks(tile_bytes).zip(out.chunks_mut(TILE * N::BYTES)) {
        let sixteens = block.elements() / LANES;
        let codes = tile.units.chunks_exact_mut(block.elements());
        let parameters = tile.scales.chunks_exact_mut(sixteens).zip(tile.added.chunks_exact_mut(sixteens));
        for ((bytes, codes), (scales, added)) in bytes.chunks_exact(block.bytes()).zip(codes).zip(parameters) {
            tile.lifts = read(block, bytes, codes, scales, added);
        }
        values::<R, N>(&tile, out);
    }
}

#[inline(always)]
fn values<R: Simd, N: Narrow>(tile: &Units, out: &mut [u8]) {
    let (sixteens, _) = tile.units.as_chunks::<LANES>();
    for (index, out) in out.chunks_exact_mut(LANES * N::BYTES).enumerate() {
        let (scale, added) = (R::splat(tile.scales[index]), R::splat(tile.added[index]));
        for from in (0..LANES).step_by(R::W) {
            // Two's complement: offset by 128, and back.
            let whole = R::xor(R::load_bytes(&sixteens[index], from), R::splat_i(128));
            let value = R::mul(R::float(R::sub_i(whole, R::splat_i(128))), scale);
            N::write::<R>(if tile.lifts { R::add(value, added) } else { value }, out, from);
        }
    }
}

fn f16(bytes: &[u8]) -> f32 {
    half::f16_to_f32(u16::from_le_bytes([bytes[0], bytes[1]]))
}

/// Takes `by` from every code.
#[inline(always)]
fn lower(codes: &mut [u8], by: u8) {
    for code in codes {
        *code = code.wrapping_sub(by);
    }
}

/// Replaces codes by what they stand for.
#[inline(always)]
fn look_up(codes: &mut [u8], values: &[i8; 16]) {
    for code in codes {
        *code = values[usize::from(*code & 15)] as u8;
    }
}

/// One block: its codes' units, two's complement, and for each sixteen the scale, and what is added. Whether anything is.
#[inline(always)]
fn read(block: Block, bytes: &[u8], units: &mut [u8], scales: &mut [f32], added: &mut [f32]) -> bool {
    match block {
        Block::Q8_0 => {
            units.copy_from_slice(&bytes[2..]);
            scales.fill(f16(bytes));
            false
        }
        Block::Q4_0 => {
            layout::from_nibbles::<16, 32>(&bytes[2..], units);
            lower(units, 8);
            scales.fill(f16(bytes));
            false
        }
        Block::Q5_0 => {
            layout::from_nibbles::<16, 32>(&bytes[6..], units);
            layout::with_fifth_bits(&bytes[2..6], units);
            lower(units, 16);
            scales.fill(f16(bytes));
            false
        }
        Block::Q4_1 => {
            layout::from_nibbles::<16, 32>(&bytes[4..], units);
            scales.fill(f16(bytes));
            added.fill(f16(&bytes[2..]));
            true
        }
        Block::Q5_1 => {
            layout::from_nibbles::<16, 32>(&bytes[8..], units);
            layout::with_fifth_bits(&bytes[4..8], units);
            scales.fill(f16(bytes));
            added.fill(f16(&bytes[2..]));
            true
        }
        Block::Iq4Nl => {
            layout::from_nibbles::<16, 32>(&bytes[2..], units);
            look_up(units, &IQ4_NL);
            scales.fill(f16(bytes));
            false
        }
        Block::Mxfp4 => {
            layout::from_nibbles::<16, 32>(&bytes[1..], units);
            look_up(units, &E2M1_DOUBLED);
            scales.fill(e8m0_halved(bytes[0]));
            false
        }
        Block::Nvfp4 => {
            layout::from_nibbles::<8, 16>(&bytes[4..], units);
            look_up(units, &E2M1_DOUBLED);
            for (scale, bits) in scales.iter_mut().zip(bytes) {
                *scale = ue4m3_halved(*bits);
            }
            false
        }
        Block::Q2K => {
            units.fill(0);
            layout::with_pairs::<0>(&bytes[16..80], units);
            let (scale, lift) = (f16(&bytes[80..]), f16(&bytes[82..]));
            for (at, byte) in bytes[..16].iter().enumerate() {
                scales[at] = scale * f32::from(byte & 15);
                added[at] = -(lift * f32::from(byte >> 4));
            }
            true
        }
        Block::Q3K => {
            units.fill(0);
            layout::with_pairs::<0>(&bytes[32..96], units);
            layout::with_single_bits::<2>(&bytes[..32], units);
            lower(units, 4);
            let scale = f16(&bytes[108..]);
            for (small, out) in layout::from_sixteen_of_six(&bytes[96..108]).iter().zip(scales) {
                *out = scale * (f32::from(*small) - 32.0);
            }
            false
        }
        Block::Q4K => {
            layout::from_nibbles::<32, 64>(&bytes[16..], units);
            six_bit_scales(bytes, scales, added);
            true
        }
        Block::Q5K => {
            layout::from_nibbles::<32, 64>(&bytes[48..], units);
            layout::with_single_bits::<4>(&bytes[16..48], units);
            six_bit_scales(bytes, scales, added);
            true
        }
        Block::Q6K => {
            layout::from_nibbles::<64, 128>(&bytes[..128], units);
            layout::with_pairs::<4>(&bytes[128..192], units);
            lower(units, 32);
            let scale = f16(&bytes[208..]);
            for (small, out) in bytes[192..208].iter().zip(scales) {
                *out = scale * f32::from(*small as i8);
            }
            false
        }
    }
}

fn six_bit_scales(bytes: &[u8], scales: &mut [f32], added: &mut [f32]) {
    let (scale, lift) = (f16(bytes), f16(&bytes[2..]));
    let (small, lifts) = layout::from_six_bits(&bytes[4..16]);
    for (at, (scale_out, added)) in scales.iter_mut().zip(added).enumerate() {
        *scale_out = scale * f32::from(small[at / 2]);
        *added = -(lift * f32::from(lifts[at / 2]));
    }
}
