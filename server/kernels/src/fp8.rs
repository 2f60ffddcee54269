//! `float8_e4m3fn`: one sign bit, four of exponent (bias 7), three of mantissa; no infinity, NaN is 0x7f and 0xff.
//! Source: "FP8 Formats for Deep Learning" (arXiv 2209.05433), table 1; `fn` as in PyTorch.

/// The largest finite value.
pub(crate) const E4M3_MAX: f32 = 448.0;

/// Widens, exactly.
#[inline(always)]
pub(crate) fn e4m3_to_f32(code: u8) -> f32 {
    let sign = u32::from(code & 0x80) << 24;
    let magnitude = u32::from(code & 0x7f);
    let normal = (magnitude << 20) + ((127 - 7) << 23);
    // A subnormal is an integer times 2^-9.
    let subnormal = (magnitude as f32 * f32::from_bits((127 - 9) << 23)).to_bits();
    let finite = if magnitude < 8 { subnormal } else { normal };
    f32::from_bits(sign | if magnitude == 0x7f { 0x7fc0_0000 } else { finite })
}

/// The nearest code, ties to even, of a value within `-448..=448`; the sign of zero is kept.
#[inline(always)]
pub(crate) fn e4m3_from_f32(value: f32) -> u8 {
    let bits = value.to_bits();
    let sign = (bits >> 24) & 0x80;
    let magnitude = bits & 0x7fff_ffff;
    // Below 2^-6 the quantum is 2^-9: adding 2^14 rounds there, since that float's last bit is worth 2^-9.
    let subnormal = (f32::from_bits(magnitude) + 16384.0).to_bits().wrapping_sub(16384.0f32.to_bits());
    let odd = (magnitude >> 20) & 1;
    let normal = magnitude.wrapping_sub((127 - 7) << 23).wrapping_add(0x7_ffff + odd) >> 20;
    (sign | if magnitude < (127 - 6) << 23 { subnormal } else { normal }) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_comes_back_and_every_tie_goes_to_the_even_code() {
        for code in (0..=0x7e).chain(0x80..=0xfe) {
            assert_eq!(e4m3_from_f32(e4m3_to_f32(code)), code);
        }
        assert!(e4m3_to_f32(0x7f).is_nan());
        assert_eq!(e4m3_to_f32(0x7e), E4M3_MAX);
        assert_eq!(e4m3_to_f32(0x01), 2f32.powi(-9));
        for code in 0..0x7e {
            let tie = (e4m3_to_f32(code) + e4m3_to_f32(code + 1)) / 2.0;
            let even = code + (code & 1);
            assert_eq!(e4m3_from_f32(tie), even, "{tie}");
            assert_eq!(e4m3_from_f32(f32::from_bits(tie.to_bits() - 1)), code);
            assert_eq!(e4m3_from_f32(f32::from_bits(tie.to_bits() + 1)), code + 1);
            assert_eq!(e4m3_from_f32(-tie), even | 0x80);
        }
    }
}
