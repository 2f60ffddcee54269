//! What a kernel is given: a part of a channel, its grid, and how it is cut into tiles and pieces.

use crate::{Dtype, TILE};

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
    /// What will be read next, or nothing: it is asked for from memory while this part is computed.
    pub ahead: &'a [u8],
    /// How much its columns count.
    pub importance: Importance<'a>,
}

/// How much columns count in a search for scales. Only codes of [`Codes::Block`](crate::Codes::Block) take it, and of these those that
/// [`Block::takes_importance`](crate::Block::takes_importance) names.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Importance<'a> {
    /// A number for each element of the part, not below zero; nothing where all count alike.
    pub columns: &'a [f32],
    /// [`mean_square`](crate::mean_square) of the channel, of types that [weigh by it](crate::Block::weighs_by_channel).
    pub mean_square: f32,
}

impl Importance<'_> {
    /// All count alike.
    pub const NONE: Importance<'static> = Importance { columns: &[], mean_square: 0.0 };
}

/// A channel's scales and zero points.
#[derive(Debug, Clone, Copy)]
pub struct Grid<'a> {
    /// One a group, as they are stored.
    pub scales: &'a [f32],
    /// What codes are made under where the scales are not, with [`Scaling::Nested`](crate::Scaling::Nested): one a group; else empty.
    pub magnitudes: &'a [f32],
    /// One a group; empty if symmetric.
    pub zero_points: &'a [i32],
    /// What the scales are divided by: the layer's with [`Scaling::E4m3`](crate::Scaling::E4m3), else 1.
    pub global: f32,
}

/// Columns `start .. end` of a tile, which share a scale.
pub(crate) struct Piece {
    pub group: usize,
    pub start: usize,
    pub end: usize,
}

impl<'a> Part<'a> {
    /// Each tile's first column and bytes.
    #[inline(always)]
    pub(crate) fn tiles(&self) -> impl Iterator<Item = (usize, &'a [u8])> + use<'a> {
        assert!(self.column.is_multiple_of(TILE), "a part begins at column {}, within a tile", self.column);
        let column = self.column;
        self.bytes.chunks(TILE * self.dtype.bytes()).enumerate().map(move |(i, bytes)| (column + i * TILE, bytes))
    }
}

/// Cuts the `len` columns from `first` at the bounds of groups.
#[inline(always)]
pub(crate) fn pieces(first: usize, len: usize, group: usize) -> Pieces {
    // The end of the group counted from `first`; an end beyond `len` stands for those beyond.
    Pieces { index: first / group, start: 0, end: (group - first % group).min(len), len, width: group.min(len) }
}

/// See [`pieces`].
#[derive(Clone)]
pub(crate) struct Pieces {
    index: usize,
    start: usize,
    end: usize,
    len: usize,
    width: usize,
}

impl Iterator for Pieces {
    type Item = Piece;

    #[inline(always)]
    fn next(&mut self) -> Option<Piece> {
        if self.start >= self.len {
            return None;
        }
        let piece = Piece { group: self.index, start: self.start, end: self.end.min(self.len) };
        self.start = piece.end;
        self.index += 1;
        self.end = piece.end + self.width;
        Some(piece)
    }
}
