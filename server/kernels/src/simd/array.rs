//! Any number of lanes in plain code: the specification.

use super::Simd;
use crate::{
    element::{LANES, LooseBf16, LooseF16, LooseF32, Value},
    half,
    level::Kind,
};

/// `N` lanes.
#[derive(Clone, Copy)]
pub(crate) struct Array<const N: usize>;

/// Each lane of one or two registers. A plain loop: the standard library's combinators do not inline into a function with
/// target features.
macro_rules! lanes {
    ($($lane:ident),+ => $zero:expr, $value:expr) => {{
        let mut out = [$zero; N];
        for i in 0..N {
            $(let $lane = $lane[i];)+
            out[i] = $value;
        }
        out
    }};
}

impl<const N: usize> Simd for Array<N> {
    const W: usize = N;
    const KIND: Kind = Kind::Scalar;
    type F = [f32; N];
    type I = [u32; N];

    #[inline(always)]
    fn splat(value: f32) -> [f32; N] {
        [value; N]
    }
    #[inline(always)]
    fn splat_i(value: u32) -> [u32; N] {
        [value; N]
    }
    #[inline(always)]
    fn load(values: &[f32; LANES], from: usize) -> [f32; N] {
        let values = &values[from..from + N];
        lanes!(values => 0.0, values)
    }
    #[inline(always)]
    fn load_loose(values: &[LooseF32; LANES], from: usize) -> [f32; N] {
        let values = &values[from..from + N];
        lanes!(values => 0.0, values.get())
    }
    #[inline(always)]
    fn load_bf16(values: &[LooseBf16; LANES], from: usize) -> [f32; N] {
        let values = &values[from..from + N];
        lanes!(values => 0.0, values.get())
    }
    #[inline(always)]
    fn load_f16(values: &[LooseF16; LANES], from: usize) -> [f32; N] {
        let values = &values[from..from + N];
        lanes!(values => 0.0, values.get())
    }
    #[inline(always)]
    fn load_bytes(bytes: &[u8; LANES], from: usize) -> [u32; N] {
        let bytes = &bytes[from..from + N];
        lanes!(bytes => 0, u32::from(bytes))
    }
    #[inline(always)]
    fn store(values: [f32; N], out: &mut [f32; LANES], from: usize) {
        out[from..from + N].copy_from_slice(&values);
    }
    #[inline(always)]
    fn store_bytes(values: [u32; N], out: &mut [u8; LANES], from: usize) {
        out[from..from + N].copy_from_slice(&lanes!(values => 0, values as u8));
    }
    #[inline(always)]
    fn write(values: [f32; N], out: &mut [u8]) {
        for (bytes, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
            *bytes = value.to_le_bytes();
        }
    }
    #[inline(always)]
    fn write_halves(values: [u32; N], out: &mut [u8]) {
        for (bytes, value) in out.as_chunks_mut().0.iter_mut().zip(values) {
            *bytes = (value as u16).to_le_bytes();
        }
    }
    #[inline(always)]
    fn write_high_halves(a: [u32; N], b: [u32; N], out: &mut [u8]) {
        let (first, second) = out.split_at_mut(2 * N);
        Self::write_halves(Self::shr::<16>(a), first);
        Self::write_halves(Self::shr::<16>(b), second);
    }
    #[inline(always)]
    fn add(a: [f32; N], b: [f32; N]) -> [f32; N] {
        lanes!(a, b => 0.0, a + b)
    }
    #[inline(always)]
    fn sub(a: [f32; N], b: [f32; N]) -> [f32; N] {
        lanes!(a, b => 0.0, a - b)
    }
    #[inline(always)]
    fn mul(a: [f32; N], b: [f32; N]) -> [f32; N] {
        lanes!(a, b => 0.0, a * b)
    }
    #[inline(always)]
    fn div(a: [f32; N], b: [f32; N]) -> [f32; N] {
        lanes!(a, b => 0.0, a / b)
    }
    #[inline(always)]
    fn sqrt(a: [f32; N]) -> [f32; N] {
        lanes!(a => 0.0, a.sqrt())
    }
    #[inline(always)]
    fn min(a: [f32; N], b: [f32; N]) -> [f32; N] {
        lanes!(a, b => 0.0, if a < b { a } else { b })
    }
    #[inline(always)]
    fn max(a: [f32; N], b: [f32; N]) -> [f32; N] {
        lanes!(a, b => 0.0, if a > b { a } else { b })
    }
    #[inline(always)]
    fn sum(lanes: &[f32; LANES]) -> f32 {
        fold(lanes, |a, b| a + b)
    }
    #[inline(always)]
    fn sums(lanes: [&[f32; LANES]; 3]) -> [f32; 3] {
        lanes.map(Self::sum)
    }
    #[inline(always)]
    fn greatest(lanes: &[f32; LANES]) -> f32 {
        fold(lanes, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn greatest_lane(a: [f32; N]) -> f32 {
        let mut most = a[0];
        for lane in a {
            most = if most > lane { most } else { lane };
        }
        most
    }
    #[inline(always)]
    fn greatest_i(a: [u32; N]) -> u32 {
        a.into_iter().fold(0, u32::max)
    }
    #[inline(always)]
    fn count_differing(a: [f32; N], b: [f32; N]) -> u32 {
        let mut count = 0;
        for i in 0..N {
            count += u32::from((a[i] > b[i]) | (a[i] < b[i]));
        }
        count
    }
    #[inline(always)]
    fn below(a: [f32; N], b: [f32; N]) -> u32 {
        let mut bits = 0;
        for i in 0..N {
            bits |= u32::from(a[i] < b[i]) << i;
        }
        bits
    }
    #[inline(always)]
    fn select_at_most(a: [f32; N], bound: [f32; N], then: [f32; N], otherwise: [f32; N]) -> [f32; N] {
        lanes!(a, bound, then, otherwise => 0.0, if a <= bound { then } else { otherwise })
    }
    #[inline(always)]
    fn select_below(a: [f32; N], bound: [f32; N], then: [f32; N], otherwise: [f32; N]) -> [f32; N] {
        lanes!(a, bound, then, otherwise => 0.0, if a < bound { then } else { otherwise })
    }
    #[inline(always)]
    fn truncated(a: [f32; N]) -> [u32; N] {
        lanes!(a => 0, if a.abs() < 2_147_483_648.0 { a as i32 as u32 } else { 1 << 31 })
    }
    #[inline(always)]
    fn round_f16(a: [f32; N]) -> [f32; N] {
        lanes!(a => 0.0, half::f16_to_f32(half::f32_to_f16(a)))
    }
    #[inline(always)]
    fn f16_bits(a: [f32; N]) -> [u32; N] {
        lanes!(a => 0, u32::from(half::f32_to_f16(a)))
    }
    #[inline(always)]
    fn bits(a: [f32; N]) -> [u32; N] {
        lanes!(a => 0, a.to_bits())
    }
    #[inline(always)]
    fn number(a: [u32; N]) -> [f32; N] {
        lanes!(a => 0.0, f32::from_bits(a))
    }
    #[inline(always)]
    fn float(a: [u32; N]) -> [f32; N] {
        lanes!(a => 0.0, a as i32 as f32)
    }
    #[inline(always)]
    fn add_i(a: [u32; N], b: [u32; N]) -> [u32; N] {
        lanes!(a, b => 0, a.wrapping_add(b))
    }
    #[inline(always)]
    fn sub_i(a: [u32; N], b: [u32; N]) -> [u32; N] {
        lanes!(a, b => 0, a.wrapping_sub(b))
    }
    #[inline(always)]
    fn and(a: [u32; N], b: [u32; N]) -> [u32; N] {
        lanes!(a, b => 0, a & b)
    }
    #[inline(always)]
    fn or(a: [u32; N], b: [u32; N]) -> [u32; N] {
        lanes!(a, b => 0, a | b)
    }
    #[inline(always)]
    fn xor(a: [u32; N], b: [u32; N]) -> [u32; N] {
        lanes!(a, b => 0, a ^ b)
    }
    #[inline(always)]
    fn max_i(a: [u32; N], b: [u32; N]) -> [u32; N] {
        lanes!(a, b => 0, if a > b { a } else { b })
    }
    #[inline(always)]
    fn min_i(a: [u32; N], b: [u32; N]) -> [u32; N] {
        lanes!(a, b => 0, if a < b { a } else { b })
    }
    #[inline(always)]
    fn max_halves(a: [u32; N], b: [u32; N]) -> [u32; N] {
        lanes!(a, b => 0, (a & 0xffff).max(b & 0xffff) | (a >> 16).max(b >> 16) << 16)
    }
    #[inline(always)]
    fn shl<const K: u32>(a: [u32; N]) -> [u32; N] {
        lanes!(a => 0, a << K)
    }
    #[inline(always)]
    fn shr<const K: u32>(a: [u32; N]) -> [u32; N] {
        lanes!(a => 0, a >> K)
    }
}

/// Folds sixteen lanes as a binary tree.
#[inline(always)]
fn fold(lanes: &[f32; LANES], with: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = *lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = with(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}
