//! The verb `quantize`: layers to rows, answers to runs.

use std::{collections::VecDeque, ops::Range, sync::Arc};

use arrow_array::{
    Array, Float64Array, LargeBinaryArray, ListArray, RecordBatch, StructArray, UInt8Array, UInt32Array, UInt64Array,
    types::{Float32Type, Int32Type},
};
use arrow_schema::SchemaRef;
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use prost::Message;
use quarrel_proto::{
    column::{self, status},
    v1,
};

use crate::{
    columns::{binary, column, field, number, numbers, text, texts},
    cut::{Cut, product},
    error::Error,
    exchange::{Underway, Verb},
    layer::{Layer, Source},
    rows::{Row, layer_batch, layer_schema},
};

/// What became of some consecutive channels of a layer: one row of the answer.
#[derive(Debug, Clone)]
pub struct Run {
    /// The layer as it was given.
    pub layer: Layer,
    /// Which channels: indices of the first dimension, or of the first `channel_dims` ones flattened.
    pub channels: Range<u64>,
    /// How many channels the layer has.
    pub channels_total: u64,
    /// Whether it completes the layer.
    pub is_last: bool,
    /// What became of them.
    pub outcome: Outcome,
    /// Quality of these channels; none unless quantized.
    pub metrics: Option<Metrics>,
    /// Quality of the whole layer, with the run that completes it; none unless every run was quantized.
    pub layer_metrics: Option<Metrics>,
}

/// What became of channels, or of a layer.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// They were quantized.
    Quantized(Codes),
    /// The command says to leave them as they are.
    Kept {
        /// The contract's word: `ignored`, `rank_1`, ...
        reason: String,
        /// A sentence.
        message: String,
        /// Their elements as they came, if the command says `return_kept`.
        weights: Option<Bytes>,
    },
    /// They could not be quantized, and the command says to go on (`on_error: continue`).
    Failed {
        /// The contract's word: `non_finite`, ...
        reason: String,
        /// A sentence that names the layer and the value.
        message: String,
    },
}

/// Quantized channels.
#[derive(Debug, Clone, PartialEq)]
pub struct Codes {
    /// Packed codes, channel after channel, as SPEC.md, section "Layouts", says.
    pub data: Bytes,
    /// Of the spans that begin in these channels; widened exactly from the stored type.
    pub scales: Vec<f32>,
    /// One for each scale, in the signed domain of the codes; none if symmetric.
    pub zero_points: Option<Vec<i32>>,
    /// The canonical scheme.
    pub scheme: String,
    /// Bits of a code.
    pub bit_width: u8,
}

/// What codes lose. Undefined ones are none. SPEC.md, section "Output", has the formulas.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Metrics {
    /// How many elements.
    pub elements: u64,
    /// Mean squared error.
    pub mse: Option<f64>,
    /// Signal to quantization noise, in dB; none for an exact or all-zero layer.
    pub sqnr_db: Option<f64>,
    /// Cosine of the angle between weights and decoded weights.
    pub cosine: Option<f64>,
    /// Greatest error of an element.
    pub max_abs_error: Option<f64>,
    /// Greatest magnitude of an element.
    pub amax: Option<f64>,
    /// Elements outside of the code range.
    pub saturated: u64,
    /// Codes with padding, scales and zero points, in bits per element.
    pub bits_per_weight: Option<f64>,
}

/// A layer's runs, put together.
#[derive(Debug, Clone)]
pub struct QuantizedLayer {
    /// The layer as it was given.
    pub layer: Layer,
    /// What became of it: `Failed` if any run failed.
    pub outcome: Outcome,
    /// Quality of the layer; none unless quantized.
    pub metrics: Option<Metrics>,
}

impl QuantizedLayer {
    /// The layer's name.
    pub fn name(&self) -> &str {
        self.layer.name()
    }
}

/// Puts runs together: one item for each layer, when it is complete. One layer's codes are in memory at a time, for each
/// stream.
pub fn whole(
    runs: impl Stream<Item = Result<Run, Error>> + Unpin,
) -> impl Stream<Item = Result<QuantizedLayer, Error>> + Unpin {
    let mut open: Vec<Vec<Run>> = Vec::new();
    Box::pin(runs.filter_map(move |run| {
        let run = match run {
            Ok(run) => run,
            Err(error) => return std::future::ready(Some(Err(error))),
        };
        let at = open.iter().position(|runs| Arc::ptr_eq(&runs[0].layer.name, &run.layer.name));
        let mut runs = at.map_or_else(Vec::new, |at| open.swap_remove(at));
        if run.channels.start == 0 {
            runs.clear();
        }
        let is_last = run.is_last;
        runs.push(run);
        if !is_last {
            open.push(runs);
            return std::future::ready(None);
        }
        std::future::ready(Some(Ok(join(runs))))
    }))
}

/// The runs of one layer, which are at least one.
fn join(mut runs: Vec<Run>) -> QuantizedLayer {
    let (layer, metrics) = (runs[0].layer.clone(), runs[runs.len() - 1].layer_metrics);
    let failed = runs.iter().position(|run| matches!(run.outcome, Outcome::Failed { .. }));
    if runs.len() == 1 || failed.is_some() {
        return QuantizedLayer { layer, outcome: runs.swap_remove(failed.unwrap_or(0)).outcome, metrics };
    }
    let mut outcomes = runs.into_iter().map(|run| run.outcome);
    // All runs of a layer that did not fail have one decision.
    let mut outcome = outcomes.next().unwrap_or(Outcome::Failed { reason: String::new(), message: String::new() });
    let mut bytes = BytesMut::new();
    match &mut outcome {
        Outcome::Quantized(codes) => {
            bytes.extend_from_slice(&codes.data);
            for next in outcomes {
                let Outcome::Quantized(next) = next else { continue };
                bytes.extend_from_slice(&next.data);
                codes.scales.extend(next.scales);
                if let (Some(points), Some(next)) = (&mut codes.zero_points, next.zero_points) {
                    points.extend(next);
                }
            }
            codes.data = bytes.freeze();
        }
        Outcome::Kept { weights: Some(weights), .. } => {
            bytes.extend_from_slice(weights);
            for next in outcomes {
                let Outcome::Kept { weights: Some(next), .. } = next else { continue };
                bytes.extend_from_slice(&next);
            }
            *weights = bytes.freeze();
        }
        Outcome::Kept { .. } | Outcome::Failed { .. } => {}
    }
    QuantizedLayer { layer, outcome, metrics }
}

pub(crate) struct Quantize {
    command: v1::Quantize,
    schema: SchemaRef,
}

impl Quantize {
    pub(crate) fn new(command: v1::Quantize) -> Quantize {
        Quantize { command, schema: layer_schema() }
    }
}

impl Verb for Quantize {
    type Layer = Layer;
    type Row = Row;
    type Answer = Run;

    fn command(&self) -> Vec<u8> {
        let verb = v1::command::Verb::Quantize(self.command.clone());
        v1::Command { verb: Some(verb), ..Default::default() }.encode_to_vec()
    }

    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn cut(&self, layer: &Layer, message_bytes_max: u64) -> Result<Cut, Error> {
        let wrong = |detail| Error::Layer { layer: layer.name().to_owned(), detail };
        let bytes = product(&layer.shape).and_then(|elements| elements.checked_mul(layer.dtype.bytes()));
        let bytes =
            bytes.ok_or_else(|| wrong(format!("its shape {:?} is of more bytes than there are", layer.shape)))?;
        if let Source::Here(data) = &layer.source
            && data.len() as u64 != bytes
        {
            let (shape, dtype) = (&layer.shape, layer.dtype.word());
            return Err(wrong(format!("{} bytes of {dtype} for shape {shape:?}: expected {bytes}", data.len())));
        }
        // A layer of one dimension is kept, or one channel: in one row either way. The last dimension is never a channel's.
        let dims = self.command.channel_dims.unwrap_or(1) as usize;
        let dims = dims.min(layer.shape.len().saturating_sub(1));
        let channels = product(&layer.shape[..dims]).unwrap_or(0);
        let channel_bytes = bytes.checked_div(channels).unwrap_or(0);
        if channel_bytes > message_bytes_max {
            let (layer, limit) = (layer.name().to_owned(), message_bytes_max);
            return Err(Error::ChannelTooLarge { layer, bytes: channel_bytes, limit });
        }
        Ok(Cut::new(channels, channel_bytes, message_bytes_max))
    }

    fn blocks(layer: &Layer) -> bool {
        matches!(layer.source, Source::There(_))
    }

    fn read(layer: &Layer, cut: Cut, channels: Range<u64>) -> Result<Row, Error> {
        let elements = product(&layer.shape).unwrap_or(0);
        let channel_bytes = (elements * layer.dtype.bytes()).checked_div(cut.total()).unwrap_or(0);
        let range = channels.start * channel_bytes..channels.end * channel_bytes;
        let data = match (&layer.source, layer.source.here(range.clone())) {
            (_, Some(data)) => data,
            (Source::There(read), None) => {
                let failed = |detail| Error::Source { layer: layer.name().to_owned(), detail };
                let data = read(range.clone()).map_err(|error| failed(error.to_string()))?;
                let expected = range.end - range.start;
                if data.len() as u64 != expected {
                    return Err(failed(format!("its reader gave {} bytes: expected {expected}", data.len())));
                }
                data
            }
            (Source::Here(_), None) => Bytes::new(),
        };
        Ok(Row { layer: layer.clone(), data })
    }

    fn bytes(row: &Row) -> usize {
        row.data.len()
    }

    fn batch(&self, rows: Vec<Row>) -> Result<RecordBatch, Error> {
        layer_batch(&self.schema, &rows)
    }

    fn take(&self, batch: &RecordBatch, underway: &mut VecDeque<Underway<Layer>>) -> Result<Vec<(Run, usize)>, Error> {
        let answers = Answers::of(batch)?;
        let mut runs = Vec::with_capacity(batch.num_rows());
        for row in 0..batch.num_rows() {
            let unasked = || Error::Answer { detail: "a row came that was not sent".to_owned() };
            let front = underway.front_mut().ok_or_else(unasked)?;
            if answers.names.value(row) != front.layer.name() {
                return Err(unasked());
            }
            let (layer, cut, at) = (front.layer.clone(), front.cut, front.done);
            front.done += 1;
            if front.done == cut.rows() {
                underway.pop_front();
            }
            runs.push(answers.run(row, layer, cut, at)?);
        }
        Ok(runs)
    }
}

/// The columns of one batch of answers.
struct Answers<'a> {
    names: &'a arrow_array::StringArray,
    statuses: &'a arrow_array::StringArray,
    reasons: &'a arrow_array::StringArray,
    messages: &'a arrow_array::StringArray,
    data: &'a LargeBinaryArray,
    scales: &'a ListArray,
    zero_points: &'a ListArray,
    extra: &'a ListArray,
    schemes: &'a arrow_array::StringArray,
    widths: &'a UInt8Array,
    metrics: &'a StructArray,
    layer_metrics: &'a StructArray,
    checksums: &'a UInt32Array,
}

impl<'a> Answers<'a> {
    fn of(batch: &'a RecordBatch) -> Result<Answers<'a>, Error> {
        Ok(Answers {
            names: texts(batch, column::LAYER_NAME)?,
            statuses: texts(batch, column::STATUS)?,
            reasons: texts(batch, column::REASON)?,
            messages: texts(batch, column::MESSAGE)?,
            data: column(batch, column::QUANTIZED_DATA)?,
            scales: column(batch, column::SCALES)?,
            zero_points: column(batch, column::ZERO_POINTS)?,
            extra: column(batch, column::EXTRA_TENSORS)?,
            schemes: texts(batch, column::SCHEME)?,
            widths: column(batch, column::BIT_WIDTH)?,
            metrics: column(batch, column::METRICS)?,
            layer_metrics: column(batch, column::LAYER_METRICS)?,
            checksums: column(batch, column::CHECKSUM)?,
        })
    }

    /// A row as the run at place `at` of its layer, and how many bytes it holds.
    fn run(&self, row: usize, layer: Layer, cut: Cut, at: u64) -> Result<(Run, usize), Error> {
        let reason = || text(self.reasons, row).unwrap_or_default().to_owned();
        let message = || text(self.messages, row).unwrap_or_default().to_owned();
        let outcome = match self.statuses.value(row) {
            status::QUANTIZED => Outcome::Quantized(self.codes(row, &layer)?),
            status::KEPT => Outcome::Kept { reason: reason(), message: message(), weights: self.weights(row)? },
            status::FAILED => Outcome::Failed { reason: reason(), message: message() },
            other => return Err(Error::Answer { detail: format!("status `{other}` is none") }),
        };
        let bytes = match &outcome {
            Outcome::Quantized(codes) => codes.data.len() + 4 * codes.scales.len(),
            Outcome::Kept { weights, .. } => weights.as_ref().map_or(0, Bytes::len),
            Outcome::Failed { .. } => 0,
        };
        let (metrics, layer_metrics) = (metrics(self.metrics, row)?, metrics(self.layer_metrics, row)?);
        let (channels, channels_total, is_last) = (cut.channels(at), cut.total(), at + 1 == cut.rows());
        Ok((Run { layer, channels, channels_total, is_last, outcome, metrics, layer_metrics }, bytes))
    }

    fn codes(&self, row: usize, layer: &Layer) -> Result<Codes, Error> {
        let missing =
            |name| Error::Answer { detail: format!("layer `{}` is quantized without `{name}`", layer.name()) };
        let data = binary(self.data, row).ok_or_else(|| missing(column::QUANTIZED_DATA))?;
        let checksum = number(self.checksums, row).ok_or_else(|| missing(column::CHECKSUM))?;
        if crc32c::crc32c(&data) != checksum {
            let detail = format!("layer `{}`: the codes do not have their checksum {checksum:#010x}", layer.name());
            return Err(Error::Answer { detail });
        }
        Ok(Codes {
            data,
            scales: numbers::<Float32Type>(self.scales, row)?.ok_or_else(|| missing(column::SCALES))?,
            zero_points: numbers::<Int32Type>(self.zero_points, row)?,
            scheme: text(self.schemes, row).ok_or_else(|| missing(column::SCHEME))?.to_owned(),
            bit_width: number(self.widths, row).ok_or_else(|| missing(column::BIT_WIDTH))?,
        })
    }

    /// The tensor `weight` of a kept row.
    fn weights(&self, row: usize) -> Result<Option<Bytes>, Error> {
        if self.extra.is_null(row) {
            return Ok(None);
        }
        let tensors = self.extra.value(row);
        let broken = || Error::Answer { detail: format!("column `{}` holds no tensors", column::EXTRA_TENSORS) };
        let tensors = tensors.as_any().downcast_ref::<StructArray>().ok_or_else(broken)?;
        let names = field::<arrow_array::StringArray>(tensors, "name")?;
        let data = field::<LargeBinaryArray>(tensors, "data")?;
        let at = (0..tensors.len()).find(|at| names.value(*at) == "weight");
        Ok(at.and_then(|at| binary(data, at)))
    }
}

fn metrics(structs: &StructArray, row: usize) -> Result<Option<Metrics>, Error> {
    if structs.is_null(row) {
        return Ok(None);
    }
    let float = |name| Ok::<_, Error>(number(field::<Float64Array>(structs, name)?, row));
    let count = |name| Ok::<_, Error>(field::<UInt64Array>(structs, name)?.value(row));
    Ok(Some(Metrics {
        elements: count("elements")?,
        mse: float("mse")?,
        sqnr_db: float("sqnr_db")?,
        cosine: float("cosine")?,
        max_abs_error: float("max_abs_error")?,
        amax: float("amax")?,
        saturated: count("saturated")?,
        bits_per_weight: float("bits_per_weight")?,
    }))
}
