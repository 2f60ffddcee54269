//! Results to batches: one output row for each input row, in order, whatever happened to it.
//!
//! Codes go out in the buffer that the kernels wrote; a batch is a slice of it. Only rows that failed in the middle of a
//! unit make a copy necessary.

use std::{ops::Range, sync::Arc};

use arrow_array::{
    ArrayRef, Float64Array, Int64Array, LargeBinaryArray, ListArray, RecordBatch, StringArray, StructArray, UInt8Array,
    UInt32Array, UInt64Array,
};
use arrow_buffer::{ArrowNativeType, Buffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow_schema::{DataType, SchemaRef};
use quarrel_kernels::{Metrics, Sums};
use quarrel_proto::{column::status, v1};
use quarrel_shelf::Room;

use crate::{
    execute::{Arrays, Computed, Outcome},
    extras::extra_tensors,
    layer::{Decision, LayerError, Note, Rung},
    nested::Nested,
    plan::{OnError, QuantizePlan},
    rows::{ANSWER_BYTES, Layer, ROW_BYTES, Row},
    schemas,
    tally::Tally,
};

/// A batch to send, and how far the stream is with it.
#[derive(Debug)]
pub struct Answer {
    /// One row for each input row.
    pub batch: RecordBatch,
    /// Totals up to and with this batch.
    pub progress: v1::Progress,
}

/// Makes the answers of a stream, unit after unit.
#[derive(Debug)]
pub struct Answers {
    plan: Arc<QuantizePlan>,
    schema: SchemaRef,
    /// Results of channels whose row is not answered yet.
    carried: Option<(Outcome, Arrays)>,
    layer: LayerSums,
    tally: Tally,
}

/// What is known of the layer whose rows are being answered.
#[derive(Debug, Default)]
struct LayerSums {
    sums: Sums,
    bits: u64,
    failed: bool,
}

/// What became of a row.
pub(crate) enum Status<'a> {
    Quantized(&'a Rung),
    Kept(&'a Note),
    Failed(&'a Note),
}

/// Where the next row's results begin in the arrays.
#[derive(Debug, Clone, Copy, Default)]
struct Cursor {
    codes: usize,
    scales: usize,
    zero_points: usize,
    sums: usize,
}

/// A row as it will stand in a batch.
pub(crate) struct Line<'a> {
    pub(crate) row: &'a Row,
    pub(crate) status: Status<'a>,
    codes: Range<usize>,
    scales: Range<usize>,
    zero_points: Range<usize>,
    /// On the first row of a layer whose scales are under one.
    pub(crate) global: Option<f32>,
    /// On the first row of a layer whose scales are quantized too.
    pub(crate) nested: Option<&'a Nested>,
    metrics: Option<(Metrics, Option<f64>)>,
    layer_metrics: Option<(Metrics, Option<f64>)>,
}

impl Answers {
    /// Before the first unit. `schema` is [`schemas::quantized_schema`] with the reply's metadata.
    pub fn new(plan: Arc<QuantizePlan>, schema: SchemaRef) -> Answers {
        Answers { plan, schema, carried: None, layer: LayerSums::default(), tally: Tally::default() }
    }

    /// The answers of the next unit: of all its rows, or of those before the first whose numbers are at fault where the
    /// command says that this ends the stream.
    pub fn take(&mut self, computed: Computed) -> (Vec<Answer>, Result<(), LayerError>) {
        let Computed { rows, mut results, mut arrays } = computed;
        if let Some((outcome, carried)) = self.carried.take() {
            match results.first_mut() {
                Some(first) if Arc::ptr_eq(&first.layer, &outcome.layer) => {
                    first.channels.start = outcome.channels.start;
                    first.faults.splice(0..0, outcome.faults);
                }
                _ => results.insert(0, outcome),
            }
            arrays = carried.followed_by(arrays);
        }
        let mut cursor = Cursor::default();
        let mut outcomes = results.iter().peekable();
        let mut lines: Vec<Vec<Line<'_>>> = vec![Vec::new()];
        let mut bytes = 0;
        let mut ended = Ok(());
        for row in &rows {
            while outcomes.next_if(|outcome| !Arc::ptr_eq(&outcome.layer, &row.layer) && computes(&row.layer)).is_some()
            {
            }
            let line = self.line(row, outcomes.peek().copied(), &mut cursor, &arrays.sums);
            if let (Status::Failed(note), OnError::Fail) = (&line.status, self.plan.on_error) {
                ended = Err(LayerError((*note).clone()));
                break;
            }
            let kept = match line.status {
                Status::Kept(_) => row.kept.as_ref().map_or(0, |data| data.len()),
                Status::Quantized(_) | Status::Failed(_) => 0,
            };
            let nested = line.nested.map_or(0, Nested::bytes);
            let line_bytes =
                ROW_BYTES + kept + nested + line.codes.len() + 4 * (line.scales.len() + line.zero_points.len());
            if bytes > 0 && bytes + line_bytes > ANSWER_BYTES {
                lines.push(Vec::new());
                bytes = 0;
            }
            bytes += line_bytes;
            lines.last_mut().expect("it began with one").push(line);
        }
        let buffers = Buffers {
            codes: std::mem::take(&mut arrays.codes).lent(),
            scales: Buffer::from_vec(std::mem::take(&mut arrays.scales)),
            zero_points: Buffer::from_vec(std::mem::take(&mut arrays.zero_points)),
        };
        let mut answers = Vec::new();
        for lines in lines.iter().filter(|lines| !lines.is_empty()) {
            for line in lines {
                self.tally.add(line.row, line.status.word(), line.layer_metrics.as_ref(), line.out_bytes());
            }
            let batch = self.batch(lines, &buffers);
            answers.push(Answer { batch, progress: self.tally.progress() });
        }
        drop(lines);
        self.carried = carry(results, &buffers, arrays.sums, cursor, rows.last());
        (answers, ended)
    }

    /// The totals of the stream so far.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    fn line<'a>(&mut self, row: &'a Row, outcome: Option<&'a Outcome>, cursor: &mut Cursor, sums: &[Sums]) -> Line<'a> {
        let empty = |status| Line {
            row,
            status,
            codes: 0..0,
            scales: 0..0,
            zero_points: 0..0,
            global: None,
            nested: None,
            metrics: None,
            layer_metrics: None,
        };
        let mut line = match (&row.layer.decision, outcome) {
            (Decision::Keep(note), _) => empty(Status::Kept(note)),
            (Decision::Fail(note), _) => empty(Status::Failed(note)),
            (Decision::Quantize(rung), None) => empty(Status::Quantized(rung)), // a run of no channels
            (Decision::Ladder(..), None) => unreachable!("a ladder answers its rows with its one outcome"),
            (Decision::Quantize(_) | Decision::Ladder(..), Some(outcome)) => match &outcome.rung {
                Err(note) => empty(Status::Kept(note)),
                Ok(rung) => self.computed_line(row, rung, outcome, cursor, sums),
            },
        };
        if let Status::Failed(_) = line.status {
            self.layer.failed = true;
        }
        if row.completes {
            let LayerSums { sums, bits, failed } = std::mem::take(&mut self.layer);
            if matches!(line.status, Status::Quantized(_)) && !failed {
                line.layer_metrics = Some((sums.metrics(), per_weight(bits, sums.elements)));
            }
        }
        line
    }

    fn computed_line<'a>(
        &mut self,
        row: &'a Row,
        rung: &'a Rung,
        outcome: &'a Outcome,
        cursor: &mut Cursor,
        sums: &[Sums],
    ) -> Line<'a> {
        let channels = row.channels.len();
        let scales = rung.spans_in(&row.channels) * rung.groups();
        let zero_points = if rung.codes().symmetric() { 0 } else { scales };
        let from = *cursor;
        cursor.codes += channels * rung.packed_bytes();
        cursor.scales += scales;
        cursor.zero_points += zero_points;
        cursor.sums += channels;
        let touched = |fault: &Range<usize>| fault.start < row.channels.end && row.channels.start < fault.end;
        let fault = outcome.faults.iter().find(|(fault, _)| touched(fault));
        let (status, mut own) = match fault {
            Some((_, note)) => (Status::Failed(note), Sums::default()),
            None => (Status::Quantized(rung), Sums::default()),
        };
        let bits = ((cursor.codes - from.codes) * 8 + rung.beside_bits(&row.channels)) as u64;
        if fault.is_none() {
            for channel in &sums[from.sums..cursor.sums] {
                own = own.then(channel);
                self.layer.sums = self.layer.sums.then(channel);
            }
            self.layer.bits += bits;
        }
        let keep = |range: Range<usize>| if fault.is_none() { range } else { range.start..range.start };
        Line {
            row,
            status,
            codes: keep(from.codes..cursor.codes),
            scales: keep(from.scales..cursor.scales),
            zero_points: keep(from.zero_points..cursor.zero_points),
            global: (fault.is_none() && rung.holds_global(&row.channels)).then_some(outcome.global),
            nested: outcome.nested.as_ref().filter(|_| fault.is_none() && rung.holds_nested(&row.channels)),
            metrics: fault.is_none().then(|| (own.metrics(), per_weight(bits, own.elements))),
            layer_metrics: None,
        }
    }

    fn batch(&self, lines: &[Line<'_>], buffers: &Buffers) -> RecordBatch {
        let quantized: Vec<Option<&Rung>> = lines
            .iter()
            .map(|line| match line.status {
                Status::Quantized(rung) => Some(rung),
                Status::Kept(_) | Status::Failed(_) => None,
            })
            .collect();
        let notes: Vec<Option<&Note>> = lines
            .iter()
            .map(|line| match line.status {
                Status::Quantized(_) => None,
                Status::Kept(note) | Status::Failed(note) => Some(note),
            })
            .collect();
        let present = NullBuffer::from(quantized.iter().map(Option::is_some).collect::<Vec<_>>());
        let asymmetric: Vec<bool> =
            quantized.iter().map(|rung| rung.is_some_and(|rung| !rung.codes().symmetric())).collect();
        let scaled: Vec<bool> = quantized.iter().map(|rung| rung.is_some_and(|rung| rung.scaled())).collect();
        let codes: Vec<_> = lines.iter().map(|line| line.codes.clone()).collect();
        let scales: Vec<_> = lines.iter().map(|line| line.scales.clone()).collect();
        let zero_points: Vec<_> = lines.iter().map(|line| line.zero_points.clone()).collect();
        let data = gather::<u8>(&buffers.codes, &codes);
        let checksums: UInt32Array = lines
            .iter()
            .zip(&quantized)
            .map(|(line, rung)| rung.map(|_| crc32c::crc32c(&buffers.codes[line.codes.clone()])))
            .collect();
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from_iter_values(lines.iter().map(|line| line.row.layer.name.as_str()))),
            Arc::new(StringArray::from_iter_values(lines.iter().map(|line| line.status.word()))),
            Arc::new(StringArray::from_iter(notes.iter().map(|note| note.map(|note| note.reason.word())))),
            Arc::new(StringArray::from_iter(notes.iter().map(|note| note.map(|note| note.message.as_str())))),
            Arc::new(LargeBinaryArray::new(offsets(&codes), data, Some(present))),
            Arc::new(list::<f32>(DataType::Float32, &scales, &buffers.scales, NullBuffer::from(scaled))),
            Arc::new(list::<i32>(DataType::Int32, &zero_points, &buffers.zero_points, NullBuffer::from(asymmetric))),
            Arc::new(extra_tensors(lines)),
            Arc::new(StringArray::from_iter_values(lines.iter().map(|line| line.row.layer.dtype.name()))),
            Arc::new(shapes(lines.iter().map(|line| line.row.layer.shape.dims()))),
            Arc::new(StringArray::from_iter(quantized.iter().map(|rung| rung.map(|rung| rung.scheme.to_string())))),
            Arc::new(UInt8Array::from_iter(quantized.iter().map(|rung| rung.map(|rung| rung.codes().bits())))),
            Arc::new(metrics(lines.iter().map(|line| line.metrics.as_ref()))),
            Arc::new(metrics(lines.iter().map(|line| line.layer_metrics.as_ref()))),
            Arc::new(checksums),
        ];
        RecordBatch::try_new(Arc::clone(&self.schema), columns).expect("columns follow `quantized_schema`")
    }
}

impl Status<'_> {
    fn word(&self) -> &'static str {
        match self {
            Status::Quantized(_) => status::QUANTIZED,
            Status::Kept(_) => status::KEPT,
            Status::Failed(_) => status::FAILED,
        }
    }
}

impl Line<'_> {
    /// Bytes of codes, scales as stored, and zero points at the codes' width; or of a kept row's weights.
    fn out_bytes(&self) -> u64 {
        match self.status {
            Status::Quantized(rung) => (self.codes.len() + rung.beside_bits(&self.row.channels).div_ceil(8)) as u64,
            Status::Kept(_) => self.row.kept.as_ref().map_or(0, |data| data.len() as u64),
            Status::Failed(_) => 0,
        }
    }
}

impl Arrays {
    fn followed_by(mut self, next: Arrays) -> Arrays {
        if self.codes.is_empty() && self.scales.is_empty() {
            return next;
        }
        self.codes = Room::joined(&[&self.codes, &next.codes]);
        self.scales.extend(next.scales);
        self.zero_points.extend(next.zero_points);
        self.sums.extend(next.sums);
        self
    }
}

struct Buffers {
    codes: Buffer,
    scales: Buffer,
    zero_points: Buffer,
}

/// Whether rows of the layer wait for an outcome.
fn computes(layer: &Layer) -> bool {
    match layer.decision {
        Decision::Quantize(_) | Decision::Ladder(..) => true,
        Decision::Keep(_) | Decision::Fail(_) => false,
    }
}

/// What lies beyond the last answered row.
fn carry(
    mut results: Vec<Outcome>,
    buffers: &Buffers,
    sums: Vec<Sums>,
    cursor: Cursor,
    last: Option<&Row>,
) -> Option<(Outcome, Arrays)> {
    let mut outcome = results.pop()?;
    if cursor.sums == sums.len() {
        return None;
    }
    if let Some(last) = last.filter(|row| Arc::ptr_eq(&row.layer, &outcome.layer)) {
        outcome.channels.start = last.channels.end;
        outcome.faults.retain(|(fault, _)| fault.end > last.channels.end);
    }
    let arrays = Arrays {
        codes: Room::joined(&[&buffers.codes[cursor.codes..]]),
        scales: buffers.scales.typed_data::<f32>()[cursor.scales..].to_vec(),
        zero_points: buffers.zero_points.typed_data::<i32>()[cursor.zero_points..].to_vec(),
        sums: sums[cursor.sums..].to_vec(),
    };
    Some((outcome, arrays))
}

fn per_weight(bits: u64, elements: u64) -> Option<f64> {
    (elements > 0).then(|| bits as f64 / elements as f64)
}

/// The elements of those ranges, one after another: a slice where they lie so already.
fn gather<T: ArrowNativeType>(values: &Buffer, ranges: &[Range<usize>]) -> Buffer {
    let size = size_of::<T>();
    let whole = ranges.iter().filter(|range| !range.is_empty());
    let joined = whole.clone().zip(whole.clone().skip(1)).all(|(a, b)| a.end == b.start);
    match (whole.clone().next(), whole.clone().next_back()) {
        (Some(first), Some(last)) if joined => {
            values.slice_with_length(first.start * size, (last.end - first.start) * size)
        }
        (Some(_), Some(_)) => {
            let typed = values.typed_data::<T>();
            Buffer::from_vec(whole.flat_map(|range| &typed[range.clone()]).copied().collect::<Vec<T>>())
        }
        _ => Buffer::from_vec(Vec::<T>::new()),
    }
}

fn offsets<O: arrow_array::OffsetSizeTrait>(ranges: &[Range<usize>]) -> OffsetBuffer<O> {
    OffsetBuffer::from_lengths(ranges.iter().map(Range::len))
}

fn list<T: ArrowNativeType>(item: DataType, ranges: &[Range<usize>], values: &Buffer, nulls: NullBuffer) -> ListArray {
    let gathered = gather::<T>(values, ranges);
    let length = gathered.len() / size_of::<T>();
    let values: ArrayRef = match item {
        DataType::Float32 => Arc::new(arrow_array::Float32Array::new(ScalarBuffer::new(gathered, 0, length), None)),
        _ => Arc::new(arrow_array::Int32Array::new(ScalarBuffer::new(gathered, 0, length), None)),
    };
    ListArray::new(schemas::item(item), offsets(ranges), values, Some(nulls))
}

/// Shapes, one a row.
pub(crate) fn shapes<'a>(dims: impl Iterator<Item = &'a [i64]> + Clone) -> ListArray {
    let offsets = OffsetBuffer::from_lengths(dims.clone().map(<[i64]>::len));
    // A builder would begin with room for a thousand numbers, and most batches have a row or a few.
    let values = Int64Array::from(dims.flatten().copied().collect::<Vec<_>>());
    ListArray::new(schemas::item(DataType::Int64), offsets, Arc::new(values), None)
}

/// A row's metrics, and the bits that a weight takes.
type Measured = (Metrics, Option<f64>);

fn metrics<'a>(rows: impl Iterator<Item = Option<&'a Measured>>) -> StructArray {
    let rows = Vec::from_iter(rows);
    let counts = |count: fn(&Metrics) -> u64| -> ArrayRef {
        Arc::new(UInt64Array::from_iter_values(rows.iter().map(|row| row.map_or(0, |(metrics, _)| count(metrics)))))
    };
    let numbers = |number: fn(&Measured) -> Option<f64>| -> ArrayRef {
        Arc::new(Float64Array::from_iter(rows.iter().map(|row| row.and_then(number))))
    };
    let columns = vec![
        counts(|metrics| metrics.elements),
        numbers(|(metrics, _)| metrics.mse),
        numbers(|(metrics, _)| metrics.sqnr_db),
        numbers(|(metrics, _)| metrics.cosine),
        numbers(|(metrics, _)| Some(metrics.max_abs_error)),
        numbers(|(metrics, _)| Some(metrics.amax)),
        counts(|metrics| metrics.saturated),
        numbers(|(_, bits)| *bits),
    ];
    let present = NullBuffer::from_iter(rows.iter().map(Option::is_some));
    StructArray::new(schemas::metrics_fields(), columns, Some(present))
}
