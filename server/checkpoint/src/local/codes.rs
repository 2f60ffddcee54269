//! Layers to dequantize: runs of codes with the scales that begin in them.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{Arc, OnceLock},
};

use arrow_array::{
    Array, ArrayRef, Float32Array, Int32Array, LargeBinaryArray, ListArray, RecordBatch, StringArray, StructArray,
    cast::AsArray, types::Float32Type,
};
use arrow_buffer::{Buffer, NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field, Fields, Schema};
use bytes::{Bytes, BytesMut};
use quarrel_engine::{Granularity, Scaling};
use quarrel_proto::column::{self, status, tensor};

use super::{RUN_BYTES, Run, broken, dequantize, of_a_file};
use crate::{
    answers::{bytes, item, of, shapes, text},
    error::CheckpointError,
    modules::Module,
    quantizer::Coded,
    source::Source,
    unit::Values,
};

/// Some channels of a layer.
pub(super) struct CodesRun {
    layer: Arc<Layer>,
    channels: Range<u64>,
}

struct Layer {
    coded: Coded,
    /// Read with the first run.
    scales: OnceLock<Scales>,
}

/// What goes with a layer's codes.
#[derive(Debug)]
pub(crate) struct Scales {
    scales: Vec<f32>,
    zero_points: Option<Vec<i32>>,
    global: Option<f32>,
    /// How many each span has.
    of_span: u64,
}

/// A layer's runs: whole channels, as many as make a run of f32.
pub(super) fn runs(coded: Coded) -> impl Iterator<Item = CodesRun> {
    let (channels, _) = coded.module.channels();
    let values = 4 * coded.module.shape.iter().product::<u64>() / channels.max(1);
    let step = RUN_BYTES.checked_div(values).unwrap_or(channels).clamp(1, channels.max(1));
    let layer = Arc::new(Layer { coded, scales: OnceLock::new() });
    (0..channels.div_ceil(step)).map(move |at| {
        let channels = at * step..((at + 1) * step).min(channels);
        CodesRun { layer: Arc::clone(&layer), channels }
    })
}

impl Scales {
    /// Reads them.
    pub(crate) fn read(source: &Source, module: &Module) -> Result<Scales, CheckpointError> {
        if module.scheme.format().scaling == Scaling::InBlocks {
            let global = module.global_scale(source)?;
            return Ok(Scales { scales: Vec::new(), zero_points: None, global, of_span: 0 });
        }
        let scales = module.scales(source)?;
        let spans = module.spans_before(module.channels().0);
        let of_span = (scales.len() as u64).checked_div(spans).unwrap_or(0);
        let zero_points = module.zero_points(source)?;
        let points = zero_points.as_ref().map_or(scales.len(), Vec::len);
        if of_span == 0 || of_span * spans != scales.len() as u64 || points != scales.len() {
            let detail = format!(
                "{} scales and {points} zero points for {spans} spans: expected as many for each",
                scales.len()
            );
            return Err(CheckpointError::Module { module: module.name.clone(), detail });
        }
        Ok(Scales { scales, zero_points, global: module.global_scale(source)?, of_span })
    }

    /// Bytes that they take.
    pub(crate) fn bytes(&self) -> usize {
        4 * (self.scales.len() + self.zero_points.as_ref().map_or(0, Vec::len))
    }

    /// Those of some rows, where each has its own.
    pub(crate) fn of_rows(&self, module: &Module, rows: &Range<u64>) -> &[f32] {
        &self.scales[self.of(module, rows)]
    }

    /// Those of a part of the layer that can be decoded alone.
    fn part(&self, module: &Module, channels: &Range<u64>) -> (Vec<f32>, Option<Vec<i32>>) {
        let range = match module.scheme.granularity() {
            // One for all of it.
            Granularity::Tensor => 0..self.scales.len(),
            Granularity::Channel | Granularity::Group(_) => self.of(module, channels),
            // Of those blocks that the channels are in.
            Granularity::Block { rows, .. } => {
                let rows = u64::from(rows.get());
                let end = (module.spans_before(channels.end) * self.of_span) as usize;
                (channels.start / rows * self.of_span) as usize..end.min(self.scales.len())
            }
        };
        (self.scales[range.clone()].to_vec(), self.zero_points.as_ref().map(|points| points[range].to_vec()))
    }

    /// Where those of the spans stand that begin within `channels`.
    fn of(&self, module: &Module, channels: &Range<u64>) -> Range<usize> {
        let first = |channel: u64| (module.spans_before(channel) * self.of_span) as usize;
        first(channels.start)..first(channels.end).min(self.scales.len())
    }
}

impl CodesRun {
    fn scales(&self) -> Result<&Scales, CheckpointError> {
        if let Some(scales) = self.layer.scales.get() {
            return Ok(scales);
        }
        let Coded { source, module } = &self.layer.coded;
        let read = Scales::read(source, module)?;
        Ok(self.layer.scales.get_or_init(|| read))
    }
}

impl Run for CodesRun {
    fn schema() -> Schema {
        let list = |data_type| DataType::List(item(data_type));
        Schema::new(vec![
            Field::new(column::LAYER_NAME, DataType::Utf8, false),
            Field::new(column::STATUS, DataType::Utf8, false),
            Field::new(column::QUANTIZED_DATA, DataType::LargeBinary, false),
            Field::new(column::SCALES, list(DataType::Float32), true),
            Field::new(column::ZERO_POINTS, list(DataType::Int32), true),
            Field::new(column::EXTRA_TENSORS, list(DataType::Struct(extra_fields())), true),
            Field::new(column::DTYPE, DataType::Utf8, false),
            Field::new(column::SHAPE, list(DataType::Int64), false),
            Field::new(column::SCHEME, DataType::Utf8, false),
        ])
    }

    fn source(&self) -> &Source {
        &self.layer.coded.source
    }

    fn read(&self) -> Result<Bytes, CheckpointError> {
        self.scales()?;
        let Coded { source, module } = &self.layer.coded;
        let (_, channel) = module.channels();
        let range = self.channels.start * channel..self.channels.end * channel;
        source.read_of(&module.name, &module.codes, range)
    }

    fn row(&self, schema: &Arc<Schema>, bytes: Bytes) -> Result<RecordBatch, CheckpointError> {
        let module = &self.layer.coded.module;
        let scales = self.scales()?;
        if scales.global.is_some() && module.scheme.format().scaling == Scaling::InBlocks {
            let detail =
                "it has a scale beside its blocks, which are not decoded alone yet: quantize it to what you want";
            return Err(CheckpointError::Module { module: module.name.clone(), detail: detail.to_owned() });
        }
        let range = scales.of(module, &self.channels);
        let points = scales.zero_points.as_ref().map(|points| points[range.clone()].to_vec());
        let global = scales.global.filter(|_| self.channels.start == 0);
        row(schema, module, &module.shape, bytes, (scales.scales[range].to_vec(), points, global))
    }
}

/// Codes as a row of a layer of that shape, with scales, zero points and what the scales are divided by.
fn row(
    schema: &Arc<Schema>,
    module: &Module,
    shape: &[u64],
    codes: Bytes,
    (scales, points, global): (Vec<f32>, Option<Vec<i32>>, Option<f32>),
) -> Result<RecordBatch, CheckpointError> {
    let one = |text: &str| Arc::new(StringArray::from(vec![text])) as ArrayRef;
    let offsets = OffsetBuffer::from_lengths([codes.len()]);
    let is_in_blocks = module.scheme.format().scaling == Scaling::InBlocks;
    let columns: Vec<ArrayRef> = vec![
        one(&module.name),
        one(status::QUANTIZED),
        Arc::new(LargeBinaryArray::try_new(offsets, Buffer::from(codes), None).map_err(broken)?),
        list_of_one(DataType::Float32, (!is_in_blocks).then(|| Arc::new(Float32Array::from(scales)) as ArrayRef))?,
        list_of_one(DataType::Int32, points.map(|points| Arc::new(Int32Array::from(points)) as ArrayRef))?,
        extra(global)?,
        one(module.dtype_word()),
        shapes(shape)?,
        one(&module.scheme.to_string()),
    ];
    RecordBatch::try_new(Arc::clone(schema), columns).map_err(broken)
}

/// The values of some channels, of the type that the weights had, in this thread. Of blocks they are in one row of them, or all.
pub(crate) fn decode(
    source: &Source,
    module: &Module,
    scales: &Scales,
    channels: Range<u64>,
) -> Result<Bytes, CheckpointError> {
    let (all, channel) = module.channels();
    let range = channels.start * channel..channels.end * channel;
    let codes = source.read_of(&module.name, &module.codes, range)?;
    // A layer of its own, whose channels lie one behind the other.
    let mut part = module.clone();
    if channels != (0..all) {
        let dims = (module.scheme.channel_dims().get() as usize).min(module.shape.len());
        let columns = module.shape[dims..].iter().product();
        part.shape = vec![channels.end - channels.start, columns];
        part.scheme = module.scheme.of_matrices();
    }
    let (numbers, points) = scales.part(module, &channels);
    let schema = Arc::new(CodesRun::schema());
    // Of blocks it is no part of the codes: their values are multiplied by it.
    let is_in_blocks = module.scheme.format().scaling == Scaling::InBlocks;
    let (global, factor) = if is_in_blocks { (None, scales.global) } else { (scales.global, None) };
    let row = row(&schema, &part, &part.shape, codes, (numbers, points, global))?;
    let mut dense = BytesMut::new();
    for batch in super::computed_here(&dequantize(module.dtype_word())?, &row).map_err(of_a_file)? {
        let weights = of(&batch, column::WEIGHTS)?;
        (0..batch.num_rows()).for_each(|row| dense.extend_from_slice(&values(weights, row).0));
    }
    if let Some(factor) = factor {
        for value in dense.as_chunks_mut::<4>().0 {
            *value = (f32::from_le_bytes(*value) * factor).to_le_bytes();
        }
    }
    Ok(dense.freeze())
}

/// A list column of one row; null without items.
fn list_of_one(data_type: DataType, items: Option<ArrayRef>) -> Result<ArrayRef, CheckpointError> {
    let nulls = NullBuffer::from(vec![items.is_some()]);
    let items = items.unwrap_or_else(|| arrow_array::new_empty_array(&data_type));
    let offsets = OffsetBuffer::from_lengths([items.len()]);
    Ok(Arc::new(ListArray::try_new(item(data_type), offsets, items, Some(nulls)).map_err(broken)?))
}

fn extra_fields() -> Fields {
    Fields::from(vec![
        Field::new("name", DataType::Utf8, false),
        Field::new("dtype", DataType::Utf8, false),
        Field::new("shape", DataType::List(item(DataType::Int64)), false),
        Field::new("data", DataType::LargeBinary, false),
    ])
}

fn extra(global: Option<f32>) -> Result<ArrayRef, CheckpointError> {
    let tensors = global.map(|global| {
        let data = LargeBinaryArray::from_vec(vec![&global.to_le_bytes()]);
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from(vec![tensor::WEIGHT_GLOBAL_SCALE])),
            Arc::new(StringArray::from(vec!["f32"])),
            shapes(&[1])?,
            Arc::new(data),
        ];
        Ok::<_, CheckpointError>(
            Arc::new(StructArray::try_new(extra_fields(), columns, None).map_err(broken)?) as ArrayRef
        )
    });
    list_of_one(DataType::Struct(extra_fields()), tensors.transpose()?)
}

/// What answers are to be of: layers, in order.
pub(super) struct Expected {
    layers: VecDeque<(String, u64, u64)>,
    /// Elements of the first of them that are answered.
    done: u64,
}

impl Expected {
    pub(super) fn new(layers: &[Coded]) -> Expected {
        let of = |Coded { module, .. }: &Coded| {
            (module.name.clone(), module.shape.iter().product::<u64>(), module.codes.bytes())
        };
        Expected { layers: layers.iter().map(of).collect(), done: 0 }
    }

    /// The values of a batch of answers.
    pub(super) fn values(&mut self, batch: &RecordBatch) -> Result<Vec<Values>, CheckpointError> {
        (0..batch.num_rows()).map(|row| self.value(batch, row)).collect()
    }

    fn value(&mut self, batch: &RecordBatch, row: usize) -> Result<Values, CheckpointError> {
        let unasked = || CheckpointError::Ours("values were answered and not asked for".to_owned());
        let (name, elements, codes) = self.layers.front().cloned().ok_or_else(unasked)?;
        if text(batch, column::LAYER_NAME, row)? != name {
            return Err(unasked());
        }
        let (data, width) = values(of(batch, column::WEIGHTS)?, row);
        let begins = self.done == 0;
        self.done += data.len() as u64 / width;
        let completes = self.done == elements;
        let done = if completes { codes } else { (codes as f64 * self.done as f64 / elements as f64) as u64 };
        if completes {
            self.layers.pop_front();
            self.done = 0;
        }
        Ok(Values { module: name, begins, completes, done, data })
    }
}

/// A row's values, and how many bytes each takes: f32 as a list, others as bytes.
fn values(weights: &ArrayRef, row: usize) -> (Bytes, u64) {
    if let Some(lists) = weights.as_list_opt::<i64>() {
        let (start, end) = (lists.value_offsets()[row] as usize, lists.value_offsets()[row + 1] as usize);
        let values = lists.values().as_primitive::<Float32Type>().values().inner();
        return (values.slice_with_length(4 * start, 4 * (end - start)).into(), 4);
    }
    (bytes(weights, row), 2)
}
