//! Layers to quantize: runs of weights.

use std::sync::Arc;

use arrow_array::{ArrayRef, LargeBinaryArray, RecordBatch, StringArray};
use arrow_buffer::{Buffer, OffsetBuffer};
use arrow_schema::{DataType, Field, Schema};
use bytes::Bytes;
use quarrel_proto::column;

use super::{RUN_BYTES, Run, asked, broken};
use crate::{
    answers::{Asked, item, shapes},
    error::CheckpointError,
    quantizer::Weights,
    source::Source,
};

/// So many channels are a span of blocks: runs of whole spans need not wait for each other.
const SPAN_CHANNELS: u64 = 128;

/// Some channels of a layer.
pub(super) struct WeightsRun {
    weights: Arc<Weights>,
    /// Of the tensor's bytes.
    start: u64,
    end: u64,
}

/// A layer's runs: whole channels, and at least one.
pub(super) fn runs(weights: Weights) -> impl Iterator<Item = WeightsRun> {
    let bytes = weights.tensor.bytes();
    let channels = weights.tensor.shape.first().copied().unwrap_or(1).max(1);
    let channel = bytes / channels;
    let step = RUN_BYTES.checked_div(channel).unwrap_or(channels).clamp(1, channels);
    let step = if step > SPAN_CHANNELS { step - step % SPAN_CHANNELS } else { step };
    let weights = Arc::new(weights);
    (0..channels.div_ceil(step)).map(move |at| {
        let (start, end) = (at * step * channel, ((at + 1) * step).min(channels) * channel);
        WeightsRun { weights: Arc::clone(&weights), start, end }
    })
}

impl WeightsRun {
    pub(super) fn asked(&self) -> Asked {
        let tensor = &self.weights.tensor;
        asked(&tensor.name, (self.start, self.end, tensor.bytes()))
    }
}

impl Run for WeightsRun {
    fn schema() -> Schema {
        Schema::new(vec![
            Field::new(column::LAYER_NAME, DataType::Utf8, false),
            Field::new(column::WEIGHTS, DataType::LargeBinary, false),
            Field::new(column::DTYPE, DataType::Utf8, false),
            Field::new(column::SHAPE, DataType::List(item(DataType::Int64)), false),
        ])
    }

    fn source(&self) -> &Source {
        &self.weights.source
    }

    fn read(&self) -> Result<Bytes, CheckpointError> {
        let Weights { source, tensor, .. } = &*self.weights;
        source.read_of(&tensor.name, tensor, self.start..self.end)
    }

    fn row(&self, schema: &Arc<Schema>, bytes: Bytes) -> Result<RecordBatch, CheckpointError> {
        let Weights { tensor, dtype, .. } = &*self.weights;
        let offsets = OffsetBuffer::from_lengths([bytes.len()]);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from(vec![tensor.name.as_str()])),
            Arc::new(LargeBinaryArray::try_new(offsets, Buffer::from(bytes), None).map_err(broken)?),
            Arc::new(StringArray::from(vec![*dtype])),
            shapes(&tensor.shape)?,
        ];
        RecordBatch::try_new(Arc::clone(schema), columns).map_err(broken)
    }
}
