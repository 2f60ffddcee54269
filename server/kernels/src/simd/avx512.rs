//! Sixteen lanes, with AVX-512 F and BW.

use std::arch::x86_64::*;

use super::{Avx2, Simd, at, intrinsics};
use crate::{
    element::{LANES, LooseBf16, LooseF16, LooseF32},
    level::Kind,
};

/// AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

/// 1, 3, 5, ..: the upper halves of the lanes of two registers.
static ODD_HALVES: [u16; 2 * LANES] = {
    let mut odd = [0; 2 * LANES];
    let mut i = 0;
    while i < odd.len() {
        odd[i] = 2 * i as u16 + 1;
        i += 1;
    }
    odd
};

impl Simd for Avx512 {
    const W: usize = 16;
    const KIND: Kind = Kind::Avx512;
    type F = __m512;
    type I = __m512i;

    intrinsics! {
        fn splat(value: f32) -> __m512 = _mm512_set1_ps(value);
        fn splat_i(value: u32) -> __m512i = _mm512_set1_epi32(value as i32);
        fn load(values: &[f32; LANES], from: usize) -> __m512 = _mm512_loadu_ps(at!(values, from));
        fn load_loose(values: &[LooseF32; LANES], from: usize) -> __m512 = _mm512_loadu_ps(at!(values, from).cast());
        fn load_bf16(values: &[LooseBf16; LANES], from: usize) -> __m512 = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(at!(values, from).cast()))));
        fn load_f16(values: &[LooseF16; LANES], from: usize) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(at!(values, from).cast()));
        fn load_bytes(bytes: &[u8; LANES], from: usize) -> __m512i = _mm512_cvtepu8_epi32(_mm_loadu_si128(at!(bytes, from).cast()));
        fn store(values: __m512, out: &mut [f32; LANES], from: usize) -> () = _mm512_storeu_ps(at!(mut out, from), values);
        fn store_bytes(values: __m512i, out: &mut [u8; LANES], from: usize) -> () = _mm_storeu_si128(at!(mut out, from).cast(), _mm512_cvtepi32_epi8(values));
        fn write(values: __m512, out: &mut [u8]) -> () = {
            assert!(out.len() == 4 * Self::W);
            _mm512_storeu_ps(out.as_mut_ptr().cast(), values)
        };
        fn write_halves(values: __m512i, out: &mut [u8]) -> () = {
            assert!(out.len() == 2 * Self::W);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(values))
        };
        fn write_high_halves(a: __m512i, b: __m512i, out: &mut [u8]) -> () = {
            assert!(out.len() == 4 * Self::W);
            let odd = _mm512_loadu_si512(ODD_HALVES.as_ptr().cast());
            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutex2var_epi16(a, odd, b))
        };
        fn add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        fn sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        fn mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        fn div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        fn sqrt(a: __m512) -> __m512 = _mm512_sqrt_ps(a);
        fn min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        fn max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        fn greatest_lane(a: __m512) -> f32 =
            Avx2::greatest_lane(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a)));
        fn greatest_i(a: __m512i) -> u32 =
            Avx2::greatest_i(_mm256_max_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64::<1>(a)));
        fn count_differing(a: __m512, b: __m512) -> u32 = _mm512_cmp_ps_mask::<_CMP_NEQ_OQ>(a, b).count_ones();
        fn below(a: __m512, b: __m512) -> u32 = u32::from(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b));
        fn select_at_most(a: __m512, bound: __m512, then: __m512, otherwise: __m512) -> __m512 =
            _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, bound), then);
        fn select_below(a: __m512, bound: __m512, then: __m512, otherwise: __m512) -> __m512 =
            _mm512_mask_mov_ps(otherwise, _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, bound), then);
        fn truncated(a: __m512) -> __m512i = _mm512_cvttps_epi32(a);
        fn round_f16(a: __m512) -> __m512 = _mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a));
        fn f16_bits(a: __m512) -> __m512i = _mm512_cvtepu16_epi32(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a));
        fn bits(a: __m512) -> __m512i = _mm512_castps_si512(a);
        fn number(a: __m512i) -> __m512 = _mm512_castsi512_ps(a);
        fn float(a: __m512i) -> __m512 = _mm512_cvtepi32_ps(a);
        fn add_i(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32(a, b);
        fn sub_i(a: __m512i, b: __m512i) -> __m512i = _mm512_sub_epi32(a, b);
        fn and(a: __m512i, b: __m512i) -> __m512i = _mm512_and_si512(a, b);
        fn or(a: __m512i, b: __m512i) -> __m512i = _mm512_or_si512(a, b);
        fn xor(a: __m512i, b: __m512i) -> __m512i = _mm512_xor_si512(a, b);
        fn max_halves(a: __m512i, b: __m512i) -> __m512i = _mm512_max_epi16(a, b);
        fn min_i(a: __m512i, b: __m512i) -> __m512i = _mm512_min_epi32(a, b);
        fn max_i(a: __m512i, b: __m512i) -> __m512i = _mm512_max_epi32(a, b);
    }

    // Of sixteen lanes in memory: AVX2's.
    #[inline(always)]
    fn sum(lanes: &[f32; LANES]) -> f32 {
        Avx2::sum(lanes)
    }
    #[inline(always)]
    fn sums(lanes: [&[f32; LANES]; 3]) -> [f32; 3] {
        Avx2::sums(lanes)
    }
    #[inline(always)]
    fn greatest(lanes: &[f32; LANES]) -> f32 {
        Avx2::greatest(lanes)
    }
    #[inline(always)]
    fn shl<const N: u32>(a: __m512i) -> __m512i {
        // SAFETY: as in `intrinsics!`.
        unsafe { _mm512_slli_epi32::<N>(a) }
    }
    #[inline(always)]
    fn shr<const N: u32>(a: __m512i) -> __m512i {
        // SAFETY: as in `intrinsics!`.
        unsafe { _mm512_srli_epi32::<N>(a) }
    }
}
