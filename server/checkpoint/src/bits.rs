//! Zero points as compressed-tensors packs them: along the output channels, dense, offset-binary, in 32-bit words.

/// Packs a row-major matrix `[channels, columns]` of signed codes of `bits` bits to `[words, columns]`.
pub(crate) fn pack_down(points: &[i8], columns: usize, bits: u8) -> Vec<u8> {
    let channels = points.len().checked_div(columns).unwrap_or(0);
    let words = (channels * usize::from(bits)).div_ceil(32);
    let mut packed = vec![0u32; words * columns];
    for channel in 0..channels {
        let (word, shift) = place(channel, bits);
        for column in 0..columns {
            let code =
                u64::from((i32::from(points[channel * columns + column]) + (1 << (bits - 1))) as u32 & mask(bits))
                    << shift;
            packed[word * columns + column] |= code as u32;
            if code >> 32 != 0 {
                packed[(word + 1) * columns + column] |= (code >> 32) as u32;
            }
        }
    }
    packed.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// The inverse of [`pack_down`]; `packed` holds `[words, columns]`.
pub(crate) fn unpack_down(packed: &[u8], channels: usize, columns: usize, bits: u8) -> Vec<i32> {
    let words = Vec::from_iter(packed.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)));
    let at = |word: usize, column| words.get(word * columns + column).copied().unwrap_or(0);
    let points = (0..channels).flat_map(|channel| {
        let (word, shift) = place(channel, bits);
        (0..columns).map(move |column| {
            let both = u64::from(at(word, column)) | u64::from(at(word + 1, column)) << 32;
            ((both >> shift) as u32 & mask(bits)) as i32 - (1 << (bits - 1))
        })
    });
    points.collect()
}

fn place(channel: usize, bits: u8) -> (usize, usize) {
    let bit = channel * usize::from(bits);
    (bit / 32, bit % 32)
}

fn mask(bits: u8) -> u32 {
    (1 << bits) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_downward_is_what_compressed_tensors_does() {
        // FORMATS.md, section 1.2: the row [-8,-7,-6,-5,0,1,6,7] of int4 is 0xfe983210; here as a column.
        let column = [-8, -7, -6, -5, 0, 1, 6, 7];
        assert_eq!(pack_down(&column, 1, 4), 0xfe98_3210u32.to_le_bytes());
        // Section 1.2 again: int3 codes 0,1..7,0,1,2 fill a word and go on in the next.
        let column = Vec::from_iter((0..11i8).map(|i| i % 8 - 4));
        let stream = column.iter().enumerate().fold(0u64, |all, (i, code)| all | ((code + 4) as u64) << (3 * i));
        assert_eq!(pack_down(&column, 1, 3), stream.to_le_bytes());
    }

    #[test]
    fn unpacking_undoes_it() {
        for bits in 2..=8u8 {
            for (channels, columns) in [(1, 1), (11, 3), (60, 2), (33, 1)] {
                let half = 1 << (bits - 1);
                let points = Vec::from_iter((0..channels * columns).map(|i| (i as i32 * 7) % (2 * half) - half));
                let narrow = Vec::from_iter(points.iter().map(|point| *point as i8));
                let packed = pack_down(&narrow, columns, bits);
                assert_eq!(packed.len(), (channels * usize::from(bits)).div_ceil(32) * 4 * columns);
                assert_eq!(unpack_down(&packed, channels, columns, bits), points);
            }
        }
    }
}
