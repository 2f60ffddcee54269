//! Eight lanes, with AVX2 and F16C.

use std::arch::x86_64::*;

use super::{Simd, at, intrinsics};
use crate::{
    element::{LANES, LooseBf16, LooseF16, LooseF32},
    level::Kind,
};

/// AVX2 and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

impl Simd for Avx2 {
    const W: usize = 8;
    const KIND: Kind = Kind::Avx2;
    type F = __m256;
    type I = __m256i;

    intrinsics! {
        fn splat(value: f32) -> __m256 = _mm256_set1_ps(value);
        fn splat_i(value: u32) -> __m256i = _mm256_set1_epi32(value as i32);
        fn load(values: &[f32; LANES], from: usize) -> __m256 = _mm256_loadu_ps(at!(values, from));
        fn load_loose(values: &[LooseF32; LANES], from: usize) -> __m256 = _mm256_loadu_ps(at!(values, from).cast());
        fn load_bf16(values: &[LooseBf16; LANES], from: usize) -> __m256 = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(at!(values, from).cast()))));
        fn load_f16(values: &[LooseF16; LANES], from: usize) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(at!(values, from).cast()));
        fn load_bytes(bytes: &[u8; LANES], from: usize) -> __m256i = _mm256_cvtepu8_epi32(_mm_loadl_epi64(at!(bytes, from).cast()));
        fn store(values: __m256, out: &mut [f32; LANES], from: usize) -> () = _mm256_storeu_ps(at!(mut out, from), values);
        fn store_bytes(values: __m256i, out: &mut [u8; LANES], from: usize) -> () = {
            let low = _mm256_shuffle_epi8(values, _mm256_set1_epi64x(0x0c08_0400));
            let low = _mm256_permutevar8x32_epi32(low, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
            _mm_storel_epi64(at!(mut out, from).cast(), _mm256_castsi256_si128(low))
        };
        fn write(values: __m256, out: &mut [u8]) -> () = {
            assert!(out.len() == 4 * Self::W);
            _mm256_storeu_ps(out.as_mut_ptr().cast(), values)
        };
        fn write_halves(values: __m256i, out: &mut [u8]) -> () = {
            let low = _mm256_shuffle_epi8(values, _mm256_set1_epi64x(0x0d0c_0908_0504_0100));
            let low = _mm256_permute4x64_epi64::<0b1000>(low);
            assert!(out.len() == 2 * Self::W);
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm256_castsi256_si128(low))
        };
        fn write_high_halves(a: __m256i, b: __m256i, out: &mut [u8]) -> () = {
            // Each half of the register packs its own quarters of both.
            let packed = _mm256_packus_epi32(_mm256_srli_epi32::<16>(a), _mm256_srli_epi32::<16>(b));
            assert!(out.len() == 4 * Self::W);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(packed))
        };
        fn add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        fn sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        fn mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        fn div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        fn sqrt(a: __m256) -> __m256 = _mm256_sqrt_ps(a);
        fn min(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
        fn max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        fn sum(lanes: &[f32; LANES]) -> f32 = {
            let eight = _mm256_add_ps(_mm256_loadu_ps(lanes.as_ptr()), _mm256_loadu_ps(lanes.as_ptr().add(8)));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        };
        fn sums(lanes: [&[f32; LANES]; 3]) -> [f32; 3] = {
            // No loop and no closure: a closure would be compiled without the level's features.
            let [a, b, c] = lanes;
            let a = _mm256_add_ps(_mm256_loadu_ps(a.as_ptr()), _mm256_loadu_ps(a.as_ptr().add(8)));
            let b = _mm256_add_ps(_mm256_loadu_ps(b.as_ptr()), _mm256_loadu_ps(b.as_ptr().add(8)));
            let c = _mm256_add_ps(_mm256_loadu_ps(c.as_ptr()), _mm256_loadu_ps(c.as_ptr().add(8)));
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let b = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps::<1>(b));
            let c = _mm_add_ps(_mm256_castps256_ps128(c), _mm256_extractf128_ps::<1>(c));
            // a0 + a2, a1 + a3, b0 + b2, b1 + b3; and c alone; then all three.
            let ab = _mm_add_ps(_mm_movelh_ps(a, b), _mm_movehl_ps(b, a));
            let c = _mm_add_ps(c, _mm_movehl_ps(c, c));
            let all = _mm_add_ps(_mm_shuffle_ps::<0b00_00_10_00>(ab, c), _mm_shuffle_ps::<0b01_01_11_01>(ab, c));
            let mut sums = [0f32; 4];
            _mm_storeu_ps(sums.as_mut_ptr(), all);
            [sums[0], sums[1], sums[2]]
        };
        fn greatest(lanes: &[f32; LANES]) -> f32 = {
            let eight = _mm256_max_ps(_mm256_loadu_ps(lanes.as_ptr()), _mm256_loadu_ps(lanes.as_ptr().add(8)));
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        };
        fn greatest_lane(a: __m256) -> f32 = {
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        };
        fn greatest_i(a: __m256i) -> u32 = {
            let four = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let two = _mm_max_epi32(four, _mm_shuffle_epi32::<0b1110>(four));
            _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32::<1>(two))) as u32
        };
        fn count_differing(a: __m256, b: __m256) -> u32 =
            (_mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NEQ_OQ>(a, b)) as u32).count_ones();
        fn below(a: __m256, b: __m256) -> u32 = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a, b)) as u32;
        fn select_at_most(a: __m256, bound: __m256, then: __m256, otherwise: __m256) -> __m256 =
            _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps::<_CMP_LE_OQ>(a, bound));
        fn select_below(a: __m256, bound: __m256, then: __m256, otherwise: __m256) -> __m256 =
            _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps::<_CMP_LT_OQ>(a, bound));
        fn truncated(a: __m256) -> __m256i = _mm256_cvttps_epi32(a);
        fn round_f16(a: __m256) -> __m256 = _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a));
        fn f16_bits(a: __m256) -> __m256i = _mm256_cvtepu16_epi32(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a));
        fn bits(a: __m256) -> __m256i = _mm256_castps_si256(a);
        fn number(a: __m256i) -> __m256 = _mm256_castsi256_ps(a);
        fn float(a: __m256i) -> __m256 = _mm256_cvtepi32_ps(a);
        fn add_i(a: __m256i, b: __m256i) -> __m256i = _mm256_add_epi32(a, b);
        fn sub_i(a: __m256i, b: __m256i) -> __m256i = _mm256_sub_epi32(a, b);
        fn and(a: __m256i, b: __m256i) -> __m256i = _mm256_and_si256(a, b);
        fn or(a: __m256i, b: __m256i) -> __m256i = _mm256_or_si256(a, b);
        fn xor(a: __m256i, b: __m256i) -> __m256i = _mm256_xor_si256(a, b);
        fn max_halves(a: __m256i, b: __m256i) -> __m256i = _mm256_max_epi16(a, b);
        fn min_i(a: __m256i, b: __m256i) -> __m256i = _mm256_min_epi32(a, b);
        fn max_i(a: __m256i, b: __m256i) -> __m256i = _mm256_max_epi32(a, b);
    }

    #[inline(always)]
    fn shl<const N: u32>(a: __m256i) -> __m256i {
        // SAFETY: as in `intrinsics!`.
        unsafe { _mm256_sll_epi32(a, _mm_cvtsi32_si128(N as i32)) }
    }
    #[inline(always)]
    fn shr<const N: u32>(a: __m256i) -> __m256i {
        // SAFETY: as in `intrinsics!`.
        unsafe { _mm256_srl_epi32(a, _mm_cvtsi32_si128(N as i32)) }
    }
}
