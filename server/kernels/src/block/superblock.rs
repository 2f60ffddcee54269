//! K-quants: blocks of 256 whose groups have small scales under one f16, all of them found by a search.

use std::ops::Range;

use super::{
    Block, layout,
    search::{Affine, Found, LEAST_AMAX, Lanes, Rows, Weights, affine, centred, descended, nearest_one},
    stored,
    weighted::Weighed,
};
use crate::{
    Part, TILE,
    coder::{Coded, Coder, ROUNDING},
    element::{LANES, LooseF32, bytes_of_f32, loose, widen},
    level::prefetch,
    quantize::{Measure, code_groups},
    simd::Simd,
};

/// A type of block whose groups of `N` elements have scales that are searched for.
pub(super) trait Searched<const N: usize> {
    const BLOCK: Block;
    /// How elements are weighted, if by their columns' importance.
    const WEIGHED: Option<Weighed> = None;
    type Coder: Coder + Copy + Default;

    /// Searches for the scales of these groups.
    fn search<R: Simd>(lanes: &Lanes<'_, N>) -> Found<N>;

    /// What becomes of a block's groups, by what was found for them; writes all of the block but its codes.
    fn coders(groups: Groups<'_>, coders: &mut [Self::Coder], out: &mut [u8]);

    /// Whether a group's codes are those that the search ended with.
    fn keeps_searched(_: &Self::Coder) -> bool {
        false
    }

    /// Writes a block's codes.
    fn write(codes: &[u8], out: &mut [u8]);
}

/// What was found for the groups of one block.
#[derive(Clone, Copy)]
pub(super) struct Groups<'a> {
    pub(super) scales: &'a [f32],
    pub(super) minima: &'a [f32],
    pub(super) by: &'a [f32],
    pub(super) origins: &'a [f32],
    pub(super) weights: &'a [f32],
}

impl<'a> Groups<'a> {
    fn of<const N: usize>(found: &'a Found<N>, lanes: Range<usize>) -> Groups<'a> {
        Groups {
            scales: &found.scales[lanes.clone()],
            minima: &found.minima[lanes.clone()],
            by: &found.by[lanes.clone()],
            origins: &found.origins[lanes.clone()],
            weights: &found.weights[lanes],
        }
    }
}

/// Elements that fill sixteen lanes with groups of 32.
const AT_ONCE: usize = 2 * TILE;

#[inline(always)]
pub(super) fn quantize<R: Simd, M: Measure, B: Searched<N>, const N: usize>(
    part: &Part<'_>,
    out: &mut [u8],
) -> M::Made {
    let mut made = M::default();
    // Groups of 16 fill the lanes with one tile.
    let at_once = if N == 16 { TILE } else { AT_ONCE };
    let (mut values, mut weights, mut wide) = ([0f32; AT_ONCE], [0f32; AT_ONCE], [0f32; TILE]);
    let (mut value_rows, mut weight_rows) = ([[0f32; LANES]; N], [[0f32; LANES]; N]);
    let mut importance = part.importance.columns.chunks(at_once);
    let size = part.dtype.bytes();
    let mut ahead = part.ahead.chunks(at_once * size);
    let bytes_at_once = at_once / B::BLOCK.elements() * B::BLOCK.bytes();
    for (bytes, out) in part.bytes.chunks(at_once * size).zip(out.chunks_mut(bytes_at_once)) {
        prefetch(ahead.next().unwrap_or_default());
        let values = &mut values[..bytes.len() / size];
        for (tile, bytes) in values.chunks_mut(TILE).zip(bytes.chunks(TILE * size)) {
            tile.copy_from_slice(widen(part.dtype, bytes, &mut wide));
        }
        if let Some(weighed) = B::WEIGHED {
            let weights = &mut weights[..values.len()];
            weights.copy_from_slice(importance.next().unwrap_or_default());
            weighed.weigh::<R>(values, part.importance.mean_square, weights);
            row_by_row(weights, &mut weight_rows);
        }
        row_by_row(values, &mut value_rows);
        let groups = values.as_chunks::<N>().0;
        let found = B::search::<R>(&Lanes { groups, rows: &value_rows, weights: &weight_rows });
        let tile_bytes = TILE / B::BLOCK.elements() * B::BLOCK.bytes();
        for (index, (tile, out)) in values.chunks(TILE).zip(out.chunks_mut(tile_bytes)).enumerate() {
            quantize_tile::<R, M, B, N>(tile, &found, index * (TILE / N), &mut made, out);
        }
    }
    made.made::<R>()
}

/// Group by group to row by row. Lanes without a group keep what they have.
#[inline(always)]
fn row_by_row<const N: usize>(values: &[f32], rows: &mut Rows<N>) {
    for (lane, group) in values.as_chunks::<N>().0.iter().enumerate() {
        // By index: `zip` was a call for each group.
        for i in 0..N {
            rows[i][lane] = group[i];
        }
    }
}

/// The blocks of one tile, whose groups begin at lane `first`.
#[inline(always)]
fn quantize_tile<R: Simd, M: Measure, B: Searched<N>, const N: usize>(
    values: &[f32],
    found: &Found<N>,
    first: usize,
    made: &mut M,
    out: &mut [u8],
) {
    let groups = values.len() / N;
    let mut coders = [B::Coder::default(); LANES];
    let coders = &mut coders[..groups];
    let per_block = B::BLOCK.elements() / N;
    for (index, out) in out.chunks_exact_mut(B::BLOCK.bytes()).enumerate() {
        let groups = index * per_block..(index + 1) * per_block;
        let lanes = first + groups.start..first + groups.end;
        B::coders(Groups::of(found, lanes), &mut coders[groups], out);
    }
    let coders = &*coders;
    let mut codes = [0u8; TILE];
    let codes = &mut codes[..values.len()];
    let values = loose::<LooseF32>(bytes_of_f32(values));
    let sums = code_groups::<R, M, LooseF32, B::Coder>(values, coders, N, codes);
    made.add::<R, LooseF32>(values, &sums, |column| coders[column / N].decode(codes[column]));
    for (group, coder) in coders.iter().enumerate() {
        if B::keeps_searched(coder) {
            for i in 0..N {
                codes[group * N + i] = found.codes[i][first + group];
            }
        }
    }
    for (codes, out) in codes.chunks_exact(B::BLOCK.elements()).zip(out.chunks_exact_mut(B::BLOCK.bytes())) {
        B::write(codes, out);
    }
}

/// What becomes of one group: `scale * q - lift`, with q from `low` to `high` and codes from zero.
#[derive(Clone, Copy, Default)]
pub(super) struct Group {
    scale: f32,
    lift: f32,
    low: f32,
    high: f32,
    pub(super) keeps_searched: bool,
}

impl Group {
    /// Of a small scale that came out as zero, the codes do not count; ggml writes those that the search ended with.
    pub(super) fn new(scale: f32, lift: f32, low: f32, high: f32) -> Group {
        Group { scale, lift, low, high, keeps_searched: scale == 0.0 }
    }
}

impl Coder for Group {
    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F) -> Coded<S> {
        let divisor = if self.scale == 0.0 { f32::INFINITY } else { self.scale };
        let exact = S::div(S::add(values, S::splat(self.lift)), S::splat(divisor));
        let near = S::min(S::max(exact, S::splat(self.low)), S::splat(self.high));
        let shift = S::splat(ROUNDING - self.low);
        let sum = S::add(near, shift);
        let decoded = S::sub(S::mul(S::splat(self.scale), S::sub(sum, shift)), S::splat(self.lift));
        Coded { codes: S::bits(sum), decoded, exact, near }
    }

    fn decode(&self, code: u8) -> f32 {
        self.scale * (f32::from(code) + self.low) - self.lift
    }
}

/// The scales of a block with minima: the largest becomes `most`, each of them a code of it.
struct Pair {
    bits: [u8; 2],
    value: f32,
    by: f32,
}

impl Pair {
    fn of(numbers: &[f32], most: f32) -> Pair {
        let largest = numbers.iter().fold(0f32, |largest, number| if *number > largest { *number } else { largest });
        let (bits, value) = stored(largest / most);
        Pair { bits, value, by: if largest > 0.0 { most / largest } else { 0.0 } }
    }

    /// The code of one of them; a negative one wraps around, as in C.
    fn code(&self, number: f32) -> u8 {
        nearest_one(self.by * number) as u8
    }
}

macro_rules! with_minima {
    ($(#[$doc:meta])* $name:ident, $block:ident, $group:literal, $rule:expr, $weighed:expr, $coders:ident, $write:expr) => {
        $(#[$doc])*
        pub(super) struct $name;

        impl Searched<$group> for $name {
            const BLOCK: Block = Block::$block;
            const WEIGHED: Option<Weighed> = $weighed;
            type Coder = Group;

            #[inline(always)]
            fn search<R: Simd>(lanes: &Lanes<'_, $group>) -> Found<$group> {
                affine::<R, $group>(lanes.rows, lanes.weights, lanes.groups.len(), $rule)
            }

            fn coders(groups: Groups<'_>, coders: &mut [Group], out: &mut [u8]) {
                $coders(f32::from($rule.max), groups, coders, out);
            }

            fn keeps_searched(group: &Group) -> bool {
                group.keeps_searched
            }

            fn write(codes: &[u8], out: &mut [u8]) {
                $write(codes, out)
            }
        }
    };
}

with_minima!(
    /// Sixteen groups of 16, 2 bits.
    Q2K, Q2K, 16, Affine { max: 3, start: -0.5, step: 0.1, steps: 15, weights: Weights::Magnitude }, None, four_bit_scales,
    |codes: &[u8], out: &mut [u8]| layout::pairs::<0>(codes, &mut out[16..80])
);
with_minima!(
    /// Eight groups of 32, 4 bits.
    Q4K, Q4K, 32, Affine { max: 15, start: -1.0, step: 0.1, steps: 20, weights: Weights::MagnitudeAndMean }, None, six_bit_scales,
    |codes: &[u8], out: &mut [u8]| layout::nibbles::<64, 32>(codes, &mut out[16..])
);
with_minima!(
    /// Eight groups of 32, 5 bits.
    Q5K, Q5K, 32, Affine { max: 31, start: -0.5, step: 0.1, steps: 15, weights: Weights::MagnitudeAndMean }, None, six_bit_scales,
    |codes: &[u8], out: &mut [u8]| {
        layout::single_bits::<4>(codes, &mut out[16..48]);
        layout::nibbles::<64, 32>(codes, &mut out[48..]);
    }
);

fn four_bit_scales(max: f32, groups: Groups<'_>, coders: &mut [Group], out: &mut [u8]) {
    let Groups { scales, minima, .. } = groups;
    let (scale, lift) = (Pair::of(scales, 15.0), Pair::of(minima, 15.0));
    for (at, group) in coders.iter_mut().enumerate() {
        let byte = scale.code(scales[at]) | lift.code(minima[at]) << 4;
        out[at] = byte;
        *group = Group::new(scale.value * f32::from(byte & 15), lift.value * f32::from(byte >> 4), 0.0, max);
    }
    out[80..82].copy_from_slice(&scale.bits);
    out[82..84].copy_from_slice(&lift.bits);
}

fn six_bit_scales(max: f32, groups: Groups<'_>, coders: &mut [Group], out: &mut [u8]) {
    let Groups { scales, minima, .. } = groups;
    let (scale, lift) = (Pair::of(scales, 63.0), Pair::of(minima, 63.0));
    let (mut small, mut lifts) = ([0u8; 8], [0u8; 8]);
    for (at, group) in coders.iter_mut().enumerate() {
        (small[at], lifts[at]) = (scale.code(scales[at]).min(63), lift.code(minima[at]).min(63));
        *group = Group::new(scale.value * f32::from(small[at]), lift.value * f32::from(lifts[at]), 0.0, max);
    }
    out[..2].copy_from_slice(&scale.bits);
    out[2..4].copy_from_slice(&lift.bits);
    out[4..16].copy_from_slice(&layout::six_bits(&small, &lifts));
}

/// The first scale of the greatest magnitude; 0.0 where all are zero.
#[inline(always)]
fn greatest_signed(scales: &[f32]) -> f32 {
    let mut most = 0f32;
    for scale in scales {
        if scale.abs() > most.abs() {
            most = *scale;
        }
    }
    most
}

/// Sixteen groups of 16, 3 bits.
pub(super) struct Q3K;

impl Searched<16> for Q3K {
    const BLOCK: Block = Block::Q3K;
    type Coder = Group;

    #[inline(always)]
    fn search<R: Simd>(lanes: &Lanes<'_, 16>) -> Found<16> {
        descended::<R>(lanes.rows, lanes.groups, 4)
    }

    #[inline(always)]
    fn coders(groups: Groups<'_>, coders: &mut [Group], out: &mut [u8]) {
        let scales = groups.scales;
        let largest = greatest_signed(scales);
        let by = -32.0 / largest;
        let (bits, scale) = if largest == 0.0 { stored(0.0) } else { stored(1.0 / by) };
        let mut small = [0u8; 16];
        for i in 0..16 {
            let code = if largest == 0.0 { -32 } else { i32::from(nearest_one(by * scales[i]) as i8).clamp(-32, 31) };
            small[i] = (code + 32) as u8;
            coders[i] = Group::new(scale * code as f32, 0.0, -4.0, 3.0);
        }
        out[96..108].copy_from_slice(&layout::sixteen_of_six(&small));
        out[108..].copy_from_slice(&bits);
    }

    fn keeps_searched(group: &Group) -> bool {
        group.keeps_searched
    }

    #[inline(always)]
    fn write(codes: &[u8], out: &mut [u8]) {
        layout::single_bits::<2>(codes, &mut out[..32]);
        layout::pairs::<0>(codes, &mut out[32..96]);
    }
}

/// Sixteen groups of 16, 6 bits.
pub(super) struct Q6K;

impl Searched<16> for Q6K {
    const BLOCK: Block = Block::Q6K;
    type Coder = Group;

    #[inline(always)]
    fn search<R: Simd>(lanes: &Lanes<'_, 16>) -> Found<16> {
        centred::<R, 16>(lanes.rows, None, lanes.groups.len(), 32)
    }

    fn coders(groups: Groups<'_>, coders: &mut [Group], out: &mut [u8]) {
        let scales = groups.scales;
        let largest = greatest_signed(scales);
        if largest.abs() < LEAST_AMAX {
            // A block of zero bytes.
            out.fill(0);
            coders.fill(Group::default());
            return;
        }
        let by = -128.0 / largest;
        let (bits, scale) = stored(1.0 / by);
        for (at, group) in coders.iter_mut().enumerate() {
            let code = nearest_one(by * scales[at]).min(127) as i8;
            out[192 + at] = code as u8;
            *group = Group::new(scale * f32::from(code), 0.0, -32.0, 31.0);
        }
        out[208..].copy_from_slice(&bits);
    }

    fn keeps_searched(group: &Group) -> bool {
        group.keeps_searched
    }

    #[inline(always)]
    fn write(codes: &[u8], out: &mut [u8]) {
        layout::nibbles::<128, 64>(codes, &mut out[..128]);
        layout::pairs::<4>(codes, &mut out[128..192]);
    }
}
