//! Dense little-endian bit streams: element `i` of a channel occupies bits `i*b .. i*b+b`, padded to 32-bit words.
//!
//! Eight codes of `b` bits are `b` bytes, so that is the unit here: eight bytes in a `u64`, folded pairwise.

use crate::{Codes, Level, Packing, level::multiversion, simd::Simd};

/// The bytes that `elements` codes of one channel take.
pub fn packed_bytes(codes: Codes, elements: usize) -> usize {
    match codes {
        Codes::Int { packing: Packing::Plain, .. } | Codes::Fp8E4m3 | Codes::Rowwise => elements,
        Codes::Int { bits, packing: Packing::Dense, .. } => (elements * usize::from(bits)).div_ceil(32) * 4,
        // Groups of 16 and 32 fill whole words, so there is nothing to pad.
        Codes::Fp4E2m1 | Codes::Fp6E2m3 | Codes::Codebook(_) => (elements * usize::from(codes.bits())).div_ceil(8),
        Codes::Block(block) => elements.div_ceil(block.elements()) * block.bytes(),
    }
}

/// Packs unsigned codes of `bits` bits, one a byte, into `out`; the padding is zero.
pub(crate) fn pack(level: Level, bits: u8, codes: &[u8], out: &mut [u8]) {
    pack_run(level, bits, codes, out);
}

/// Unpacks `codes.len()` codes, the inverse of [`pack`]. `packed` holds at least the bytes that hold them.
pub(crate) fn unpack(level: Level, bits: u8, packed: &[u8], codes: &mut [u8]) {
    unpack_run(level, bits, packed, codes);
}

multiversion! { fn pack_run(bits: u8, codes: &[u8], out: &mut [u8]) -> () = pack_body<R>; }
multiversion! { fn unpack_run(bits: u8, packed: &[u8], codes: &mut [u8]) -> () = unpack_body<R>; }

/// Turns packed codes of four bits so that the first of two is the upper half of its byte, or back. `fill` stands beside the last of
/// an odd number.
#[inline(always)]
pub(crate) fn halves_turned(bytes: &mut [u8], is_odd: bool, fill: u8) {
    for byte in bytes.iter_mut() {
        *byte = byte.rotate_left(4);
    }
    if let (true, Some(last)) = (is_odd, bytes.last_mut()) {
        *last = *last & 0xf0 | fill;
    }
}

#[inline(always)]
fn pack_body<R: Simd>(bits: u8, codes: &[u8], out: &mut [u8]) {
    match bits {
        2 => pack_as::<2>(codes, out),
        3 => pack_as::<3>(codes, out),
        4 => pack_nibbles(codes, out),
        5 => pack_as::<5>(codes, out),
        6 => pack_as::<6>(codes, out),
        7 => pack_as::<7>(codes, out),
        _ => {
            out[..codes.len()].copy_from_slice(codes);
            out[codes.len()..].fill(0);
        }
    }
}

#[inline(always)]
fn pack_as<const BITS: usize>(codes: &[u8], out: &mut [u8]) {
    let (eights, rest) = codes.as_chunks::<8>();
    let (whole, tail) = out.split_at_mut(eights.len() * BITS);
    for (eight, bytes) in eights.iter().zip(whole.as_chunks_mut::<BITS>().0) {
        bytes.copy_from_slice(&fold::<BITS>(*eight).to_le_bytes()[..BITS]);
    }
    tail.fill(0);
    if !rest.is_empty() {
        let mut eight = [0u8; 8];
        eight[..rest.len()].copy_from_slice(rest);
        let bytes = fold::<BITS>(eight).to_le_bytes();
        let used = (rest.len() * BITS).div_ceil(8);
        tail[..used].copy_from_slice(&bytes[..used]);
    }
}

/// Four bits, pair by pair: a shift and a narrowing of whole registers.
#[inline(always)]
fn pack_nibbles(codes: &[u8], out: &mut [u8]) {
    let (pairs, rest) = codes.as_chunks::<2>();
    let (whole, tail) = out.split_at_mut(pairs.len());
    for (pair, byte) in pairs.iter().zip(whole) {
        let pair = u16::from_le_bytes(*pair);
        *byte = (pair | pair >> 4) as u8;
    }
    tail.fill(0);
    if let [last] = rest {
        tail[0] = *last;
    }
}

#[inline(always)]
fn fold<const BITS: usize>(eight: [u8; 8]) -> u64 {
    let x = u64::from_le_bytes(eight);
    let x = (x & 0x00ff_00ff_00ff_00ff) | ((x >> 8 & 0x00ff_00ff_00ff_00ff) << BITS);
    let x = (x & 0x0000_ffff_0000_ffff) | ((x >> 16 & 0x0000_ffff_0000_ffff) << (2 * BITS));
    (x & 0xffff_ffff) | ((x >> 32) << (4 * BITS))
}

#[inline(always)]
fn unpack_body<R: Simd>(bits: u8, packed: &[u8], codes: &mut [u8]) {
    match bits {
        2 => unpack_as::<2>(packed, codes),
        3 => unpack_as::<3>(packed, codes),
        4 => unpack_as::<4>(packed, codes),
        5 => unpack_as::<5>(packed, codes),
        6 => unpack_as::<6>(packed, codes),
        7 => unpack_as::<7>(packed, codes),
        _ => codes.copy_from_slice(&packed[..codes.len()]),
    }
}

#[inline(always)]
fn unpack_as<const BITS: usize>(packed: &[u8], codes: &mut [u8]) {
    // Eight bytes are read for each eight codes, so the last few are read from a copy.
    let wide = (packed.len().saturating_sub(8) / BITS).min(codes.len() / 8);
    let (eights, rest) = codes.split_at_mut(wide * 8);
    for (index, eight) in eights.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let (bytes, _) = packed[index * BITS..].split_first_chunk::<8>().expect("eight bytes follow");
        *eight = unfold::<BITS>(u64::from_le_bytes(*bytes));
    }
    for (bytes, eight) in packed[wide * BITS..].chunks(BITS).zip(rest.chunks_mut(8)) {
        let mut padded = [0u8; 8];
        padded[..bytes.len()].copy_from_slice(bytes);
        eight.copy_from_slice(&unfold::<BITS>(u64::from_le_bytes(padded))[..eight.len()]);
    }
}

/// The inverse of [`fold`], of the lowest `8 * BITS` bits.
#[inline(always)]
fn unfold<const BITS: usize>(x: u64) -> [u8; 8] {
    let low = |bits: usize| (1u64 << bits) - 1;
    let x = (x & low(4 * BITS)) | (x >> (4 * BITS) & low(4 * BITS)) << 32;
    let pair = low(2 * BITS) | low(2 * BITS) << 32;
    let x = (x & pair) | (x >> (2 * BITS) & pair) << 16;
    let one = low(BITS) * 0x0001_0001_0001_0001;
    let x = (x & one) | (x >> BITS & one) << 8;
    x.to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_is_the_bit_stream_that_it_says() {
        for bits in 2..=8u8 {
            for len in 0..100usize {
                let codes: Vec<u8> = (0..len).map(|i| (i * 37 + 11) as u8 & (((1u16 << bits) - 1) as u8)).collect();
                let int = Codes::Int { bits, symmetric: true, packing: Packing::Dense };
                let mut packed = vec![0xaa; packed_bytes(int, len)];
                pack(Level::detect(), bits, &codes, &mut packed);
                let bit = |i: usize| packed[i / 8] >> (i % 8) & 1;
                for (i, code) in codes.iter().enumerate() {
                    let read = (0..usize::from(bits)).fold(0, |sum, k| sum | bit(i * usize::from(bits) + k) << k);
                    assert_eq!(read, *code, "{bits} bits, element {i} of {len}");
                }
                assert!((len * usize::from(bits)..packed.len() * 8).all(|i| bit(i) == 0), "padding");
                let mut back = vec![0; len];
                unpack(Level::detect(), bits, &packed, &mut back);
                assert_eq!(back, codes);
            }
        }
    }

    #[test]
    fn the_words_are_those_of_compressed_tensors() {
        // Read off compressed-tensors 0.20's pack_to_int32.
        let mut words = [0u8; 4];
        pack(Level::detect(), 4, &[-8i8, -7, -6, -5, 0, 1, 6, 7].map(|code| (code + 8) as u8), &mut words);
        assert_eq!(u32::from_le_bytes(words), 0xfe98_3210);
    }
}
