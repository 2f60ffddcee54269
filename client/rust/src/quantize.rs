//! The verb `quantize`: layers to rows, answers to runs.

use std::{collections::VecDeque, ops::Range, sync::Arc};

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use prost::Message;
use quarrel_proto::v1::{self, quantize::How};

use crate::{
    answered::Answered,
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
    /// Of the spans that begin in these channels; widened exactly from the stored type. Empty of GGUF types, whose codes hold them.
    pub scales: Vec<f32>,
    /// One for each scale, in the signed domain of the codes; none if symmetric.
    pub zero_points: Option<Vec<i32>>,
    /// What the scales are divided by, if that is another number than 1: on the layer's first run (NVFP4).
    pub global_scale: Option<f32>,
    /// The layer's scales as they are stored where they are quantized too: on its first run (`double_quant=true`).
    pub nested: Option<Nested>,
    /// The canonical scheme.
    pub scheme: String,
    /// Bits of a code.
    pub bit_width: u8,
}

/// Scales that are quantized themselves, as bitsandbytes does.
#[derive(Debug, Clone, PartialEq)]
pub struct Nested {
    /// A byte for each scale of the layer, channel after channel.
    pub absmax: Bytes,
    /// For each 256 of them the greatest distance from the mean.
    pub nested_absmax: Vec<f32>,
    /// The mean.
    pub offset: f32,
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
    /// Runs are whole indices of so many first dimensions.
    channel_dims: usize,
}

/// The least of any rule: whole channels of that are whole channels of every other.
fn channel_dims(command: &v1::Quantize) -> usize {
    let of = |scheme: &str, said: Option<u32>| {
        let in_text = scheme.split_once(";channel_dims=").and_then(|(_, dims)| dims.parse().ok());
        said.or(in_text).unwrap_or(1)
    };
    let least = match &command.how {
        Some(How::Scheme(scheme)) => Some(of(scheme, command.channel_dims)),
        Some(How::Recipe(recipe)) => recipe.rules.iter().map(|rule| of(&rule.scheme, rule.channel_dims)).min(),
        Some(How::Profile(_)) | None => None,
    };
    least.unwrap_or(1).max(1) as usize
}

impl Quantize {
    pub(crate) fn new(command: v1::Quantize) -> Quantize {
        Quantize { channel_dims: channel_dims(&command), command, schema: layer_schema() }
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
        let dims = self.channel_dims.min(layer.shape.len().saturating_sub(1));
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
        let answers = Answered::of(batch)?;
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
