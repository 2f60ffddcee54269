//! Symmetric integers are divided by their scale: codes and saturation must be the division's for every pair of element and
//! scale, and above all near half-way between two codes, where a reciprocal would choose the other one.

use proptest::prelude::*;
use quarrel_kernels::{
    Arith, Codes, Dtype, Format, Grid, Importance, Level, Packing, Part, Scaling, packed_bytes, quantize,
};

use crate::{
    asked,
    data::{scales, stepped},
    oracle,
};

const BITS: std::ops::RangeInclusive<u8> = 2..=8;

/// Codes `values`, each `group` of them by a scale, and compares with true division.
fn check(level: Level, bits: u8, values: &[f32], group: usize, scales: &[f32]) {
    let codes = Codes::Int { bits, symmetric: true, packing: Packing::Dense };
    let format = Format { codes, scaling: Scaling::Weights };
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let part = Part { dtype: Dtype::F32, bytes: &bytes, column: 0, group, ahead: &[], importance: Importance::NONE };
    let mut packed = [0xaa; 1024];
    let packed = &mut packed[..packed_bytes(codes, values.len())];
    let grid = Grid { scales, magnitudes: &[], zero_points: &[], global: 1.0 };
    let sums = quantize(level, format, Arith::F32, &part, grid, packed);
    let half = 2f32.powi(i32::from(bits) - 1);
    let mut saturated = 0;
    for ((value, code), index) in values.iter().zip(unpacked(bits, packed)).zip(0..) {
        let scale = scales[index / group];
        let quotient = value / scale;
        saturated += u64::from(quotient < -half || quotient > half - 1.0);
        let expected = quotient.clamp(-half, half - 1.0).round_ties_even() + half;
        assert_eq!(f32::from(code), expected, "{level:?}: {bits} bits, {value:e} / {scale:e}, element {index}");
    }
    assert_eq!(sums.saturated, saturated, "{level:?}: {bits} bits, {values:?} / {scales:?}");
}

/// Codes of a stream whose length is a multiple of four bytes; faster than the oracle's, for there are millions.
fn unpacked(bits: u8, packed: &[u8]) -> impl Iterator<Item = u8> {
    let word = |at: usize| (0..2).fold(0u32, |word, k| word | u32::from(*packed.get(at + k).unwrap_or(&0)) << (8 * k));
    (0..).map(move |index| {
        let at = index * usize::from(bits);
        (word(at / 8) >> (at % 8)) as u8 & ((1u16 << bits) - 1) as u8
    })
}

/// Every exponent with some mantissas: none, the smallest, the largest, and some between; and subnormal ones.
fn every_exponent() -> impl Iterator<Item = f32> {
    let mantissas = [0, 1, 2, 0x2a_aaaa, 0x35_04f3, 0x40_0000, 0x55_5555, 0x7f_fffe, 0x7f_ffff];
    let exponents = (0..255u32).step_by(asked::stride(17));
    let all = exponents.flat_map(move |exponent| mantissas.map(|mantissa| f32::from_bits(exponent << 23 | mantissa)));
    all.filter(|scale| *scale > 0.0)
}

/// `units` scaled, then sixteen neighbours from there on, upward or downward.
fn neighbours(units: f64, scale: f32, steps: i32) -> [f32; 16] {
    let mut value = (units * f64::from(scale)) as f32;
    if !value.is_finite() {
        value = f32::MAX.copysign(value);
    }
    std::array::from_fn(|_| {
        let this = value;
        let next = stepped(value, steps);
        value = if next.is_finite() { next } else { this };
        this
    })
}

/// How far from half-way the product with a reciprocal can be in doubt is 3 of these.
fn unit(half: i32) -> f64 {
    f64::from(half + 1) * 2f64.powi(-24)
}

#[test]
fn ties_and_all_that_is_near_them_are_coded_as_by_division() {
    for bits in BITS {
        let half = 1i32 << (bits - 1);
        for (turn, scale) in every_exponent().enumerate() {
            let level = asked::levels()[turn % asked::levels().len()];
            // Of many codes, an eighth at each scale; the next scale takes others.
            let chosen = |code: &i32| bits < 6 || (code + turn as i32) % 8 == 0 || code.abs() > half - 3;
            for (code, away) in (-half - 1..half).filter(chosen).flat_map(|code| (-6..=6).map(move |away| (code, away)))
            {
                let from = f64::from(code) + 0.5 + f64::from(away * 2) * unit(half);
                let steps = if away < 0 { -1 } else { 1 };
                check(level, bits, &neighbours(from, scale, steps), 16, &[scale]);
            }
        }
    }
}

#[test]
fn saturation_begins_where_the_quotient_leaves_the_codes() {
    for bits in BITS {
        let half = f64::from(1i32 << (bits - 1));
        for scale in every_exponent() {
            for level in asked::levels() {
                for (end, steps) in [(half - 1.0, 1), (half - 1.0, -1), (-half, 1), (-half, -1)] {
                    let around = neighbours(f64::from(stepped(end as f32, -4 * steps)), scale, steps);
                    check(*level, bits, &around, 16, &[scale]);
                    check(*level, bits, &neighbours(end, scale, steps), 16, &[scale]);
                    check(*level, bits, &neighbours(end * 1.001, scale, steps), 16, &[scale]);
                }
            }
        }
    }
}

#[test]
fn millions_of_random_pairs_are_coded_as_by_division() {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        // xorshift64*, Vigna, "An experimental exploration of Marsaglia's xorshift generators" (2016).
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    };
    for _ in 0..asked::times(20_000) {
        for (bits, level) in BITS.zip(asked::levels().iter().cycle()) {
            let half = 2f64.powi(i32::from(bits) - 1);
            // Half of the scales are those of weights, half are any.
            let exponent = if random() % 2 == 0 { 100 + random() % 30 } else { random() % 255 };
            let scale = f32::from_bits((exponent as u32) << 23 | (random() >> 41) as u32).max(f32::from_bits(1));
            let units = |random: u64| ((random >> 11) as f64 / 2f64.powi(52) - 1.0) * (half + 2.0);
            let values: [f32; 16] = std::array::from_fn(|_| {
                let value = (units(random()) * f64::from(scale)) as f32;
                value.clamp(-f32::MAX, f32::MAX)
            });
            check(*level, bits, &values, 16, &[scale]);
        }
    }
}

proptest! {
    #![proptest_config(asked::cases(2000))]

    /// Elements and scales that have nothing to do with each other, each with a scale of its own.
    #[test]
    fn any_element_and_any_scale_are_divided(
        pairs in prop::collection::vec((prop::num::f32::NORMAL | prop::num::f32::SUBNORMAL | prop::num::f32::ZERO, scales()), 1..256),
        bits in BITS,
    ) {
        let (values, scales): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
        for level in asked::levels() {
            check(*level, bits, &values, 1, &scales);
        }
    }

    /// What the fast unpacking here gives is what the oracle's gives.
    #[test]
    fn unpacking_is_the_oracles(bytes in prop::collection::vec(any::<u8>(), 32), bits in BITS) {
        let codes = Codes::Int { bits, symmetric: true, packing: Packing::Dense };
        let count = 32 * 8 / usize::from(bits);
        prop_assert_eq!(unpacked(bits, &bytes).take(count).collect::<Vec<_>>(), oracle::unpack(codes, &bytes, count));
    }
}
