//! Where the codes of a block lie, and its small scales.

// Loops over arrays of a known length, which become a few whole registers.

/// The chunks of an array's length, side by side.
#[inline(always)]
fn each<const N: usize, const M: usize>(from: &[u8], to: &mut [u8], mut one: impl FnMut(&[u8; N], &mut [u8; M])) {
    for (from, to) in from.as_chunks::<N>().0.iter().zip(to.as_chunks_mut::<M>().0) {
        one(from, to);
    }
}

/// Nibbles of codes, `N` at a time: of these byte j holds code j below, and code j + N/2 above; `HALF` is N/2.
#[inline(always)]
pub(super) fn nibbles<const N: usize, const HALF: usize>(codes: &[u8], out: &mut [u8]) {
    each::<N, HALF>(codes, out, |codes, out| {
        for at in 0..HALF {
            out[at] = codes[at] & 15 | codes[at + HALF] << 4;
        }
    });
}

/// The inverse.
#[inline(always)]
pub(super) fn from_nibbles<const HALF: usize, const N: usize>(bytes: &[u8], codes: &mut [u8]) {
    each::<HALF, N>(bytes, codes, |bytes, codes| {
        for at in 0..HALF {
            (codes[at], codes[at + HALF]) = (bytes[at] & 15, bytes[at] >> 4);
        }
    });
}

/// Bit j holds the fifth bit of code j, of 32 codes.
#[inline(always)]
pub(super) fn fifth_bits(codes: &[u8]) -> [u8; 4] {
    let mut out = [0; 4];
    each::<8, 1>(codes, &mut out, |codes, out| {
        // Eight bits, each in a byte of its own, to one byte.
        let bits = u64::from_le_bytes(*codes) >> 4 & 0x0101_0101_0101_0101;
        out[0] = (bits.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8;
    });
    out
}

/// Adds them.
#[inline(always)]
pub(super) fn with_fifth_bits(bits: &[u8], codes: &mut [u8]) {
    each::<1, 8>(bits, codes, |bits, codes| {
        for (at, code) in codes.iter_mut().enumerate() {
            *code |= (bits[0] >> at & 1) << 4;
        }
    });
}

/// Two bits of each of 256 codes, from bit `SHIFT` on: in each 128, byte l holds those of l, l + 32, l + 64 and l + 96.
#[inline(always)]
pub(super) fn pairs<const SHIFT: u32>(codes: &[u8], out: &mut [u8]) {
    each::<128, 32>(codes, out, |codes, out| {
        for (at, byte) in out.iter_mut().enumerate() {
            let pair = |at: usize| codes[at] >> SHIFT & 3;
            *byte = pair(at) | pair(at + 32) << 2 | pair(at + 64) << 4 | pair(at + 96) << 6;
        }
    });
}

/// The inverse, added.
#[inline(always)]
pub(super) fn with_pairs<const SHIFT: u32>(bytes: &[u8], codes: &mut [u8]) {
    each::<32, 128>(bytes, codes, |bytes, codes| {
        for at in 0..32 {
            codes[at] |= (bytes[at] & 3) << SHIFT;
            codes[at + 32] |= (bytes[at] >> 2 & 3) << SHIFT;
            codes[at + 64] |= (bytes[at] >> 4 & 3) << SHIFT;
            codes[at + 96] |= (bytes[at] >> 6) << SHIFT;
        }
    });
}

/// One bit of each of 256 codes: bit k of byte l is bit `BIT` of code 32k + l.
#[inline(always)]
pub(super) fn single_bits<const BIT: u32>(codes: &[u8], out: &mut [u8]) {
    // No closure: of this length it would be a function of its own, without the level's instructions.
    for (codes, out) in codes.as_chunks::<256>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        let mut bytes = [0; 32];
        for (k, codes) in codes.as_chunks::<32>().0.iter().enumerate() {
            for at in 0..32 {
                bytes[at] |= (codes[at] >> BIT & 1) << k;
            }
        }
        *out = bytes;
    }
}

/// The inverse, added.
#[inline(always)]
pub(super) fn with_single_bits<const BIT: u32>(bytes: &[u8], codes: &mut [u8]) {
    each::<32, 256>(bytes, codes, |bytes, codes| {
        for k in 0..8 {
            for at in 0..32 {
                codes[32 * k + at] |= (bytes[at] >> k & 1) << BIT;
            }
        }
    });
}

/// Eight scales and eight minima of six bits, in twelve bytes.
pub(super) fn six_bits(scales: &[u8; 8], minima: &[u8; 8]) -> [u8; 12] {
    let mut out = [0; 12];
    for j in 0..4 {
        out[j] = scales[j] | scales[j + 4] >> 4 << 6;
        out[j + 4] = minima[j] | minima[j + 4] >> 4 << 6;
        out[j + 8] = scales[j + 4] & 15 | minima[j + 4] << 4;
    }
    out
}

/// The inverse.
pub(super) fn from_six_bits(bytes: &[u8]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut minima) = ([0; 8], [0; 8]);
    for j in 0..4 {
        (scales[j], minima[j]) = (bytes[j] & 63, bytes[j + 4] & 63);
        scales[j + 4] = bytes[j + 8] & 15 | bytes[j] >> 6 << 4;
        minima[j + 4] = bytes[j + 8] >> 4 | bytes[j + 4] >> 6 << 4;
    }
    (scales, minima)
}

/// Sixteen numbers of six bits, in twelve bytes.
#[inline(always)]
pub(super) fn sixteen_of_six(numbers: &[u8; 16]) -> [u8; 12] {
    // All bytes at once: four bits of each in eight bytes, then two of each in four.
    let all = u128::from_le_bytes(*numbers);
    let (first, second) = (all as u64, (all >> 64) as u64);
    let low = first & LOW_HALVES | (second & LOW_HALVES) << 4;
    let mut high = 0;
    for j in 0..4 {
        high |= ((all >> (32 * j)) as u32 >> 4 & 0x0303_0303) << (2 * j);
    }
    let mut out = [0; 12];
    out[..8].copy_from_slice(&low.to_le_bytes());
    out[8..].copy_from_slice(&high.to_le_bytes());
    out
}

const LOW_HALVES: u64 = 0x0f0f_0f0f_0f0f_0f0f;

/// The inverse.
pub(super) fn from_sixteen_of_six(bytes: &[u8]) -> [u8; 16] {
    let mut numbers = [0; 16];
    for (j, number) in numbers.iter_mut().enumerate() {
        let low = if j < 8 { bytes[j] & 15 } else { bytes[j - 8] >> 4 };
        *number = low | (bytes[8 + j % 4] >> (2 * (j / 4)) & 3) << 4;
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_scales_come_back() {
        let numbers = |salt: u8| -> [u8; 16] { std::array::from_fn(|at| (at as u8 * 37 + salt) & 63) };
        for salt in 0..64 {
            assert_eq!(from_sixteen_of_six(&sixteen_of_six(&numbers(salt))), numbers(salt));
            let (a, b) = (numbers(salt), numbers(salt + 21));
            let (a, b) = (a.first_chunk().expect("eight"), b.first_chunk().expect("eight"));
            assert_eq!(from_six_bits(&six_bits(a, b)), (*a, *b));
        }
    }
}
