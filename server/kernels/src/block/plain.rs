//! Blocks whose scale follows from their range: one look at the elements, then their codes.

use super::Block;
use crate::{
    Part, TILE,
    coder::Coder,
    element::{LANES, LooseF32, Value, as_f32, loose},
    level::prefetch,
    quantize::{Measure, code_groups},
    simd::Simd,
    sums::{Lanes, Registers},
};

/// A type of block.
pub(super) trait Plain: Coder + Copy + Default {
    const BLOCK: Block;
    /// Columns that share a scale.
    const GROUP: usize = 32;

    /// What becomes of the elements of a tile's groups.
    fn of<R: Simd>(values: &[LooseF32], groups: &mut [Self]);

    /// Where in a block of 32 its codes begin, if they lie as nibbles.
    const NIBBLES: Option<usize> = None;

    /// Writes a block's scales.
    fn write_scales(groups: &[Self], out: &mut [u8]);

    /// Writes a block's codes, if they are no [`Plain::NIBBLES`].
    fn write_codes(_: &[u8], _: &mut [u8]) {}
}

#[inline(always)]
pub(super) fn quantize<R: Simd, M: Measure, P: Plain>(part: &Part<'_>, out: &mut [u8]) -> M::Made {
    let mut made = M::default();
    let (mut wide, mut codes) = ([0f32; TILE], [0u8; TILE]);
    let mut groups = [P::default(); LANES];
    let (elements, bytes) = (P::BLOCK.elements(), P::BLOCK.bytes());
    let mut ahead = part.ahead.chunks(TILE * part.dtype.bytes());
    for ((_, tile), out) in part.tiles().zip(out.chunks_mut(TILE / elements * bytes)) {
        prefetch(ahead.next().unwrap_or_default());
        // Each type as f32, so that there is one loop for all.
        let values = loose::<LooseF32>(as_f32(part.dtype, tile, &mut wide));
        let groups = &mut groups[..values.len() / P::GROUP];
        P::of::<R>(values, groups);
        for (groups, out) in groups.chunks(elements / P::GROUP).zip(out.chunks_exact_mut(bytes)) {
            P::write_scales(groups, out);
        }
        if let Some(at) = P::NIBBLES {
            let lanes = code_nibbles::<R, M, P>(values, groups, at, out);
            made.add::<R, LooseF32>(values, &lanes, |column| {
                let byte = out[column / 32 * bytes + at + column % 16];
                groups[column / 32].decode(if column % 32 < 16 { byte & 15 } else { byte >> 4 })
            });
            continue;
        }
        let codes = &mut codes[..values.len()];
        let lanes = code_groups::<R, M, LooseF32, P>(values, groups, P::GROUP, codes);
        made.add::<R, LooseF32>(values, &lanes, |column| groups[column / P::GROUP].decode(codes[column]));
        for (codes, out) in codes.chunks_exact(elements).zip(out.chunks_exact_mut(bytes)) {
            P::write_codes(codes, out);
        }
    }
    made.made::<R>()
}

/// Codes blocks of 32 right to where they lie: byte j of sixteen, `at` bytes from the block's first, has code j below and code
/// j + 16 above.
#[inline(always)]
fn code_nibbles<R: Simd, M: Measure, P: Plain>(values: &[LooseF32], groups: &[P], at: usize, out: &mut [u8]) -> Lanes {
    let mut lanes = Lanes::new();
    for from in (0..LANES).step_by(R::W) {
        let mut sums = Registers::<R>::new();
        let blocks = values.as_chunks::<LANES>().0.as_chunks::<2>().0.iter().zip(groups);
        for (([low, high], group), out) in blocks.zip(out.chunks_exact_mut(P::BLOCK.bytes())) {
            let (x_low, x_high) = (R::load_loose(low, from), R::load_loose(high, from));
            let (low, high) = (group.code::<R>(x_low), group.code::<R>(x_high));
            let bytes = R::or(low.codes, R::shl::<4>(high.codes));
            if let Some(nibbles) = out[at..].first_chunk_mut::<LANES>() {
                R::store_bytes(bytes, nibbles, from);
            }
            if M::SUMS {
                sums.add(x_low, &low);
                sums.add(x_high, &high);
            }
        }
        lanes.put(from, sums);
    }
    lanes
}

/// The least and the greatest of whole sixteens.
#[inline(always)]
fn ends<R: Simd>(values: &[LooseF32]) -> (f32, f32) {
    let (mut low, mut high) = (R::splat(f32::MAX), R::splat(-f32::MAX));
    for sixteen in values.as_chunks::<LANES>().0 {
        for from in (0..LANES).step_by(R::W) {
            let values = R::load_loose(sixteen, from);
            (low, high) = (R::min(values, low), R::max(values, high));
        }
    }
    (0.0 - R::greatest_lane(R::sub(R::splat(0.0), low)), R::greatest_lane(high))
}

/// The ends of a tile's groups of 32.
#[inline(always)]
fn ends_of_groups<R: Simd>(values: &[LooseF32]) -> ([f32; LANES], [f32; LANES]) {
    let (mut lows, mut highs) = ([0f32; LANES], [0f32; LANES]);
    for ((low, high), values) in lows.iter_mut().zip(&mut highs).zip(values.as_chunks::<32>().0) {
        (*low, *high) = ends::<R>(values);
    }
    (lows, highs)
}

/// Of each group the first element of the greatest magnitude, with its sign; 0.0 where all are zero.
#[inline(always)]
pub(super) fn greatest_signed<R: Simd>(values: &[LooseF32]) -> [f32; LANES] {
    let (lows, highs) = ends_of_groups::<R>(values);
    let mut found = [0f32; LANES];
    for from in (0..LANES).step_by(R::W) {
        let (low, high) = (R::load(&lows, from), R::load(&highs, from));
        // No branch, as none could be foreseen.
        R::store(R::select_below(R::sub(R::splat(0.0), low), high, high, low), &mut found, from);
    }
    for (at, values) in values.as_chunks::<32>().0.iter().enumerate() {
        let most = highs[at];
        if most == -lows[at] {
            let first = || values.iter().map(|value| value.get()).find(|value| value.abs() == most);
            found[at] = if most == 0.0 { 0.0 } else { first().unwrap_or(most) };
        }
    }
    found
}

/// Of each group the least and the greatest; of zeros of both signs, the first.
#[inline(always)]
pub(super) fn signed_ends<R: Simd>(values: &[LooseF32]) -> ([f32; LANES], [f32; LANES]) {
    let (mut lows, mut highs) = ends_of_groups::<R>(values);
    for (at, values) in values.as_chunks::<32>().0.iter().enumerate() {
        if lows[at] == 0.0 {
            let first = values.iter().map(|value| value.get()).find(|value| *value == 0.0).unwrap_or(0.0);
            lows[at] = first;
            highs[at] = if highs[at] == 0.0 { first } else { highs[at] };
        }
    }
    (lows, highs)
}

/// Scales of a tile's groups.
pub(super) struct Scales {
    /// What elements are multiplied by: ggml's `d ? 1/d : 0`. NaN in place of an infinity, so that every code is that of NaN: what
    /// ggml's conversion makes of infinities and NaN alike.
    pub(super) by: [f32; LANES],
    /// As f16 holds them.
    pub(super) stored: [f32; LANES],
    pub(super) bits: [[u8; 2]; LANES],
}

impl Scales {
    /// Of numbers over a divisor.
    #[inline(always)]
    pub(super) fn of<R: Simd>(numbers: &[f32; LANES], divisor: f32) -> Scales {
        let mut scales = Scales { by: [0.0; LANES], stored: [0.0; LANES], bits: [[0; 2]; LANES] };
        let (zero, infinity, none) = (R::splat(0.0), R::splat(f32::INFINITY), R::splat(f32::NAN));
        for from in (0..LANES).step_by(R::W) {
            let scale = R::div(R::load(numbers, from), R::splat(divisor));
            let by = R::div(R::splat(1.0), scale);
            let by = R::select_below(R::abs(by), infinity, by, none);
            let by = R::select_at_most(R::abs(scale), zero, zero, by);
            R::store(by, &mut scales.by, from);
            R::store(R::round_f16(scale), &mut scales.stored, from);
            R::write_halves(R::f16_bits(scale), scales.bits[from..from + R::W].as_flattened_mut());
        }
        scales
    }
}
