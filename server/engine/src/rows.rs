//! Batches of weights to units of work: the state of each layer, row by row. Sequential and cheap; no element is read.
//!
//! Consecutive rows with one name are runs of one layer. A row is answered when every span that it touches is
//! complete, so rows wait here only for schemes whose spans are larger than a channel, or for ladders.

use std::{collections::VecDeque, fmt, ops::Range, sync::Arc};

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_schema::Schema;
use quarrel_kernels::Dtype;
use quarrel_proto::Reason;

use crate::{
    arrow_in::{ColumnError, NoWeights, WeightColumns, WeightRows},
    importance::{self, Importance, Said},
    layer::{Decision, LayerError, Limits, note},
    names::{Seen, check_rows, row_name},
    plan::{OnError, QuantizePlan},
    shape::Shape,
};

/// Results of one unit: under 2 MiB, so that a response message stays well below the 4 MiB that stock clients take.
pub(crate) const ANSWER_BYTES: usize = 15 << 17;
/// Weights of one unit, so that a batch of many megabytes is computed while its first rows are on their way back.
const UNIT_BYTES: usize = 4 << 20;
/// Rows between two pauses.
pub(crate) const ROWS_PER_REST: usize = 64;
/// What a row costs in memory beside its data and its name: columns, metrics, offsets.
pub(crate) const ROW_BYTES: usize = 512;

/// What the pipeline has to provide before rows go on.
#[derive(Debug)]
pub(crate) enum Need {
    /// Room for a span that stays open, in bytes. Its unit, when it comes, draws on it.
    Span(usize),
    /// A unit to be computed.
    Unit(Unit),
    /// Nothing yet: a pause after [`ROWS_PER_REST`] rows, since matching names against patterns can take its time.
    Rest,
}

/// Rows to answer together, and what has to be computed for them.
#[derive(Debug)]
pub struct Unit {
    pub(crate) rows: Vec<Row>,
    pub(crate) works: Vec<Work>,
    /// Bytes of weights in it.
    pub bytes_in: usize,
    /// Bytes that its results take, at most.
    pub bytes_out: usize,
    /// Whether it closes a span for which room was asked.
    pub closes_span: bool,
}

/// A layer as its first row showed it.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Shape,
    /// Whether the caller said the shape; a row without is one whole channel.
    said: bool,
    pub(crate) decision: Decision,
    /// How much its columns count, if a row says so and the decision takes it.
    pub(crate) importance: Option<Importance>,
}

/// One input row, which will be one output row.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) layer: Arc<Layer>,
    /// The row's place in the layer, in channels of its scheme (in slices of the first dimension, if it has none).
    pub(crate) channels: Range<usize>,
    pub(crate) bytes: usize,
    /// Whether it completes the layer.
    pub(crate) completes: bool,
    /// Its weights, where the answer carries them.
    pub(crate) kept: Option<Buffer>,
}

/// Consecutive channels of one layer, whole spans, to be computed.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) layer: Arc<Layer>,
    pub(crate) channels: Range<usize>,
    pub(crate) pieces: Vec<Piece>,
}

/// Consecutive channels that lie together in memory.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) data: Buffer,
    pub(crate) channels: usize,
}

/// The state of a stream's layers.
pub struct Rows {
    plan: Arc<QuantizePlan>,
    limits: Limits,
    columns: WeightColumns,
    seen: Seen,
    batch: Option<(WeightRows, usize)>,
    open: Option<Open>,
    unit: Unit,
    /// Units that are ready but not yet asked for.
    ready: VecDeque<Unit>,
    /// Room that an open span needs and that was not yet asked for.
    room: Option<usize>,
}

/// A layer that is not complete, and those of its rows that wait for a span.
struct Open {
    layer: Arc<Layer>,
    /// Elements of one channel of its scheme, or of one slice of the first dimension.
    columns: usize,
    received: usize,
    /// Channels handed on to be computed.
    computed: usize,
    pieces: Vec<Piece>,
    rows: Vec<Row>,
    reserved: bool,
    /// Bytes of weights that the answer carries if a ladder keeps the layer.
    kept_bytes: usize,
}

impl fmt::Debug for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rows").field("open", &self.open.is_some()).finish_non_exhaustive()
    }
}

impl Rows {
    /// The state before the first batch.
    ///
    /// # Errors
    /// [`ColumnError`] for a schema that the contract does not allow.
    pub fn new(plan: Arc<QuantizePlan>, limits: Limits, schema: &Schema) -> Result<Rows, ColumnError> {
        let columns = WeightColumns::of(schema)?;
        Ok(Rows {
            plan,
            limits,
            columns,
            seen: Seen::default(),
            batch: None,
            open: None,
            unit: Unit::empty(),
            ready: VecDeque::new(),
            room: None,
        })
    }

    /// Takes the next batch; [`Rows::next`] then goes through its rows.
    ///
    /// # Errors
    /// [`LayerError`] for a batch of too many rows or with broken columns.
    pub fn begin(&mut self, batch: &RecordBatch) -> Result<(), LayerError> {
        check_rows(batch.num_rows(), &self.limits)?;
        self.batch = Some((self.columns.read(batch)?, 0));
        Ok(())
    }

    /// What is needed next, or `None` when the batch is used up.
    ///
    /// # Errors
    /// [`LayerError`], which ends the stream; what was handed on before stays valid.
    #[allow(clippy::should_implement_trait, reason = "an iterator that fails and goes on is none")]
    pub fn next(&mut self) -> Result<Option<Need>, LayerError> {
        loop {
            // Units before room: what is ready is answered while a span waits.
            if let Some(unit) = self.ready.pop_front() {
                return Ok(Some(Need::Unit(unit)));
            }
            if let Some(bytes) = self.room.take() {
                return Ok(Some(Need::Span(bytes)));
            }
            let Some((rows, at)) = self.batch.take() else { return Ok(None) };
            if at == rows.rows {
                self.flush();
                continue;
            }
            let room = self.row(&rows, at);
            if !matches!(room, Ok(None)) {
                self.flush();
            }
            self.room = room?;
            self.batch = Some((rows, at + 1));
            if (at + 1).is_multiple_of(ROWS_PER_REST) {
                return Ok(Some(Need::Rest));
            }
        }
    }

    /// Bytes that stay from batch to batch beside spans: names seen, and rows that wait.
    pub fn held_bytes(&self) -> usize {
        let open = self.open.as_ref().map_or(0, |open| open.rows.len() * ROW_BYTES + open.layer.importance_bytes());
        self.seen.bytes() + open
    }

    /// Units made of rows before the one that failed: they are answered before the error is.
    pub fn remaining(&mut self) -> impl Iterator<Item = Unit> {
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
                    open.received * open.columns,
                    open.layer.shape.elements()
                );
                Err(LayerError(note(Reason::LayerIncomplete, &open.layer.name, what)))
            }
        }
    }

    /// Takes one row; returns the room that it needs because a span stays open.
    fn row(&mut self, rows: &WeightRows, at: usize) -> Result<Option<usize>, LayerError> {
        let name = row_name(rows.names.get(at), at, &self.limits)?;
        let fail = |reason, what: fmt::Arguments<'_>| LayerError(note(reason, name, what));
        let data = rows.weights.bytes(at).map_err(|none| match none {
            NoWeights::Row => fail(Reason::WeightsNull, format_args!("`weights` is null, expected elements")),
            NoWeights::Element(index) => {
                fail(Reason::ElementNull, format_args!("element {index} of row {at} is null, expected a number"))
            }
        })?;
        let said = match rows.shapes.as_ref().and_then(|shapes| shapes.dims(at)) {
            Some(dims) => {
                let shape = dims.and_then(Shape::new);
                Some(shape.map_err(|what| fail(Reason::ShapeInvalid, format_args!("shape: {what}")))?)
            }
            None => rows.tensor_shape.clone(),
        };
        let dtype = self.dtype(rows, at, name)?;
        if !data.len().is_multiple_of(dtype.bytes()) {
            let what = format_args!("{} bytes are no whole number of {} elements", data.len(), dtype.name());
            return Err(fail(Reason::BytesRagged, what));
        }
        let elements = data.len() / dtype.bytes();
        let importance = importance::said(rows, at, name);
        let mut open = match self.open.take() {
            Some(open) if open.layer.name == name => {
                open.check_same(said.as_ref(), dtype, importance)?;
                open
            }
            Some(open) => {
                let what = format_args!(
                    "layer `{}` began after {} of {} elements",
                    crate::shorten(name, 200),
                    open.received * open.columns,
                    open.layer.shape.elements()
                );
                return Err(LayerError(note(Reason::LayerInterrupted, &open.layer.name, what)));
            }
            None => self.begin_layer(name, said, elements, dtype, importance)?,
        };
        let row = open.place(elements, data.len())?;
        self.take(&mut open, row, data)?;
        let room = self.room(&mut open)?;
        if open.received * open.columns < open.layer.shape.elements() {
            self.open = Some(open);
        }
        Ok(room)
    }

    fn dtype(&self, rows: &WeightRows, at: usize, name: &str) -> Result<Dtype, LayerError> {
        let fail = |what: fmt::Arguments<'_>| LayerError(note(Reason::DtypeInvalid, name, what));
        let word = rows.dtypes.as_ref().and_then(|dtypes| dtypes.get(at));
        let own = rows.weights.dtype();
        match (own, word) {
            (Some(dtype), None) => Ok(dtype),
            (Some(dtype), Some(word)) if dtype.name() == word => Ok(dtype),
            (Some(dtype), Some(word)) => {
                Err(fail(format_args!("`dtype` says `{}`, its weights are {}", crate::shorten(word, 50), dtype.name())))
            }
            (None, Some(word)) => Dtype::named(word).ok_or_else(|| {
                let word = crate::shorten(word, 50);
                fail(format_args!("unknown dtype `{word}`: expected f32, f16, bf16, f64, f8_e4m3 or f8_e5m2"))
            }),
            (None, None) => Err(fail(format_args!("`dtype` is null: binary weights need it"))),
        }
    }

    fn begin_layer(
        &mut self,
        name: &str,
        said: Option<Shape>,
        elements: usize,
        dtype: Dtype,
        importance: Said<'_>,
    ) -> Result<Open, LayerError> {
        self.seen.add(name, &self.limits)?;
        let decision = self.plan.decide(name, said.as_ref(), elements, dtype);
        let was_said = said.is_some();
        let shape = said.unwrap_or_else(|| Shape::flat(elements));
        let (decision, importance) = Importance::beside(decision, importance, name, &shape);
        if let (Decision::Fail(note), OnError::Fail) = (&decision, self.plan.on_error) {
            return Err(LayerError(note.clone()));
        }
        let columns = match &decision {
            Decision::Quantize(rung) => rung.columns,
            Decision::Ladder(rungs, _) => rungs[0].columns,
            Decision::Keep(_) | Decision::Fail(_) => match shape.dims() {
                [] | [_] => 1,
                [first, ..] => shape.elements() / (*first).max(1) as usize,
            },
        };
        let channel_bytes = columns * dtype.bytes();
        if channel_bytes > self.limits.message_bytes_max {
            let what = format_args!(
                "one output channel of shape {shape} takes {channel_bytes} bytes, more than `message_bytes_max` {}: \
                 send the layer as [n, columns]",
                self.limits.message_bytes_max
            );
            return Err(LayerError(note(Reason::ChannelTooLarge, name, what)));
        }
        let layer = Arc::new(Layer { name: name.to_owned(), dtype, shape, said: was_said, decision, importance });
        Ok(Open {
            layer,
            columns,
            received: 0,
            computed: 0,
            pieces: Vec::new(),
            rows: Vec::new(),
            reserved: false,
            kept_bytes: 0,
        })
    }

    /// Puts a row, and what it completes, into the current unit; or lets it wait.
    fn take(&mut self, open: &mut Open, mut row: Row, data: Buffer) -> Result<(), LayerError> {
        let layer = Arc::clone(&open.layer);
        let channels = row.channels.len();
        match &layer.decision {
            Decision::Keep(_) | Decision::Fail(_) => {
                if self.plan.return_kept && matches!(layer.decision, Decision::Keep(_)) {
                    self.unit.bytes_out += data.len();
                    row.kept = Some(compact(data));
                }
                self.unit.add_row(row);
            }
            Decision::Quantize(rung) if !rung.buffers() => {
                open.computed = row.channels.end;
                self.unit.add_work(&layer, row.channels.clone(), vec![Piece { data, channels }]);
                self.unit.add_row(row);
            }
            Decision::Quantize(rung) => {
                let complete = rung.complete(open.received);
                open.hold(row, data);
                if complete > open.computed {
                    let pieces = open.pieces_until(complete);
                    self.unit.add_work(&layer, open.computed..complete, pieces);
                    open.computed = complete;
                    self.unit.closes_span |= std::mem::take(&mut open.reserved);
                }
                let answerable = open.rows.iter().take_while(|row| row.channels.end <= open.computed).count();
                for row in open.rows.drain(..answerable) {
                    self.unit.add_row(row);
                }
            }
            Decision::Ladder(rungs, _) => {
                let end = rungs[0].channels;
                let completes = row.completes;
                if self.plan.return_kept {
                    row.kept = Some(compact(data.clone()));
                    open.kept_bytes += data.len();
                }
                open.hold(row, data);
                if completes {
                    // A unit of its own: how large its results are is not known before it is computed.
                    self.flush();
                    let pieces = open.pieces_until(end);
                    self.unit.add_work(&layer, 0..end, pieces);
                    self.unit.bytes_out += open.kept_bytes;
                    open.computed = end;
                    self.unit.closes_span |= std::mem::take(&mut open.reserved);
                    for row in open.rows.drain(..) {
                        self.unit.add_row(row);
                    }
                    self.flush();
                }
            }
        }
        if self.unit.bytes_out >= ANSWER_BYTES || self.unit.bytes_in >= UNIT_BYTES {
            self.flush();
        }
        Ok(())
    }

    /// The room that a span needs which stays open after its first row.
    fn room(&self, open: &mut Open) -> Result<Option<usize>, LayerError> {
        if open.pieces.is_empty() || open.reserved {
            return Ok(None);
        }
        let layer = &open.layer;
        let (channels, what) = match &layer.decision {
            Decision::Quantize(rung) => (rung.together_end(open.computed) - open.computed, rung.scheme.to_string()),
            Decision::Ladder(rungs, _) => (rungs[0].channels, "a ladder".to_owned()),
            Decision::Keep(_) | Decision::Fail(_) => return Ok(None),
        };
        let bytes = channels * open.columns * layer.dtype.bytes() + layer.decision.answer_bytes(channels) + ROW_BYTES;
        if bytes > self.limits.span_bytes_max {
            let what = format_args!(
                "{what} needs {bytes} bytes at once for {channels} channels of shape {}, more than {}: \
                 raise `layer_bytes_max` (and `memory_bytes_max` to twice that), or choose a scheme per channel or group, \
                 without `double_quant`",
                layer.shape, self.limits.span_bytes_max
            );
            return Err(LayerError(note(Reason::SpanTooLarge, &layer.name, what)));
        }
        open.reserved = true;
        Ok(Some(bytes))
    }

    fn flush(&mut self) {
        if !self.unit.rows.is_empty() || !self.unit.works.is_empty() {
            self.ready.push_back(std::mem::replace(&mut self.unit, Unit::empty()));
        }
    }
}

impl Open {
    fn check_same(&self, said: Option<&Shape>, dtype: Dtype, importance: Said<'_>) -> Result<(), LayerError> {
        let layer = &self.layer;
        Importance::check_same(layer.importance.as_ref(), importance, &layer.name, &layer.decision)
            .map_err(LayerError)?;
        if dtype != layer.dtype {
            let what = format_args!("a run of {} follows runs of {}", dtype.name(), layer.dtype.name());
            return Err(LayerError(note(Reason::DtypeChanged, &layer.name, what)));
        }
        match said {
            Some(shape) if layer.said && *shape == layer.shape => Ok(()),
            Some(shape) => {
                let what = format_args!("a run of shape {shape} follows runs of shape {}", layer.shape);
                Err(LayerError(note(Reason::ShapeChanged, &layer.name, what)))
            }
            None => {
                let what = format_args!("a run without shape follows runs of shape {}", layer.shape);
                Err(LayerError(note(Reason::ShapeChanged, &layer.name, what)))
            }
        }
    }

    /// The row's place in the layer.
    fn place(&mut self, elements: usize, bytes: usize) -> Result<Row, LayerError> {
        let layer = Arc::clone(&self.layer);
        let fail = |reason, what: fmt::Arguments<'_>| Err(LayerError(note(reason, &layer.name, what)));
        let (received, total) = (self.received * self.columns, layer.shape.elements());
        if elements > total - received {
            let more = received + elements;
            return fail(
                Reason::LayerTooLong,
                format_args!("{more} elements came, expected {total} of shape {}", layer.shape),
            );
        }
        if self.columns > 0 && !elements.is_multiple_of(self.columns) {
            let what = format_args!(
                "a run of {elements} elements ends inside a channel of {} (shape {}): expected whole channels",
                self.columns, layer.shape
            );
            return fail(Reason::ChannelCut, what);
        }
        let start = self.received;
        self.received += elements.checked_div(self.columns).unwrap_or(0);
        let completes = received + elements == total;
        Ok(Row { layer, channels: start..self.received, bytes, completes, kept: None })
    }

    fn hold(&mut self, row: Row, data: Buffer) {
        if !row.channels.is_empty() {
            self.pieces.push(Piece { data: compact(data), channels: row.channels.len() });
        }
        self.rows.push(row);
    }

    /// Takes the held pieces of the channels up to `end`, cutting the one that goes beyond.
    fn pieces_until(&mut self, end: usize) -> Vec<Piece> {
        let mut missing = end - self.computed;
        let mut taken = Vec::new();
        let mut rest = Vec::new();
        for piece in self.pieces.drain(..) {
            if missing >= piece.channels {
                missing -= piece.channels;
                taken.push(piece);
                continue;
            }
            let cut = missing * (piece.data.len() / piece.channels);
            if missing > 0 {
                taken.push(Piece { data: piece.data.slice_with_length(0, cut), channels: missing });
            }
            rest.push(Piece { data: piece.data.slice(cut), channels: piece.channels - missing });
            missing = 0;
        }
        self.pieces = rest;
        taken
    }
}

impl Unit {
    fn empty() -> Unit {
        Unit { rows: Vec::new(), works: Vec::new(), bytes_in: 0, bytes_out: 0, closes_span: false }
    }

    fn add_row(&mut self, row: Row) {
        self.bytes_out += ROW_BYTES + row.layer.name.len();
        self.rows.push(row);
    }

    fn add_work(&mut self, layer: &Arc<Layer>, channels: Range<usize>, pieces: Vec<Piece>) {
        self.bytes_in += pieces.iter().map(|piece| piece.data.len()).sum::<usize>();
        self.bytes_out += layer.decision.answer_bytes(channels.len());
        if channels.is_empty() {
            return;
        }
        match self.works.last_mut() {
            Some(work) if Arc::ptr_eq(&work.layer, layer) => {
                work.channels.end = channels.end;
                work.pieces.extend(pieces);
            }
            _ => {
                // Each unit of a layer may be the last that holds it.
                self.bytes_in += layer.importance_bytes();
                self.works.push(Work { layer: Arc::clone(layer), channels, pieces });
            }
        }
    }
}

/// Data that stays. A slice keeps its whole message alive: where that is much more than the slice, which alone is charged, copy.
fn compact(data: Buffer) -> Buffer {
    match data.capacity() > data.len() + data.len() / 4 + ROW_BYTES {
        true => Buffer::from_slice_ref(data.as_slice()),
        false => data,
    }
}
