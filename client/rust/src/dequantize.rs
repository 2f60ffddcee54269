//! The verb `dequantize`: codes to rows, answers to runs of values.

use std::{collections::VecDeque, num::NonZeroU64, ops::Range, sync::Arc};

use arrow_array::{
    ArrayRef, Float32Array, Int32Array, LargeBinaryArray, LargeListArray, ListArray, RecordBatch, StringArray,
    StructArray, types::Float32Type,
};
use arrow_buffer::{NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow_schema::{DataType, Field, Fields, Schema, SchemaRef};
use bytes::Bytes;
use prost::Message;
use quarrel_proto::{
    column::{self, codes_hold_scales, status, tensor},
    v1,
};

use crate::{
    columns::{binary, column, large_numbers, slice, texts},
    cut::{Cut, product},
    error::Error,
    exchange::{Underway, Verb},
    layer::{Dtype, Source},
    rows::{binaries, broken, item, shapes},
};

/// A quantized layer to be computed back.
#[derive(Debug, Clone)]
pub struct CodedLayer {
    name: Arc<str>,
    dtype: Dtype,
    shape: Arc<[u64]>,
    scheme: Arc<str>,
    channels: u64,
    channel_bytes: u64,
    span: Span,
    scales: Arc<[f32]>,
    zero_points: Option<Arc<[i32]>>,
    global_scale: Option<f32>,
    codes: Source,
}

/// The fewest channels that share scales, and how many scales they have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    channels: u64,
    scales: u64,
}

impl CodedLayer {
    /// A layer whose codes are `channels` times `channel_bytes` bytes, read when their turn comes. `span_channels` channels
    /// share `scales.len() / (channels / span_channels)` scales: 1 for scales per channel or group, the height of a block,
    /// or all of them. Codes that hold their scales (GGUF types) have none beside them.
    ///
    /// # Errors
    /// [`Error::Layer`] if the numbers of channels, scales and zero points do not go together.
    #[allow(clippy::too_many_arguments, reason = "each is a column of the row, by its own type")]
    pub fn new(
        name: impl Into<String>,
        dtype: Dtype,
        shape: impl AsRef<[u64]>,
        scheme: impl Into<String>,
        (channels, channel_bytes): (u64, u64),
        span_channels: NonZeroU64,
        scales: Vec<f32>,
        zero_points: Option<Vec<i32>>,
        read: impl Fn(Range<u64>) -> std::io::Result<Bytes> + Send + Sync + 'static,
    ) -> Result<CodedLayer, Error> {
        let (name, scheme): (String, String) = (name.into(), scheme.into());
        let spans = channels.div_ceil(span_channels.get());
        let count = scales.len() as u64;
        if spans == 0 || !count.is_multiple_of(spans) || (count == 0) != codes_hold_scales(&scheme) {
            let detail =
                format!("{count} scales for {spans} spans of {span_channels} channels: expected as many for each");
            return Err(Error::Layer { layer: name, detail });
        }
        if let Some(points) = zero_points.as_ref().filter(|points| points.len() != scales.len()) {
            let detail = format!("{} zero points: expected {count}, one for each scale", points.len());
            return Err(Error::Layer { layer: name, detail });
        }
        Ok(CodedLayer {
            name: name.into(),
            dtype,
            shape: shape.as_ref().into(),
            scheme: scheme.into(),
            channels,
            channel_bytes,
            span: Span { channels: span_channels.get(), scales: count / spans },
            scales: scales.into(),
            zero_points: zero_points.map(Into::into),
            global_scale: None,
            codes: Source::There(Arc::new(read)),
        })
    }

    /// The layer with scales that are divided by one number (NVFP4).
    #[must_use]
    pub fn with_global_scale(self, global_scale: Option<f32>) -> CodedLayer {
        CodedLayer { global_scale, ..self }
    }

    /// Where the scales of the spans stand that begin within `channels`.
    fn scales_of(&self, channels: &Range<u64>) -> Range<usize> {
        let first = |channel: u64| (channel.div_ceil(self.span.channels) * self.span.scales) as usize;
        first(channels.start)..first(channels.end).min(self.scales.len())
    }
}

/// Values of consecutive channels of a layer.
#[derive(Debug, Clone)]
pub struct DecodedRun {
    /// The layer's name.
    pub name: Arc<str>,
    /// Its shape.
    pub shape: Arc<[u64]>,
    /// The element type of `data`: f32, or what the command asked for.
    pub dtype: Dtype,
    /// Which elements, row-major.
    pub elements: Range<u64>,
    /// Whether it completes the layer.
    pub is_last: bool,
    /// The values, little-endian.
    pub data: Bytes,
}

pub(crate) struct Dequantize {
    command: v1::Dequantize,
    schema: SchemaRef,
}

/// One run of codes.
pub(crate) struct Row {
    layer: CodedLayer,
    scales: Range<usize>,
    data: Bytes,
    is_first: bool,
}

impl Dequantize {
    pub(crate) fn new(command: v1::Dequantize) -> Dequantize {
        let list = |data_type| DataType::List(item(data_type));
        let schema = Schema::new(vec![
            Field::new(column::LAYER_NAME, DataType::Utf8, false),
            Field::new(column::STATUS, DataType::Utf8, false),
            Field::new(column::QUANTIZED_DATA, DataType::LargeBinary, false),
            Field::new(column::SCALES, list(DataType::Float32), false),
            Field::new(column::ZERO_POINTS, list(DataType::Int32), true),
            Field::new(column::EXTRA_TENSORS, list(DataType::Struct(extra_fields())), true),
            Field::new(column::DTYPE, DataType::Utf8, false),
            Field::new(column::SHAPE, list(DataType::Int64), false),
            Field::new(column::SCHEME, DataType::Utf8, false),
        ]);
        Dequantize { command, schema: Arc::new(schema) }
    }
}

impl Verb for Dequantize {
    type Layer = CodedLayer;
    type Row = Row;
    type Answer = DecodedRun;

    fn command(&self) -> Vec<u8> {
        let verb = v1::command::Verb::Dequantize(self.command.clone());
        v1::Command { verb: Some(verb), ..Default::default() }.encode_to_vec()
    }

    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn cut(&self, layer: &CodedLayer, message_bytes_max: u64) -> Result<Cut, Error> {
        // By what comes back, which is up to sixteen times as much: that is what waits in memory.
        let values = product(&layer.shape).unwrap_or(u64::MAX).checked_div(layer.channels).unwrap_or(0);
        let channel_bytes = values.saturating_mul(Dtype::F32.bytes()).max(layer.channel_bytes);
        Ok(Cut::new(layer.channels, channel_bytes, message_bytes_max))
    }

    fn blocks(_: &CodedLayer) -> bool {
        true
    }

    fn read(layer: &CodedLayer, _: Cut, channels: Range<u64>) -> Result<Row, Error> {
        let failed = |detail| Error::Source { layer: layer.name.to_string(), detail };
        let Source::There(read) = &layer.codes else { return Err(failed("it has no reader".to_owned())) };
        let range = channels.start * layer.channel_bytes..channels.end * layer.channel_bytes;
        let expected = range.end - range.start;
        let data = read(range).map_err(|error| failed(error.to_string()))?;
        if data.len() as u64 != expected {
            return Err(failed(format!("its reader gave {} bytes: expected {expected}", data.len())));
        }
        Ok(Row { scales: layer.scales_of(&channels), layer: layer.clone(), data, is_first: channels.start == 0 })
    }

    fn bytes(row: &Row) -> usize {
        row.data.len() + 4 * row.scales.len()
    }

    fn batch(&self, rows: Vec<Row>) -> Result<RecordBatch, Error> {
        let text = |of: fn(&Row) -> &str| Arc::new(StringArray::from_iter_values(rows.iter().map(of))) as ArrayRef;
        let columns: Vec<ArrayRef> = vec![
            text(|row| &row.layer.name),
            text(|_| status::QUANTIZED),
            Arc::new(binaries(rows.iter().map(|row| &row.data))?),
            scales(&rows)?,
            zero_points(&rows)?,
            extra_tensors(&rows)?,
            text(|row| row.layer.dtype.word()),
            Arc::new(shapes(rows.iter().map(|row| &*row.layer.shape))?),
            text(|row| &row.layer.scheme),
        ];
        RecordBatch::try_new(Arc::clone(&self.schema), columns).map_err(broken)
    }

    fn take(
        &self,
        batch: &RecordBatch,
        underway: &mut VecDeque<Underway<CodedLayer>>,
    ) -> Result<Vec<(DecodedRun, usize)>, Error> {
        let names = texts(batch, column::LAYER_NAME)?;
        let mut runs = Vec::with_capacity(batch.num_rows());
        for row in 0..batch.num_rows() {
            let unasked = || Error::Answer { detail: "a row came that was not sent".to_owned() };
            let front = underway.front_mut().ok_or_else(unasked)?;
            if names.value(row) != &*front.layer.name {
                return Err(unasked());
            }
            let (dtype, data) = self.values(batch, row)?;
            let elements = front.done..front.done + data.len() as u64 / dtype.bytes();
            front.done = elements.end;
            let is_last = product(&front.layer.shape) == Some(front.done);
            let (name, shape) = (Arc::clone(&front.layer.name), Arc::clone(&front.layer.shape));
            if is_last {
                underway.pop_front();
            }
            let bytes = data.len();
            runs.push((DecodedRun { name, shape, dtype, elements, is_last, data }, bytes));
        }
        Ok(runs)
    }
}

impl Dequantize {
    /// A row's values: a list of f32, or binary of the type that was asked for.
    fn values(&self, batch: &RecordBatch, row: usize) -> Result<(Dtype, Bytes), Error> {
        let missing = || Error::Answer { detail: format!("column `{}` holds no values", column::WEIGHTS) };
        match self.command.dtype.as_deref() {
            None | Some("f32") => {
                let lists: &LargeListArray = column(batch, column::WEIGHTS)?;
                let (values, range) = large_numbers::<Float32Type>(lists, row)?.ok_or_else(missing)?;
                let bytes = slice(values.values().inner(), 4 * range.start..4 * range.end);
                Ok((Dtype::F32, bytes))
            }
            Some(word) => {
                let dtype = word.parse().map_err(|_| missing())?;
                let values: &LargeBinaryArray = column(batch, column::WEIGHTS)?;
                Ok((dtype, binary(values, row).ok_or_else(missing)?))
            }
        }
    }
}

fn scales(rows: &[Row]) -> Result<ArrayRef, Error> {
    let values = rows.iter().flat_map(|row| &row.layer.scales[row.scales.clone()]).copied();
    let values = Float32Array::new(ScalarBuffer::from_iter(values), None);
    let offsets = OffsetBuffer::from_lengths(rows.iter().map(|row| row.scales.len()));
    Ok(Arc::new(ListArray::try_new(item(DataType::Float32), offsets, Arc::new(values), None).map_err(broken)?))
}

fn zero_points(rows: &[Row]) -> Result<ArrayRef, Error> {
    let of = |row: &Row| row.layer.zero_points.clone().map(|points| points[row.scales.clone()].to_vec());
    let points = Vec::from_iter(rows.iter().map(of));
    let nulls = NullBuffer::from_iter(points.iter().map(Option::is_some));
    let offsets = OffsetBuffer::from_lengths(points.iter().map(|points| points.as_ref().map_or(0, Vec::len)));
    let values = Int32Array::new(ScalarBuffer::from_iter(points.iter().flatten().flatten().copied()), None);
    let lists = ListArray::try_new(item(DataType::Int32), offsets, Arc::new(values), Some(nulls)).map_err(broken)?;
    Ok(Arc::new(lists))
}

fn extra_fields() -> Fields {
    Fields::from(vec![
        Field::new("name", DataType::Utf8, false),
        Field::new("dtype", DataType::Utf8, false),
        Field::new("shape", DataType::List(item(DataType::Int64)), false),
        Field::new("data", DataType::LargeBinary, false),
    ])
}

/// The global scale, on the first row of a layer that has one.
fn extra_tensors(rows: &[Row]) -> Result<ArrayRef, Error> {
    let globals = Vec::from_iter(rows.iter().map(|row| row.layer.global_scale.filter(|_| row.is_first)));
    let data = Vec::from_iter(globals.iter().flatten().map(|scale| Bytes::copy_from_slice(&scale.to_le_bytes())));
    let one: &[u64] = &[1];
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(data.iter().map(|_| tensor::WEIGHT_GLOBAL_SCALE))),
        Arc::new(StringArray::from_iter_values(data.iter().map(|_| Dtype::F32.word()))),
        Arc::new(shapes(data.iter().map(|_| one))?),
        Arc::new(binaries(data.iter())?),
    ];
    let tensors = StructArray::try_new(extra_fields(), columns, None).map_err(broken)?;
    let nulls = NullBuffer::from_iter(globals.iter().map(Option::is_some));
    let offsets = OffsetBuffer::from_lengths(globals.iter().map(|global| usize::from(global.is_some())));
    let item = item(DataType::Struct(extra_fields()));
    Ok(Arc::new(ListArray::try_new(item, offsets, Arc::new(tensors), Some(nulls)).map_err(broken)?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]

    use super::*;

    #[test]
    fn a_scale_goes_with_the_first_row_that_it_covers() {
        let layer = |channels, span, scales: u64| {
            let span = NonZeroU64::new(span).unwrap();
            let scales = vec![1.0; scales as usize];
            let read = |_| Ok(Bytes::new());
            CodedLayer::new("x", Dtype::F32, [channels, 8], "int8", (channels, 8), span, scales, None, read).unwrap()
        };
        let groups = layer(10, 1, 20);
        assert_eq!((groups.scales_of(&(0..3)), groups.scales_of(&(3..10))), (0..6, 6..20));
        let blocks = layer(300, 128, 6);
        assert_eq!((blocks.scales_of(&(0..128)), blocks.scales_of(&(128..300))), (0..2, 2..6));
        let tensor = layer(10, 10, 1);
        assert_eq!((tensor.scales_of(&(0..4)), tensor.scales_of(&(4..10))), (0..1, 1..1));
    }

    #[test]
    fn numbers_that_do_not_go_together_are_refused() {
        let of_scheme = |scheme: &str, scales: usize, points: Option<usize>| {
            let (scales, points) = (vec![1.0; scales], points.map(|points| vec![0; points]));
            CodedLayer::new("x", Dtype::F32, [10, 8], scheme, (10, 8), NonZeroU64::MIN, scales, points, |_| {
                Ok(Bytes::new())
            })
        };
        let of = |scales, points| of_scheme("int8", scales, points);
        assert!(of(10, Some(10)).is_ok());
        assert!(of(11, None).unwrap_err().to_string().contains("11 scales"));
        assert!(of(0, None).is_err());
        assert!(of_scheme("Q8_0", 0, None).is_ok() && of_scheme("Q8_0", 10, None).is_err());
        assert!(of(10, Some(9)).unwrap_err().to_string().contains("9 zero points"));
    }
}
