//! The range of each scale group, and whether its numbers are finite.

use crate::{
    Codes, Dtype, Level, Part, TILE,
    element::{LANES, LooseBf16, LooseF16, LooseF32, Value, in_registers, loose, widen},
    level::multiversion,
    part::pieces,
    simd::Simd,
};

/// The least and the greatest of a group's elements, with zero among them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    /// At most zero.
    pub min: f32,
    /// At least zero.
    pub max: f32,
    /// Whether no element is NaN or infinite. `min` and `max` mean nothing otherwise.
    pub finite: bool,
}

impl Default for Range {
    fn default() -> Self {
        Range { min: 0.0, max: 0.0, finite: true }
    }
}

impl Range {
    /// The range of two sets of elements together.
    #[inline(always)]
    #[must_use]
    pub fn with(self, other: Range) -> Range {
        Range {
            min: least(self.min, other.min),
            max: greatest(self.max, other.max),
            finite: self.finite && other.finite,
        }
    }

    /// The greatest magnitude.
    #[inline(always)]
    pub fn amax(self) -> f32 {
        greatest(self.max, -self.min)
    }
}

/// Widens `ranges` by the part's elements. `ranges[0]` is the group of the part's first column, and so on. For symmetric
/// codes both ends are the greatest magnitude, which is all that counts there.
///
/// # Panics
/// If a group that the part touches has no place in `ranges`.
pub fn ranges(level: Level, codes: Codes, part: &Part<'_>, ranges: &mut [Range]) {
    match codes.symmetric() {
        true => magnitudes(level, part, ranges),
        false => extents(level, part, ranges),
    }
}

multiversion! { fn magnitudes(part: &Part<'_>, ranges: &mut [Range]) = body<R, Magnitude>; }
multiversion! { fn extents(part: &Part<'_>, ranges: &mut [Range]) = body<R, Extent>; }

/// What is looked for in the elements of a piece.
trait Sought {
    /// Widens a range by values.
    fn widen<R: Simd, V: Value>(range: &mut Range, values: &[V]);
}

#[inline(always)]
fn body<R: Simd, S: Sought>(part: &Part<'_>, ranges: &mut [Range]) {
    // Columns counted from the start of the first group.
    let before = part.column - part.column % part.group;
    let mut wide = [0f32; TILE];
    for (first, bytes) in part.tiles().map(|(first, bytes)| (first - before, bytes)) {
        let bytes = in_registers(Level(R::KIND), part.dtype, bytes, &mut wide);
        match part.dtype {
            Dtype::Bf16 => tile_of::<R, S, LooseBf16>(first, loose(bytes), part.group, ranges),
            Dtype::F16 => tile_of::<R, S, LooseF16>(first, loose(bytes), part.group, ranges),
            Dtype::F32 | Dtype::F64 | Dtype::F8E4m3 | Dtype::F8E5m2 => {
                tile_of::<R, S, LooseF32>(first, loose(bytes), part.group, ranges);
            }
        }
    }
}

#[inline(always)]
fn tile_of<R: Simd, S: Sought, V: Value>(first: usize, values: &[V], group: usize, ranges: &mut [Range]) {
    for piece in pieces(first, values.len(), group) {
        S::widen::<R, V>(&mut ranges[piece.group], &values[piece.start..piece.end]);
    }
}

/// The greatest magnitude. Magnitudes are in the order of their bits, and those of infinity and NaN come last.
struct Magnitude;

impl Sought for Magnitude {
    #[inline(always)]
    fn widen<R: Simd, V: Value>(range: &mut Range, values: &[V]) {
        let found = V::greatest_magnitude::<R>(values);
        let most = greatest(found, range.max);
        *range = Range { min: -most, max: most, finite: range.finite & found.is_finite() };
    }
}

/// The least and the greatest.
struct Extent;

impl Sought for Extent {
    /// Least and greatest do not depend on the order.
    #[inline(always)]
    fn widen<R: Simd, V: Value>(range: &mut Range, values: &[V]) {
        let (sixteens, rest) = values.as_chunks::<LANES>();
        let zero = R::splat(0.0);
        let (mut lows, mut highs) = ([0f32; LANES], [0f32; LANES]);
        let mut most = R::splat_i(0);
        for from in (0..LANES).step_by(R::W) {
            let (mut low, mut high) = (zero, zero);
            for sixteen in sixteens {
                let values = V::lanes::<R>(sixteen, from);
                low = R::min(values, low);
                high = R::max(values, high);
                most = R::max_i(R::and(R::bits(values), R::splat_i(0x7fff_ffff)), most);
            }
            R::store(R::sub(zero, low), &mut lows, from);
            R::store(high, &mut highs, from);
        }
        let found = Range {
            min: 0.0 - R::greatest(&lows),
            max: R::greatest(&highs),
            finite: R::greatest_i(most) < 0x7f80_0000,
        };
        *range = range.with(found);
        for value in rest.iter().map(|value| value.get()) {
            *range = range.with(Range { min: value, max: value, finite: value.is_finite() });
        }
    }
}

// One instruction each, which f32::min and max, with their rule for NaN, are not. The second operand wins a tie.
#[inline(always)]
fn least(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

#[inline(always)]
pub(crate) fn greatest(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The index of the first element that is NaN or infinite, and what it reads as.
pub fn first_non_finite(dtype: Dtype, bytes: &[u8]) -> Option<(usize, f32)> {
    let mut tile = [0f32; TILE];
    bytes.chunks(TILE * dtype.bytes()).enumerate().find_map(|(index, chunk)| {
        let values = widen(dtype, chunk, &mut tile);
        let at = values.iter().position(|value| !value.is_finite())?;
        Some((index * TILE + at, values[at]))
    })
}
