//! Codes from elements and their scales, and the error they make.
//!
//! A tile of 256 columns at a time: codes as bytes, sums in lanes while the elements are in registers, then the bytes
//! packed. Lanes are sixteen whatever a register holds: narrower levels go over the tile once for each registerful, so
//! that as few sums are alive at once as there are registers for, and the sums are the same bits.

use std::{marker::PhantomData, ops::Range};

use crate::{
    Arith, Block, Codebook, Codes, Dtype, Format, Grid, Level, Packing, Part, Scaling, Sums, TILE, block,
    codebook::{Book, Fp4, Looked, Nf4, Rowwise},
    coder::{Asymmetric, Coder, Divided, Limits, Mini, Multiplied, Scaled, Symmetric},
    element::{LANES, Loose, LooseBf16, LooseF16, LooseF32, Value, in_registers, loose},
    half::{Round, ToBf16, ToF16, ToF32},
    level::{multiversion, prefetch},
    minifloat::{E2m1, E2m3, E4m3, Minifloat},
    pack,
    part::pieces,
    simd::Simd,
    sums::{Lanes, Registers, Tally},
};

/// Codes that are packed at a time. Those of one tile would have to be read before they have left for the cache.
const PACKED_AT_ONCE: usize = 8 * TILE;

/// Writes the packed codes of a part into `out` and returns what the codes lose.
///
/// `grid` is the channel's. `out` holds exactly [`pack::packed_bytes`] bytes for the part's elements. With dense packing, a
/// part that does not end its channel must be a multiple of [`TILE`] long.
///
/// # Panics
/// If the scales or the zero points are too short, or `out` is not as long as it says; if a part is no whole number of
/// blocks, where codes are blocks; if columns have an importance, and there is not one for each element, or the codes take none.
pub fn quantize(level: Level, format: Format, arith: Arith, part: &Part<'_>, grid: Grid<'_>, out: &mut [u8]) -> Sums {
    assert_room(format.codes, part, out);
    if let Some(block) = by_importance(format, part) {
        return block::quantize_by_importance(level, block, part, out);
    }
    match (format.scaling, arith, part.dtype) {
        (Scaling::Weights, Arith::WeightDtype, Dtype::Bf16) => bf16(level, format, part, grid, out),
        (Scaling::Weights, Arith::WeightDtype, Dtype::F16) => f16(level, format, part, grid, out),
        _ => f32(level, format, part, grid, out),
    }
}

/// Writes the codes that [`quantize`] writes and measures nothing, in f32.
///
/// # Panics
/// As [`quantize`].
pub fn encode(level: Level, format: Format, part: &Part<'_>, grid: Grid<'_>, out: &mut [u8]) {
    assert_room(format.codes, part, out);
    if let Some(block) = by_importance(format, part) {
        block::quantize_by_importance(level, block, part, out);
        return;
    }
    unmeasured(level, format, part, grid, out);
}

/// The type of block that is searched for by the importance of columns, where they have one.
fn by_importance(format: Format, part: &Part<'_>) -> Option<Block> {
    match format.codes {
        Codes::Block(block) if !part.importance.columns.is_empty() => Some(block),
        _ => None,
    }
}

/// The loops stop where either ends: then codes would be missing in silence.
fn assert_room(codes: Codes, part: &Part<'_>, out: &[u8]) {
    let elements = part.bytes.len() / part.dtype.bytes();
    assert_eq!(out.len(), pack::packed_bytes(codes, elements), "bytes for the codes");
    assert_whole(codes, elements);
    let importance = part.importance.columns.len();
    if importance > 0 {
        let takes = matches!(codes, Codes::Block(block) if block.takes_importance());
        assert!(takes && importance == elements, "{importance} columns have an importance, of {elements} as {codes:?}");
    }
}

/// Blocks are not padded.
pub(crate) fn assert_whole(codes: Codes, elements: usize) {
    if let Codes::Block(block) = codes {
        assert!(elements.is_multiple_of(block.elements()), "{elements} elements in blocks of {}", block.elements());
    }
}

multiversion! { fn f32(format: Format, part: &Part<'_>, grid: Grid<'_>, out: &mut [u8]) -> Sums = body<R, Tally>; }
multiversion! { fn bf16(format: Format, part: &Part<'_>, grid: Grid<'_>, out: &mut [u8]) -> Sums = narrow<R, ToBf16>; }
multiversion! { fn f16(format: Format, part: &Part<'_>, grid: Grid<'_>, out: &mut [u8]) -> Sums = narrow<R, ToF16>; }
multiversion! { fn unmeasured(format: Format, part: &Part<'_>, grid: Grid<'_>, out: &mut [u8]) -> () = body<R, Nothing>; }

/// What is made of the lanes of tiles: sums, or nothing, and then the compiler leaves out what only they need.
pub(crate) trait Measure: Default {
    /// Whether anything is made of them.
    const SUMS: bool;
    type Made;

    fn add<S: Simd, V: Value>(&mut self, values: &[V], lanes: &Lanes, decode: impl Fn(usize) -> f32);
    fn made<S: Simd>(self) -> Self::Made;
}

impl Measure for Tally {
    const SUMS: bool = true;
    type Made = Sums;

    #[inline(always)]
    fn add<S: Simd, V: Value>(&mut self, values: &[V], lanes: &Lanes, decode: impl Fn(usize) -> f32) {
        Tally::add::<S, V>(self, values, lanes, decode);
    }

    #[inline(always)]
    fn made<S: Simd>(self) -> Sums {
        self.sums::<S>()
    }
}

#[derive(Default)]
struct Nothing;

impl Measure for Nothing {
    const SUMS: bool = false;
    type Made = ();

    #[inline(always)]
    fn add<S: Simd, V: Value>(&mut self, _: &[V], _: &Lanes, _: impl Fn(usize) -> f32) {}

    #[inline(always)]
    fn made<S: Simd>(self) {}
}

#[inline(always)]
fn body<R: Simd, M: Measure>(format: Format, part: &Part<'_>, grid: Grid<'_>, out: &mut [u8]) -> M::Made {
    match (format.codes, format.scaling) {
        (Codes::Rowwise, _) => tiles::<R, M, ToF32, _>(part, out, 8, |group| Rowwise::new(grid.scales[group])),
        (Codes::Codebook(Codebook::Nf4), _) => looked::<R, M, Nf4>(part, grid, out),
        (Codes::Codebook(Codebook::Fp4), _) => looked::<R, M, Fp4>(part, grid, out),
        (Codes::Int { bits, packing, symmetric }, _) => {
            integers::<R, M, ToF32>(bits, packing, symmetric, part, grid, out)
        }
        (Codes::Block(block), _) => block::quantize::<R, M>(block, part, out),
        (Codes::Fp8E4m3, Scaling::Weights) => mini::<R, M, E4m3, ToF32, Divided>(part, grid, out),
        (Codes::Fp8E4m3, Scaling::E8m0(_)) => mini::<R, M, E4m3, ToF32, Multiplied>(part, grid, out),
        (Codes::Fp6E2m3, Scaling::E8m0(_)) => mini::<R, M, E2m3, ToF32, Multiplied>(part, grid, out),
        (Codes::Fp4E2m1, Scaling::E8m0(_)) => mini::<R, M, E2m1, ToF32, Multiplied>(part, grid, out),
        (Codes::Fp4E2m1, Scaling::E4m3) => mini::<R, M, E2m1, ToF32, Divided>(part, grid, out),
        (Codes::Fp6E2m3 | Codes::Fp4E2m1, Scaling::Weights)
        | (Codes::Fp8E4m3 | Codes::Fp6E2m3, Scaling::E4m3)
        | (Codes::Fp8E4m3 | Codes::Fp6E2m3 | Codes::Fp4E2m1, Scaling::Absmax | Scaling::Nested | Scaling::InBlocks) => {
            panic!("no format has {:?} under {:?}", format.codes, format.scaling)
        }
    }
}

/// Rounding every intermediate to the weights' own type. Where scales are powers of two that changes nothing, and a global
/// scale is an f32, so that compressed-tensors too computes in f32 then.
#[inline(always)]
fn narrow<R: Simd, Step: Round>(format: Format, part: &Part<'_>, grid: Grid<'_>, out: &mut [u8]) -> Sums {
    match format.codes {
        Codes::Int { bits, packing, symmetric } => {
            integers::<R, Tally, Step>(bits, packing, symmetric, part, grid, out)
        }
        Codes::Fp8E4m3 => mini::<R, Tally, E4m3, Step, Divided>(part, grid, out),
        Codes::Fp6E2m3 | Codes::Fp4E2m1 | Codes::Codebook(_) | Codes::Rowwise | Codes::Block(_) => {
            panic!("no format has {:?} under {:?}", format.codes, format.scaling)
        }
    }
}

#[inline(always)]
fn integers<R: Simd, M: Measure, Step: Round>(
    bits: u8,
    packing: Packing,
    symmetric: bool,
    part: &Part<'_>,
    grid: Grid<'_>,
    out: &mut [u8],
) -> M::Made {
    let limits = Limits::of(bits, packing);
    match symmetric {
        true => tiles::<R, M, Step, _>(part, out, bits, |group| Symmetric::<Step>::new(grid.scales[group], limits)),
        false => tiles::<R, M, Step, _>(part, out, bits, |group| {
            Asymmetric::<Step>::new(grid.scales[group], grid.zero_points[group], limits)
        }),
    }
}

#[inline(always)]
fn mini<R: Simd, M: Measure, F: Minifloat, Step: Round, D: Scaled>(
    part: &Part<'_>,
    grid: Grid<'_>,
    out: &mut [u8],
) -> M::Made {
    let coder = |group: usize| {
        let scale = grid.scales[group] / grid.global;
        Mini::<F, Step, D> { scale, by: D::by(scale), parameters: PhantomData }
    };
    tiles::<R, M, Step, _>(part, out, F::BITS as u8, coder)
}

#[inline(always)]
fn looked<R: Simd, M: Measure, B: Book>(part: &Part<'_>, grid: Grid<'_>, out: &mut [u8]) -> M::Made {
    let magnitudes = if grid.magnitudes.is_empty() { grid.scales } else { grid.magnitudes };
    tiles::<R, M, ToF32, _>(part, out, 4, |group| Looked::<B>::new(magnitudes[group], grid.scales[group]))
}

/// Codes a part. `Step` tells which element types there are.
#[inline(always)]
fn tiles<R: Simd, M: Measure, Step: Round, C: Coder>(
    part: &Part<'_>,
    out: &mut [u8],
    bits: u8,
    coder: impl Fn(usize) -> C,
) -> M::Made {
    match part.dtype {
        Dtype::Bf16 if Step::READS_BF16 => tiles_of::<R, M, LooseBf16, C>(part, out, bits, coder),
        Dtype::F16 if Step::READS_F16 => tiles_of::<R, M, LooseF16, C>(part, out, bits, coder),
        _ if Step::IS_F32 => tiles_of::<R, M, LooseF32, C>(part, out, bits, coder),
        dtype => unreachable!("{} is not rounded to a narrower type", dtype.name()),
    }
}

#[inline(always)]
fn tiles_of<R: Simd, M: Measure, V: Loose, C: Coder>(
    part: &Part<'_>,
    out: &mut [u8],
    bits: u8,
    coder: impl Fn(usize) -> C,
) -> M::Made {
    let mut made = M::default();
    let (mut wide, mut bytes) = ([0f32; TILE], [0u8; PACKED_AT_ONCE]);
    let (tile_bytes, block_bytes) = (TILE * part.dtype.bytes(), PACKED_AT_ONCE / 8 * usize::from(bits));
    let mut tiles = part.tiles();
    let mut ahead = part.ahead.chunks(tile_bytes);
    let blocks = part.bytes.chunks(PACKED_AT_ONCE * part.dtype.bytes());
    for (block, out) in blocks.zip(out.chunks_mut(block_bytes)) {
        let len = block.len() / part.dtype.bytes();
        // Codes of eight bits lie in the output as they lie here.
        let is_packed = bits == 8 && out.len() == len;
        let codes = if is_packed { &mut *out } else { &mut bytes[..len] };
        for codes in codes.chunks_mut(TILE) {
            let Some((first, tile)) = tiles.next() else { break };
            prefetch(ahead.next().unwrap_or_default());
            let values = loose::<V>(in_registers(Level(R::KIND), part.dtype, tile, &mut wide));
            let lanes = code_tile::<R, M, V, C>(first, values, part.group, &coder, codes);
            made.add::<R, V>(values, &lanes, |column| coder((first + column) / part.group).decode(codes[column]));
        }
        if !is_packed {
            pack::pack(Level(R::KIND), bits, &bytes[..len], out);
            if let Some(fill) = C::HIGH_FIRST {
                pack::halves_turned(out, len % 2 == 1, fill);
            }
        }
    }
    made.made::<R>()
}

/// Codes of one tile, a byte each, and its sums.
///
/// Lane `i % 16` takes column `i`; where a piece fills no whole sixteen, zeros stand for the others, which are coded as zero
/// and add nothing.
#[inline(always)]
fn code_tile<R: Simd, M: Measure, V: Loose, C: Coder>(
    first: usize,
    values: &[V],
    group: usize,
    coder: &impl Fn(usize) -> C,
    codes: &mut [u8],
) -> Lanes {
    let mut lanes = Lanes::new();
    let pieces = pieces(first, values.len(), group);
    for from in (0..LANES).step_by(R::W) {
        let mut sums = Registers::<R>::new();
        for piece in pieces.clone() {
            let coder = coder(piece.group);
            // Columns before the first whole sixteen, those of whole ones, and those behind.
            let start = piece.start.next_multiple_of(LANES).min(piece.end);
            let end = start + (piece.end - start) / LANES * LANES;
            if start > piece.start {
                code_few::<R, M, V, C>(&coder, piece.start..start, values, from, codes, &mut sums);
            }
            let (sixteens, _) = values[start..end].as_chunks::<LANES>();
            let (code_sixteens, _) = codes[start..end].as_chunks_mut::<LANES>();
            for (x, codes) in sixteens.iter().zip(code_sixteens) {
                code_sixteen::<R, M, V, C>(&coder, x, from, codes, &mut sums);
            }
            if end < piece.end {
                code_few::<R, M, V, C>(&coder, end..piece.end, values, from, codes, &mut sums);
            }
        }
        lanes.put(from, sums);
    }
    lanes
}

/// The same of whole groups of so many columns, each a multiple of sixteen, whose coders are there.
#[inline(always)]
pub(crate) fn code_groups<R: Simd, M: Measure, V: Loose, C: Coder>(
    values: &[V],
    coders: &[C],
    group: usize,
    codes: &mut [u8],
) -> Lanes {
    let mut lanes = Lanes::new();
    for from in (0..LANES).step_by(R::W) {
        let mut sums = Registers::<R>::new();
        for (index, coder) in coders.iter().enumerate() {
            // By index: `zip` was a call for each group.
            let columns = index * group..(index + 1) * group;
            let (values, codes) = (&values[columns.clone()], &mut codes[columns]);
            let (values, codes) = (values.as_chunks::<LANES>().0, codes.as_chunks_mut::<LANES>().0);
            for i in 0..values.len() {
                code_sixteen::<R, M, V, C>(coder, &values[i], from, &mut codes[i], &mut sums);
            }
        }
        lanes.put(from, sums);
    }
    lanes
}

/// Codes a registerful of the columns of one sixteen that a piece fills in part.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "one loop's body, in one place for its two ends")]
fn code_few<R: Simd, M: Measure, V: Loose, C: Coder>(
    coder: &C,
    columns: Range<usize>,
    values: &[V],
    from: usize,
    codes: &mut [u8],
    sums: &mut Registers<R>,
) {
    let lane = columns.start % LANES;
    let held = from.max(lane)..(from + R::W).min(lane + columns.len());
    if held.is_empty() {
        return;
    }
    let (mut x, mut few_codes) = ([V::ZERO; LANES], [0; LANES]);
    x[lane..lane + columns.len()].copy_from_slice(&values[columns.clone()]);
    code_sixteen::<R, M, V, C>(coder, &x, from, &mut few_codes, sums);
    let at = columns.start - lane + held.start..columns.start - lane + held.end;
    codes[at].copy_from_slice(&few_codes[held]);
}

/// Codes a registerful of sixteen elements.
#[inline(always)]
fn code_sixteen<R: Simd, M: Measure, V: Loose, C: Coder>(
    coder: &C,
    x: &[V; LANES],
    from: usize,
    codes: &mut [u8; LANES],
    sums: &mut Registers<R>,
) {
    let x = V::lanes::<R>(x, from);
    let coded = coder.code::<R>(x);
    R::store_bytes(coded.codes, codes, from);
    if M::SUMS {
        sums.add(x, &coded);
    }
}
