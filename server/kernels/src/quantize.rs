//! Codes from elements and their scales, and the error they make.

use crate::{
    Arith, Codes, Dtype, Level, Packing, Sums, TILE,
    element::{Value, loose, widen},
    fp8,
    half::{Round, ToBf16, ToF16, ToF32},
    level::multiversion,
    pack,
};

/// Consecutive elements of one output channel.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// The element type.
    pub dtype: Dtype,
    /// The elements, little-endian, at any alignment; a whole number of them.
    pub bytes: &'a [u8],
    /// The column of the first element: a multiple of [`TILE`].
    pub column: usize,
    /// Columns that share a scale: column `c` belongs to group `c / group`.
    pub group: usize,
}

/// Columns `first + start .. first + end` of a tile, which share a scale.
pub(crate) struct Piece {
    pub group: usize,
    pub start: usize,
    pub end: usize,
}

impl<'a> Part<'a> {
    /// Each tile's first column and bytes.
    #[inline(always)]
    pub(crate) fn tiles(&self) -> impl Iterator<Item = (usize, &'a [u8])> + use<'a> {
        debug_assert!(self.column.is_multiple_of(TILE));
        let column = self.column;
        self.bytes.chunks(TILE * self.dtype.bytes()).enumerate().map(move |(i, bytes)| (column + i * TILE, bytes))
    }
}

/// Cuts the `len` columns from `first` at the bounds of groups.
#[inline(always)]
pub(crate) fn pieces(first: usize, len: usize, group: usize) -> impl Iterator<Item = Piece> {
    let mut start = 0;
    std::iter::from_fn(move || {
        (start < len).then(|| {
            let column = first + start;
            let index = column / group;
            let end = len.min((index + 1) * group - first);
            let piece = Piece { group: index, start, end };
            start = end;
            piece
        })
    })
}

/// Writes the packed codes of a part into `out` and returns what the codes lose.
///
/// `scales` (and `zero_points`, empty if symmetric) are the channel's, one a group. `out` holds exactly
/// [`pack::packed_bytes`] bytes for the part's elements. With dense packing, a part that does not end its channel
/// must be a multiple of [`TILE`] long.
///
/// # Panics
/// If `scales`, `zero_points` or `out` are too short.
pub fn quantize(
    level: Level,
    codes: Codes,
    arith: Arith,
    part: &Part<'_>,
    scales: &[f32],
    zero_points: &[i32],
    out: &mut [u8],
) -> Sums {
    let grid = Grid { scales, zero_points };
    match (arith, part.dtype) {
        (Arith::WeightDtype, Dtype::Bf16) => bf16(level, codes, part, grid, out),
        (Arith::WeightDtype, Dtype::F16) => f16(level, codes, part, grid, out),
        _ => f32(level, codes, part, grid, out),
    }
}

/// A channel's scales and zero points.
#[derive(Clone, Copy)]
struct Grid<'a> {
    scales: &'a [f32],
    zero_points: &'a [i32],
}

multiversion! { fn f32(codes: Codes, part: &Part<'_>, grid: Grid<'_>, out: &mut [u8]) -> Sums = body::<ToF32>; }
multiversion! { fn bf16(codes: Codes, part: &Part<'_>, grid: Grid<'_>, out: &mut [u8]) -> Sums = body::<ToBf16>; }
multiversion! { fn f16(codes: Codes, part: &Part<'_>, grid: Grid<'_>, out: &mut [u8]) -> Sums = body::<ToF16>; }

#[inline(always)]
fn body<Step: Round>(codes: Codes, part: &Part<'_>, grid: Grid<'_>, out: &mut [u8]) -> Sums {
    match codes {
        Codes::Int { bits, packing, .. } => {
            let (low, high) = codes.limits();
            let offset = match packing {
                Packing::Dense => 1i32 << (bits - 1),
                Packing::Plain => 0,
            };
            tile_by_tile(part, grid, out, bits, |scale, zero_point| Int::<Step> {
                scale,
                zero_point: zero_point as f32,
                low,
                high,
                offset,
                step: std::marker::PhantomData,
            })
        }
        Codes::Fp8E4m3 => {
            tile_by_tile(part, grid, out, 8, |scale, _| Fp8::<Step> { scale, step: std::marker::PhantomData })
        }
    }
}

/// What one group does to an element.
trait Coder {
    /// The code as a byte, the value it stands for, and whether the element lay outside the codes' range.
    fn code(&self, value: f32) -> (u8, f32, bool);
}

struct Int<Step> {
    scale: f32,
    zero_point: f32,
    low: f32,
    high: f32,
    offset: i32,
    step: std::marker::PhantomData<Step>,
}

impl<Step: Round> Coder for Int<Step> {
    #[inline(always)]
    fn code(&self, value: f32) -> (u8, f32, bool) {
        let exact = Step::round(Step::round(value / self.scale) + self.zero_point);
        let inside = clamp(exact, self.low, self.high).round_ties_even();
        // SAFETY: `clamp` returned a number within the codes' limits, at most 128 in magnitude, whatever came in.
        let code: i32 = unsafe { inside.to_int_unchecked() };
        ((code + self.offset) as u8, (inside - self.zero_point) * self.scale, exact < self.low || exact > self.high)
    }
}

struct Fp8<Step> {
    scale: f32,
    step: std::marker::PhantomData<Step>,
}

impl<Step: Round> Coder for Fp8<Step> {
    #[inline(always)]
    fn code(&self, value: f32) -> (u8, f32, bool) {
        let exact = Step::round(value / self.scale);
        let code = fp8::e4m3_from_f32(clamp(exact, -fp8::E4M3_MAX, fp8::E4M3_MAX));
        (code, fp8::e4m3_to_f32(code) * self.scale, exact.abs() > fp8::E4M3_MAX)
    }
}

/// Two instructions, and a number within the limits even for NaN, which f32::clamp does not promise.
#[inline(always)]
fn clamp(value: f32, low: f32, high: f32) -> f32 {
    let value = if value > low { value } else { low };
    if value < high { value } else { high }
}

#[inline(always)]
fn tile_by_tile<C: Coder>(
    part: &Part<'_>,
    grid: Grid<'_>,
    out: &mut [u8],
    bits: u8,
    coder: impl Fn(f32, i32) -> C,
) -> Sums {
    let mut sums = Sums::default();
    let (mut tile, mut codes) = ([0f32; TILE], [0u8; TILE]);
    let tile_bytes = TILE / 8 * usize::from(bits);
    for ((first, bytes), out) in part.tiles().zip(out.chunks_mut(tile_bytes)) {
        let len = match part.dtype {
            // Read where they lie: a copy into the tile would cost as much as the division.
            Dtype::F32 => code_tile(first, loose(bytes), part.group, grid, &coder, &mut codes, &mut sums),
            dtype => {
                let values = widen(dtype, bytes, &mut tile);
                code_tile(first, values, part.group, grid, &coder, &mut codes, &mut sums)
            }
        };
        pack::pack(bits, &codes[..len], out);
    }
    sums
}

/// Codes of one tile, a byte each; returns how many.
#[inline(always)]
fn code_tile<V: Value, C: Coder>(
    first: usize,
    values: &[V],
    group: usize,
    grid: Grid<'_>,
    coder: &impl Fn(f32, i32) -> C,
    codes: &mut [u8; TILE],
    sums: &mut Sums,
) -> usize {
    let mut decoded = [0f32; TILE];
    for piece in pieces(first, values.len(), group) {
        let coder = coder(grid.scales[piece.group], grid.zero_points.get(piece.group).copied().unwrap_or(0));
        let values = &values[piece.start..piece.end];
        let (codes, decoded) = (&mut codes[piece.start..piece.end], &mut decoded[piece.start..piece.end]);
        let mut saturated = 0u32;
        for ((value, code), decoded) in values.iter().zip(codes).zip(decoded.iter_mut()) {
            let outside;
            (*code, *decoded, outside) = coder.code(value.get());
            saturated += u32::from(outside);
        }
        sums.add(values, decoded, saturated);
    }
    values.len()
}
