//! Blocks whose scales are searched for by the columns' importance: ggml's `_impl` functions, where the others are its `_ref`.

use super::{
    Block, layout,
    search::{Affine, Found, Lanes, Weights, affine, centred, positive},
    stored,
    superblock::{self, Group, Groups, Searched},
};
use crate::{
    coder::{Coded, Coder, ROUNDING},
    element::LANES,
    simd::{One, Simd},
};

/// How an element is weighted by its column's importance.
#[derive(Clone, Copy)]
pub(super) enum Weighed {
    /// By it alone.
    Alone,
    /// Times the root of x² and of the mean square of so many elements, that so many times.
    WithMeanOf { elements: usize, times: f32 },
    /// Times the root of x² and of the channel's mean square.
    WithMeanOfChannel,
}

impl Weighed {
    /// Makes weights of the importance that stands in `weights`.
    #[inline(always)]
    pub(super) fn weigh<R: Simd>(self, values: &[f32], mean_square: f32, weights: &mut [f32]) {
        match self {
            Weighed::Alone => {}
            Weighed::WithMeanOf { elements, times } => {
                for (values, weights) in values.chunks_exact(elements).zip(weights.chunks_exact_mut(elements)) {
                    let sum = values.iter().fold(0f32, |sum, x| sum + x * x);
                    by_root::<R>(values, times * sum / elements as f32, weights);
                }
            }
            Weighed::WithMeanOfChannel => by_root::<R>(values, mean_square, weights),
        }
    }
}

#[inline(always)]
fn by_root<R: Simd>(values: &[f32], mean_square: f32, weights: &mut [f32]) {
    for (values, weights) in values.as_chunks::<LANES>().0.iter().zip(weights.as_chunks_mut::<LANES>().0) {
        for from in (0..LANES).step_by(R::W) {
            let x = R::load(values, from);
            let root = R::sqrt(R::add(R::splat(mean_square), R::mul(x, x)));
            let weighted = R::mul(R::load(weights, from), root);
            R::store(weighted, weights, from);
        }
    }
}

/// The K-quants with minima: more divisions than without importance, and scales of the scales that are searched for too.
macro_rules! with_minima {
    ($(#[$doc:meta])* $name:ident, $block:ident, $group:literal, $max:literal, $times:literal, $coders:expr) => {
        $(#[$doc])*
        pub(super) struct $name;

        impl Searched<$group> for $name {
            const BLOCK: Block = Block::$block;
            const WEIGHED: Option<Weighed> = Some(Weighed::WithMeanOf { elements: 256, times: $times });
            type Coder = Group;

            #[inline(always)]
            fn search<R: Simd>(lanes: &Lanes<'_, $group>) -> Found<$group> {
                affine::<R, $group>(lanes.rows, lanes.weights, lanes.groups.len(), finer($max))
            }

            fn coders(groups: Groups<'_>, coders: &mut [Group], out: &mut [u8]) {
                $coders($max as f32, groups, coders, out);
            }

            fn keeps_searched(group: &Group) -> bool {
                group.keeps_searched
            }

            fn write(codes: &[u8], out: &mut [u8]) {
                <superblock::$block as Searched<$group>>::write(codes, out);
            }
        }
    };
}

const fn finer(max: u8) -> Affine {
    Affine { max, start: -0.9, step: 0.05, steps: 36, weights: Weights::Given }
}

with_minima!(
    /// Sixteen groups of 16, 2 bits.
    Q2K, Q2K, 16, 3, 1.0, four_bit_scales
);
with_minima!(
    /// Eight groups of 32, 4 bits.
    Q4K, Q4K, 32, 15, 2.0, six_bit_scales::<255>
);
with_minima!(
    /// Eight groups of 32, 5 bits.
    Q5K, Q5K, 32, 31, 2.0, six_bit_scales::<63>
);

/// The numbers of a block's groups.
fn numbers<const N: usize>(of: &[f32]) -> [f32; N] {
    of.first_chunk().copied().unwrap_or([0.0; N])
}

fn four_bit_scales(max: f32, groups: Groups<'_>, coders: &mut [Group], out: &mut [u8]) {
    let weights = numbers::<16>(groups.weights);
    let (scale, small) = positive(&numbers(groups.scales), &weights, 15);
    let (lift, lifts) = positive(&numbers(groups.minima), &weights, 15);
    let ((scale_bits, scale), (lift_bits, lift)) = (stored(scale), stored(lift));
    for (at, group) in coders.iter_mut().enumerate() {
        let byte = small[at] | lifts[at] << 4;
        out[at] = byte;
        *group = Group::new(scale * f32::from(byte & 15), lift * f32::from(byte >> 4), 0.0, max);
    }
    out[80..82].copy_from_slice(&scale_bits);
    out[82..84].copy_from_slice(&lift_bits);
}

/// Codes of scales are at most `MOST`: one below zero has wrapped around, and only some of ggml's types hold it.
fn six_bit_scales<const MOST: u8>(max: f32, groups: Groups<'_>, coders: &mut [Group], out: &mut [u8]) {
    let weights = numbers::<8>(groups.weights);
    let (scale, small) = positive(&numbers(groups.scales), &weights, 63);
    let (lift, lifts) = positive(&numbers(groups.minima), &weights, 63);
    let ((scale_bits, scale), (lift_bits, lift)) = (stored(scale), stored(lift));
    let packed = layout::six_bits(&small.map(|code| code.min(MOST)), &lifts.map(|code| code.min(MOST)));
    let (small, lifts) = layout::from_six_bits(&packed);
    for (at, group) in coders.iter_mut().enumerate() {
        *group = Group::new(scale * f32::from(small[at]), lift * f32::from(lifts[at]), 0.0, max);
    }
    out[..2].copy_from_slice(&scale_bits);
    out[2..4].copy_from_slice(&lift_bits);
    out[4..16].copy_from_slice(&packed);
}

/// Sixteen groups of 16, 3 bits, whose scales are searched for as elements are.
pub(super) struct Q3K;

impl Searched<16> for Q3K {
    const BLOCK: Block = Block::Q3K;
    const WEIGHED: Option<Weighed> = Some(Weighed::WithMeanOf { elements: 256, times: 2.0 });
    type Coder = Group;

    #[inline(always)]
    fn search<R: Simd>(lanes: &Lanes<'_, 16>) -> Found<16> {
        centred::<R, 16>(lanes.rows, Some(lanes.weights), lanes.groups.len(), 4)
    }

    fn coders(groups: Groups<'_>, coders: &mut [Group], out: &mut [u8]) {
        // One lane, whose elements are the scales.
        let (mut scales, mut weights) = ([[0f32; LANES]; 16], [[0f32; LANES]; 16]);
        for (row, scale) in scales.iter_mut().zip(groups.scales) {
            row[0] = *scale;
        }
        for (row, weight) in weights.iter_mut().zip(groups.weights) {
            row[0] = *weight;
        }
        let found = centred::<One, 16>(&scales, Some(&weights), 1, 32);
        let (bits, scale) = stored(found.scales[0]);
        let mut small = [0u8; 16];
        for ((group, small), row) in coders.iter_mut().zip(&mut small).zip(&found.codes) {
            *small = row[0];
            *group = Group::new(scale * (f32::from(row[0]) - 32.0), 0.0, -4.0, 3.0);
        }
        out[96..108].copy_from_slice(&layout::sixteen_of_six(&small));
        out[108..].copy_from_slice(&bits);
    }

    fn keeps_searched(group: &Group) -> bool {
        group.keeps_searched
    }

    fn write(codes: &[u8], out: &mut [u8]) {
        superblock::Q3K::write(codes, out);
    }
}

/// Sixteen groups of 16, 6 bits.
pub(super) struct Q6K;

impl Searched<16> for Q6K {
    const BLOCK: Block = Block::Q6K;
    const WEIGHED: Option<Weighed> = Some(Weighed::Alone);
    type Coder = Group;

    #[inline(always)]
    fn search<R: Simd>(lanes: &Lanes<'_, 16>) -> Found<16> {
        centred::<R, 16>(lanes.rows, Some(lanes.weights), lanes.groups.len(), 32)
    }

    fn coders(groups: Groups<'_>, coders: &mut [Group], out: &mut [u8]) {
        superblock::Q6K::coders(groups, coders, out);
    }

    fn keeps_searched(group: &Group) -> bool {
        group.keeps_searched
    }

    fn write(codes: &[u8], out: &mut [u8]) {
        superblock::Q6K::write(codes, out);
    }
}

/// A group of a first type, whose codes are those that the search ended with, under a rounded scale.
#[derive(Clone, Copy, Default)]
pub(super) struct AsFound {
    by: f32,
    origin: f32,
    scale: f32,
    least: f32,
    low: f32,
    high: f32,
}

impl Coder for AsFound {
    #[inline(always)]
    fn code<S: Simd>(&self, values: S::F) -> Coded<S> {
        let exact = S::mul(S::splat(self.by), S::sub(values, S::splat(self.origin)));
        let near = S::min(S::max(exact, S::splat(self.low)), S::splat(self.high));
        let shift = S::splat(ROUNDING - self.low);
        let sum = S::add(near, shift);
        let decoded = S::add(S::mul(S::sub(sum, shift), S::splat(self.scale)), S::splat(self.least));
        Coded { codes: S::bits(sum), decoded, exact, near }
    }

    fn decode(&self, code: u8) -> f32 {
        (f32::from(code) + self.low) * self.scale + self.least
    }
}

/// Codes 0 to `MAX`, of which the middle, rounded up, is zero.
pub(super) struct Centred<const MAX: u8>;

pub(super) type Q4_0 = Centred<15>;
pub(super) type Q5_0 = Centred<31>;

impl<const MAX: u8> Searched<32> for Centred<MAX> {
    const BLOCK: Block = if MAX == 15 { Block::Q4_0 } else { Block::Q5_0 };
    const WEIGHED: Option<Weighed> = Some(Weighed::WithMeanOfChannel);
    type Coder = AsFound;

    #[inline(always)]
    fn search<R: Simd>(lanes: &Lanes<'_, 32>) -> Found<32> {
        centred::<R, 32>(lanes.rows, Some(lanes.weights), lanes.groups.len(), i32::from(MAX.div_ceil(2)))
    }

    fn coders(groups: Groups<'_>, coders: &mut [AsFound], out: &mut [u8]) {
        let (bits, scale) = stored(groups.scales[0]);
        out[..2].copy_from_slice(&bits);
        let middle = f32::from(MAX.div_ceil(2));
        coders[0] =
            AsFound { by: groups.by[0], origin: 0.0, scale, least: 0.0, low: -middle, high: f32::from(MAX) - middle };
    }

    fn keeps_searched(_: &AsFound) -> bool {
        true
    }

    fn write(codes: &[u8], out: &mut [u8]) {
        write_codes::<MAX>(codes, &mut out[2..]);
    }
}

/// Codes 0 to `MAX` above a number that is not above zero.
pub(super) struct Lifted<const MAX: u8>;

pub(super) type Q4_1 = Lifted<15>;
pub(super) type Q5_1 = Lifted<31>;

impl<const MAX: u8> Searched<32> for Lifted<MAX> {
    const BLOCK: Block = if MAX == 15 { Block::Q4_1 } else { Block::Q5_1 };
    const WEIGHED: Option<Weighed> = Some(Weighed::WithMeanOfChannel);
    type Coder = AsFound;

    #[inline(always)]
    fn search<R: Simd>(lanes: &Lanes<'_, 32>) -> Found<32> {
        affine::<R, 32>(lanes.rows, lanes.weights, lanes.groups.len(), finer(MAX))
    }

    fn coders(groups: Groups<'_>, coders: &mut [AsFound], out: &mut [u8]) {
        let ((bits, scale), (least_bits, least)) = (stored(groups.scales[0]), stored(-groups.minima[0]));
        out[..2].copy_from_slice(&bits);
        out[2..4].copy_from_slice(&least_bits);
        let (by, origin) = (groups.by[0], groups.origins[0]);
        coders[0] = AsFound { by, origin, scale, least, low: 0.0, high: f32::from(MAX) };
    }

    fn keeps_searched(_: &AsFound) -> bool {
        true
    }

    fn write(codes: &[u8], out: &mut [u8]) {
        write_codes::<MAX>(codes, &mut out[4..]);
    }
}

/// Codes of one block: nibbles, behind their fifth bits if there are any.
fn write_codes<const MAX: u8>(codes: &[u8], out: &mut [u8]) {
    let nibbles = if MAX == 31 {
        let (bits, nibbles) = out.split_at_mut(4);
        bits.copy_from_slice(&layout::fifth_bits(codes));
        nibbles
    } else {
        out
    };
    layout::nibbles::<32, 16>(codes, nibbles);
}
