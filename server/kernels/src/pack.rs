//! Dense little-endian bit streams: element `i` of a channel occupies bits `i*b .. i*b+b`, padded to 32-bit words.
//!
//! Eight codes of `b` bits are `b` bytes, so that is the unit here: eight bytes in a `u64`, folded pairwise.

use crate::{Codes, Packing};

/// The bytes that `elements` codes of one channel take.
pub fn packed_bytes(codes: Codes, elements: usize) -> usize {
    match codes {
        Codes::Int { packing: Packing::Plain, .. } | Codes::Fp8E4m3 => elements,
        Codes::Int { bits, packing: Packing::Dense, .. } => (elements * usize::from(bits)).div_ceil(32) * 4,
    }
}

/// Packs unsigned codes of `bits` bits, one a byte, into `out`; the padding is zero.
#[inline(always)]
pub(crate) fn pack(bits: u8, codes: &[u8], out: &mut [u8]) {
    match bits {
        2 => pack_as::<2>(codes, out),
        3 => pack_as::<3>(codes, out),
        4 => pack_as::<4>(codes, out),
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

#[inline(always)]
fn fold<const BITS: usize>(eight: [u8; 8]) -> u64 {
    let x = u64::from_le_bytes(eight);
    let x = (x & 0x00ff_00ff_00ff_00ff) | ((x >> 8 & 0x00ff_00ff_00ff_00ff) << BITS);
    let x = (x & 0x0000_ffff_0000_ffff) | ((x >> 16 & 0x0000_ffff_0000_ffff) << (2 * BITS));
    (x & 0xffff_ffff) | ((x >> 32) << (4 * BITS))
}

/// Unpacks `codes.len()` codes, the inverse of [`pack`]. `packed` holds at least the bytes that hold them.
#[inline(always)]
pub(crate) fn unpack(bits: u8, packed: &[u8], codes: &mut [u8]) {
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
    let (eights, rest) = codes.as_chunks_mut::<8>();
    for (bytes, eight) in packed.chunks(BITS).zip(eights.iter_mut()) {
        *eight = unfold::<BITS>(bytes);
    }
    if !rest.is_empty() {
        let eight = unfold::<BITS>(&packed[eights.len() * BITS..][..(rest.len() * BITS).div_ceil(8)]);
        rest.copy_from_slice(&eight[..rest.len()]);
    }
}

#[inline(always)]
fn unfold<const BITS: usize>(bytes: &[u8]) -> [u8; 8] {
    let mut padded = [0u8; 8];
    padded[..bytes.len()].copy_from_slice(bytes);
    let x = u64::from_le_bytes(padded);
    let mask = (1u64 << BITS) - 1;
    std::array::from_fn(|i| (x >> (i * BITS) & mask) as u8)
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
                pack(bits, &codes, &mut packed);
                let bit = |i: usize| packed[i / 8] >> (i % 8) & 1;
                for (i, code) in codes.iter().enumerate() {
                    let read = (0..usize::from(bits)).fold(0, |sum, k| sum | bit(i * usize::from(bits) + k) << k);
                    assert_eq!(read, *code, "{bits} bits, element {i} of {len}");
                }
                assert!((len * usize::from(bits)..packed.len() * 8).all(|i| bit(i) == 0), "padding");
                let mut back = vec![0; len];
                unpack(bits, &packed, &mut back);
                assert_eq!(back, codes);
            }
        }
    }

    #[test]
    fn the_words_are_those_of_compressed_tensors() {
        // Read off compressed-tensors 0.20's pack_to_int32.
        let mut words = [0u8; 4];
        pack(4, &[-8i8, -7, -6, -5, 0, 1, 6, 7].map(|code| (code + 8) as u8), &mut words);
        assert_eq!(u32::from_le_bytes(words), 0xfe98_3210);
    }
}
