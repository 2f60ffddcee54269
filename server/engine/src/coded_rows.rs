//! Batches of codes to units of decoding: the inverse of `rows`, for the columns that `quantize` answers.
//!
//! A row holds all that it needs but the scales of a span that began in an earlier row; those are remembered.

use std::{collections::VecDeque, fmt, ops::Range, sync::Arc};

use arrow_array::{
    Array, RecordBatch,
    cast::AsArray,
    types::{Float32Type, Int32Type, UInt32Type},
};
use arrow_buffer::Buffer;
use arrow_schema::Schema;
use quarrel_kernels::Dtype;
use quarrel_proto::{Reason, column::tensor};

use crate::{
    arrow_in::{ColumnError, binary_row},
    coded_columns::{CodedBatch, CodedColumns, extra_tensor, numbers},
    coded_head::Head,
    layer::{Global, LayerError, Limits, Rung, note},
    names::{Seen, check_rows, row_name},
    plan::DequantizePlan,
    rows::ROW_BYTES,
    shape::Shape,
};

/// Values of one unit, and so of one run of the answer.
const RUN_BYTES: usize = 15 << 17;

/// Codes to decode together: one batch of the answer.
#[derive(Debug)]
pub struct CodedUnit {
    pub(crate) pieces: Vec<CodedPiece>,
    /// Bytes of the rows in it.
    pub bytes_in: usize,
    /// Bytes that its values take.
    pub bytes_out: usize,
}

/// Consecutive channels of one row.
#[derive(Debug)]
pub(crate) struct CodedPiece {
    pub(crate) layer: Arc<CodedLayer>,
    pub(crate) elements: usize,
    pub(crate) content: Content,
    /// Whether it completes the layer.
    pub(crate) completes: bool,
    pub(crate) bytes_in: usize,
}

#[derive(Debug)]
pub(crate) enum Content {
    Codes {
        channels: Range<usize>,
        codes: Buffer,
        /// Of the spans from the first channel's on.
        scales: Vec<f32>,
        zero_points: Vec<i32>,
        /// What the scales are divided by; 1 where nothing.
        global: f32,
    },
    /// The weights of a kept row.
    Weights(Buffer),
}

#[derive(Debug)]
pub(crate) struct CodedLayer {
    pub(crate) name: String,
    pub(crate) shape: Shape,
    pub(crate) dtype: Dtype,
    /// `None` for a kept layer.
    pub(crate) rung: Option<Rung>,
}

/// The state of a stream's layers.
#[derive(Debug)]
pub struct CodedRows {
    plan: DequantizePlan,
    limits: Limits,
    columns: CodedColumns,
    seen: Seen,
    batch: Option<(CodedBatch, usize)>,
    open: Option<Open>,
    unit: CodedUnit,
    ready: VecDeque<CodedUnit>,
}

#[derive(Debug)]
struct Open {
    layer: Arc<CodedLayer>,
    /// Elements that have come.
    received: usize,
    /// Scales and zero points of the last span that began.
    span: (Vec<f32>, Vec<i32>),
    /// What its scales are divided by, once its first row has come.
    global: Option<f32>,
}

impl CodedRows {
    /// The state before the first batch.
    ///
    /// # Errors
    /// [`ColumnError`] for a schema that is not what `quantize` answers.
    pub fn new(plan: DequantizePlan, limits: Limits, schema: &Schema) -> Result<CodedRows, ColumnError> {
        Ok(CodedRows {
            plan,
            limits,
            columns: CodedColumns::of(schema)?,
            seen: Seen::default(),
            batch: None,
            open: None,
            unit: CodedUnit::empty(),
            ready: VecDeque::new(),
        })
    }

    /// Takes the next batch; [`CodedRows::next`] then goes through its rows.
    ///
    /// # Errors
    /// [`LayerError`] for a batch of too many rows or with broken columns.
    pub fn begin(&mut self, batch: &RecordBatch) -> Result<(), LayerError> {
        check_rows(batch.num_rows(), &self.limits)?;
        self.batch = Some((self.columns.read(batch)?, 0));
        Ok(())
    }

    /// The next unit, or `None` when the batch is used up.
    ///
    /// # Errors
    /// [`LayerError`], which ends the stream.
    #[allow(clippy::should_implement_trait, reason = "an iterator that fails and goes on is none")]
    pub fn next(&mut self) -> Result<Option<CodedUnit>, LayerError> {
        loop {
            if let Some(unit) = self.ready.pop_front() {
                return Ok(Some(unit));
            }
            let Some((rows, at)) = self.batch.take() else { return Ok(None) };
            if at == rows.rows {
                self.flush();
                continue;
            }
            let taken = self.row(&rows, at);
            if taken.is_err() {
                self.flush();
            }
            taken?;
            self.batch = Some((rows, at + 1));
        }
    }

    /// Bytes that stay from batch to batch: names seen.
    pub fn held_bytes(&self) -> usize {
        self.seen.bytes()
    }

    /// Units made of rows before the one that failed.
    pub fn remaining(&mut self) -> impl Iterator<Item = CodedUnit> {
        self.ready.drain(..)
    }

    /// The end of the stream.
    ///
    /// # Errors
    /// [`LayerError`] if a layer is not complete.
    pub fn end(&self) -> Result<(), LayerError> {
        match &self.open {
            None => Ok(()),
            Some(open) => {
                let what = format_args!(
                    "the stream ended after {} of {} elements",
                    open.received,
                    open.layer.shape.elements()
                );
                Err(LayerError(note(Reason::LayerIncomplete, &open.layer.name, what)))
            }
        }
    }

    fn row(&mut self, rows: &CodedBatch, at: usize) -> Result<(), LayerError> {
        let name = row_name(rows.names.get(at), at, &self.limits)?;
        let head = Head::read(rows, at, name)?;
        let mut open = match self.open.take() {
            Some(open) if open.layer.name == name => {
                head.check_same(&open.layer)?;
                open
            }
            Some(open) => {
                let what = format_args!("layer `{}` began before it was complete", crate::shorten(name, 200));
                return Err(LayerError(note(Reason::LayerInterrupted, &open.layer.name, what)));
            }
            None => {
                self.seen.add(name, &self.limits)?;
                Open { layer: head.layer(name)?, received: 0, span: (Vec::new(), Vec::new()), global: None }
            }
        };
        let row = match open.layer.rung.clone() {
            Some(rung) => coded_row(rows, at, &mut open, &rung)?,
            None => kept_row(rows, at, &open.layer)?,
        };
        let layer = Arc::clone(&open.layer);
        let total = layer.shape.elements();
        if row.elements > total - open.received {
            let what = format_args!(
                "{} elements came, expected {total} of shape {}",
                open.received + row.elements,
                layer.shape
            );
            return Err(LayerError(note(Reason::LayerTooLong, name, what)));
        }
        open.received += row.elements;
        let completes = open.received == total;
        self.cut(CodedPiece { completes, ..row });
        if !completes {
            self.open = Some(open);
        }
        Ok(())
    }

    /// Puts a row into units, cut to runs of whole channels of about [`RUN_BYTES`].
    fn cut(&mut self, piece: CodedPiece) {
        let width = self.plan.decoded.bytes();
        let (rung, channels, codes) = match (&piece.layer.rung, &piece.content) {
            (Some(rung), Content::Codes { channels, codes, .. }) => (rung, channels.clone(), codes.clone()),
            _ => return self.cut_weights(piece, width),
        };
        let (Content::Codes { scales, zero_points, global, .. }, layer) = (&piece.content, &piece.layer) else {
            return;
        };
        let per_run = (RUN_BYTES / (rung.columns * width)).max(1);
        let (groups, first_span) = (rung.groups(), rung.span_of(channels.start));
        let mut channel = channels.start;
        loop {
            let end = channels.end.min(channel + per_run);
            let from = (channel - channels.start) * rung.packed_bytes();
            let spans = if channel == end {
                0..0
            } else {
                rung.span_of(channel) - first_span..rung.span_of(end - 1) + 1 - first_span
            };
            let of = |spans: &Range<usize>| spans.start * groups..spans.end * groups;
            let content = Content::Codes {
                channels: channel..end,
                codes: codes.slice_with_length(from, (end - channel) * rung.packed_bytes()),
                scales: scales[of(&spans)].to_vec(),
                zero_points: if zero_points.is_empty() { Vec::new() } else { zero_points[of(&spans)].to_vec() },
                global: *global,
            };
            let last = end == channels.end;
            let elements = (end - channel) * rung.columns;
            let bytes_in = if last { piece.bytes_in } else { 0 };
            self.add(
                CodedPiece {
                    layer: Arc::clone(layer),
                    elements,
                    content,
                    completes: piece.completes && last,
                    bytes_in,
                },
                width,
            );
            if last {
                return;
            }
            channel = end;
        }
    }

    /// The same for a kept row's weights: runs of whole slices of the first dimension.
    fn cut_weights(&mut self, piece: CodedPiece, width: usize) {
        let Content::Weights(weights) = &piece.content else { return };
        let layer = &piece.layer;
        let slice = match layer.shape.dims() {
            [first, _, ..] => layer.shape.elements() / (*first).max(1) as usize,
            [] | [_] => 1,
        };
        let size = layer.dtype.bytes();
        let run = slice.max(1) * (RUN_BYTES / (slice.max(1) * width)).max(1);
        let mut start = 0;
        loop {
            let end = piece.elements.min(start + run);
            let last = end == piece.elements;
            let content = Content::Weights(weights.slice_with_length(start * size, (end - start) * size));
            let (completes, bytes_in) = (piece.completes && last, if last { piece.bytes_in } else { 0 });
            self.add(
                CodedPiece { layer: Arc::clone(layer), elements: end - start, content, completes, bytes_in },
                width,
            );
            if last {
                return;
            }
            start = end;
        }
    }

    fn add(&mut self, piece: CodedPiece, width: usize) {
        let bytes = piece.elements * width + ROW_BYTES + piece.layer.name.len();
        if self.unit.bytes_out > 0 && self.unit.bytes_out + bytes > RUN_BYTES {
            self.flush();
        }
        self.unit.bytes_in += piece.bytes_in;
        self.unit.bytes_out += bytes;
        self.unit.pieces.push(piece);
    }

    fn flush(&mut self) {
        if !self.unit.pieces.is_empty() {
            self.ready.push_back(std::mem::replace(&mut self.unit, CodedUnit::empty()));
        }
    }
}

impl CodedUnit {
    fn empty() -> CodedUnit {
        CodedUnit { pieces: Vec::new(), bytes_in: 0, bytes_out: 0 }
    }
}

/// A row of codes, checked against its scheme and shape.
fn coded_row(rows: &CodedBatch, at: usize, open: &mut Open, rung: &Rung) -> Result<CodedPiece, LayerError> {
    let layer = Arc::clone(&open.layer);
    let wrong = |what: fmt::Arguments<'_>| LayerError(note(Reason::RowInconsistent, &layer.name, what));
    if rows.data.is_null(at) {
        return Err(wrong(format_args!("`quantized_data` is null, expected codes")));
    }
    let codes = binary_row(&rows.data, at);
    let per_channel = rung.packed_bytes();
    if !codes.len().is_multiple_of(per_channel) {
        let what = format_args!("{} bytes of codes, expected a multiple of {per_channel}, one channel's", codes.len());
        return Err(wrong(what));
    }
    if let Some(sums) = rows.checksums.as_ref().filter(|sums| sums.is_valid(at)) {
        let (said, is) = (sums.as_primitive::<UInt32Type>().value(at), crc32c::crc32c(&codes));
        if said != is {
            let what = format_args!("checksum {said:#010x}, but the codes' crc32c is {is:#010x}");
            return Err(LayerError(note(Reason::ChecksumMismatch, &layer.name, what)));
        }
    }
    let start = open.received / rung.columns;
    let channels = start..start + codes.len() / per_channel;
    if channels.end > rung.channels {
        let what = format_args!("{} channels came, expected {} of shape {}", channels.end, rung.channels, layer.shape);
        return Err(LayerError(note(Reason::LayerTooLong, &layer.name, what)));
    }
    let expected = rung.spans_in(&channels) * rung.groups();
    let scales =
        numbers(&rows.scales, at, |values, range| values.as_primitive::<Float32Type>().values()[range].to_vec());
    let zero_points = rows.zero_points.as_ref().map_or_else(Vec::new, |lists| {
        numbers(lists, at, |values, range| values.as_primitive::<Int32Type>().values()[range].to_vec())
    });
    if scales.len() != expected {
        return Err(wrong(format_args!("{} scales, expected {expected}", scales.len())));
    }
    let expected = if rung.codes().symmetric() { 0 } else { expected };
    if zero_points.len() != expected {
        return Err(wrong(format_args!("{} zero points, expected {expected}", zero_points.len())));
    }
    if let Some(scale) = scales.iter().find(|scale| !scale.is_finite()) {
        return Err(wrong(format_args!("a scale is {scale}, expected a finite number")));
    }
    let (low, high) = rung.codes().limits();
    if let Some(zero_point) = zero_points.iter().find(|zero_point| !(low..=high).contains(&(**zero_point as f32))) {
        return Err(wrong(format_args!("a zero point is {zero_point}, expected {low} to {high}")));
    }
    let global = global_scale(rows, at, open, rung, &channels)?;
    if let Some(scale) = scales.iter().find(|scale| !(**scale / global).is_finite()) {
        return Err(wrong(format_args!(
            "a scale is {scale}, over a global scale of {global}: expected a finite quotient"
        )));
    }
    let (scales, zero_points) = with_open_span(open, rung, &channels, scales, zero_points);
    let bytes_in = codes.len() + 4 * (scales.len() + zero_points.len());
    let elements = channels.len() * rung.columns;
    Ok(CodedPiece {
        layer,
        elements,
        content: Content::Codes { channels, codes, scales, zero_points, global },
        completes: false,
        bytes_in,
    })
}

/// Puts the scales of a span that began in an earlier row before the row's own, and remembers the last span's.
fn with_open_span(
    open: &mut Open,
    rung: &Rung,
    channels: &Range<usize>,
    scales: Vec<f32>,
    zero_points: Vec<i32>,
) -> (Vec<f32>, Vec<i32>) {
    if !rung.shares() || channels.is_empty() {
        return (scales, zero_points);
    }
    let groups = rung.groups();
    let (mut all, mut all_zero_points) = match rung.span_start(channels.start) == channels.start {
        true => (Vec::new(), Vec::new()),
        false => std::mem::take(&mut open.span),
    };
    all.extend(scales);
    all_zero_points.extend(zero_points);
    let last = |len: usize| len.saturating_sub(groups);
    open.span = (all[last(all.len())..].to_vec(), all_zero_points[last(all_zero_points.len())..].to_vec());
    (all, all_zero_points)
}

/// What the scales of a row are divided by: it stands with the layer's first channel, and counts for all.
fn global_scale(
    rows: &CodedBatch,
    at: usize,
    open: &mut Open,
    rung: &Rung,
    channels: &Range<usize>,
) -> Result<f32, LayerError> {
    if rung.global == Global::None {
        return Ok(1.0);
    }
    if rung.holds_global(channels) {
        let wrong = |what: fmt::Arguments<'_>| LayerError(note(Reason::RowInconsistent, &open.layer.name, what));
        let name = tensor::WEIGHT_GLOBAL_SCALE;
        let data = rows.extra.as_ref().and_then(|extra| extra_tensor(extra, at, name));
        let data = data.ok_or_else(|| wrong(format_args!("`extra_tensors` has no `{name}`, expected one f32")))?;
        let bytes = <[u8; 4]>::try_from(data.as_slice())
            .map_err(|_| wrong(format_args!("`{name}` has {} bytes, expected one f32", data.len())))?;
        let global = f32::from_le_bytes(bytes);
        if !(global.is_finite() && global > 0.0) {
            return Err(wrong(format_args!("`{name}` is {global}, expected a finite number above 0")));
        }
        open.global = Some(global);
    }
    // Rows of no channels may come before the first.
    Ok(open.global.unwrap_or(1.0))
}

/// A kept row's weights, which stand in `extra_tensors` where they were asked for.
fn kept_row(rows: &CodedBatch, at: usize, layer: &Arc<CodedLayer>) -> Result<CodedPiece, LayerError> {
    let missing = || {
        let what =
            format_args!("it was kept and carries no weights: quantize with `return_kept`, or leave kept rows out");
        LayerError(note(Reason::KeptWithoutData, &layer.name, what))
    };
    let bytes = match layer.shape.elements() {
        0 => Buffer::from_vec(Vec::<u8>::new()),
        _ => rows.extra.as_ref().and_then(|extra| extra_tensor(extra, at, tensor::WEIGHT)).ok_or_else(missing)?,
    };
    if !bytes.len().is_multiple_of(layer.dtype.bytes()) {
        let what = format_args!("{} bytes are no whole number of {} elements", bytes.len(), layer.dtype.name());
        return Err(LayerError(note(Reason::BytesRagged, &layer.name, what)));
    }
    Ok(CodedPiece {
        layer: Arc::clone(layer),
        elements: bytes.len() / layer.dtype.bytes(),
        bytes_in: bytes.len(),
        content: Content::Weights(bytes),
        completes: false,
    })
}
