//! The engine's answers as rows. SPEC.md, section "Output", has the columns.

use std::sync::Arc;

use arrow_array::{
    Array, ArrayRef, Int64Array, ListArray, RecordBatch, StructArray,
    cast::AsArray,
    types::{Float32Type, Float64Type, Int32Type, Int64Type, UInt64Type},
};
use arrow_buffer::OffsetBuffer;
use arrow_schema::{DataType, Field, FieldRef};
use bytes::Bytes;
use quarrel_proto::column::{self, status, tensor};
use safetensors::Dtype;

use crate::{
    error::CheckpointError,
    fate::dtype_of,
    report::{Metrics, Status},
    unit::{Nested, Outcome, Row},
};

/// What a run's answer must say beside its numbers.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) name: String,
    pub(crate) begins: bool,
    pub(crate) completes: bool,
    pub(crate) done: u64,
}

/// A row for each of a batch, which is of the next runs that were asked for.
pub(crate) fn rows(batch: &RecordBatch, asked: &mut impl Iterator<Item = Asked>) -> Result<Vec<Row>, CheckpointError> {
    (0..batch.num_rows()).map(|row| one(batch, row, asked)).collect()
}

pub(crate) fn one(
    batch: &RecordBatch,
    row: usize,
    asked: &mut impl Iterator<Item = Asked>,
) -> Result<Row, CheckpointError> {
    let unasked = || CheckpointError::Ours("a row was answered and not sent".to_owned());
    let Asked { name, begins, completes, done } = asked.next().ok_or_else(unasked)?;
    if text(batch, column::LAYER_NAME, row)? != name {
        return Err(unasked());
    }
    let not = |status| {
        let (reason, message) = (text(batch, column::REASON, row)?, text(batch, column::MESSAGE, row)?);
        let weights = extra_tensor(of(batch, column::EXTRA_TENSORS)?, row, tensor::WEIGHT)?;
        Ok::<_, CheckpointError>(Outcome::Not { status, reason, message, weights })
    };
    let outcome = match text(batch, column::STATUS, row)?.as_str() {
        status::QUANTIZED => codes(batch, row)?,
        status::KEPT => not(Status::Kept)?,
        _ => not(Status::Failed)?,
    };
    Ok(Row { name, begins, completes, done, outcome, metrics: metrics(batch, row)? })
}

fn codes(batch: &RecordBatch, row: usize) -> Result<Outcome, CheckpointError> {
    let scales = of(batch, column::SCALES)?.as_list::<i32>().value(row);
    let zero_points = of(batch, column::ZERO_POINTS)?.as_list::<i32>();
    let points = || zero_points.value(row).as_primitive::<Int32Type>().values().to_vec();
    let extra = |name| extra_tensor(of(batch, column::EXTRA_TENSORS)?, row, name);
    let number =
        |name| Ok::<_, CheckpointError>(extra(name)?.and_then(|bytes| Some(f32::from_le_bytes(*bytes.first_chunk()?))));
    Ok(Outcome::Quantized {
        data: bytes(of(batch, column::QUANTIZED_DATA)?, row),
        scales: scales.as_primitive::<Float32Type>().values().to_vec(),
        zero_points: zero_points.is_valid(row).then(points),
        global_scale: number(tensor::WEIGHT_GLOBAL_SCALE)?,
        nested: match (extra(tensor::ABSMAX)?, extra(tensor::NESTED_ABSMAX)?, number(tensor::NESTED_OFFSET)?) {
            (Some(absmax), Some(nested_absmax), Some(offset)) => Some(Nested { absmax, nested_absmax, offset }),
            _ => None,
        },
        scheme: text(batch, column::SCHEME, row)?,
    })
}

/// The bytes of a tensor beside the codes.
fn extra_tensor(extra: &ArrayRef, row: usize, name: &str) -> Result<Option<Bytes>, CheckpointError> {
    if extra.is_null(row) {
        return Ok(None);
    }
    let lists = extra.as_list::<i32>();
    let tensors = lists.values().as_struct();
    let (names, data) = (field(tensors, "name")?.as_string::<i32>(), field(tensors, "data")?);
    let mut range = lists.value_offsets()[row] as usize..lists.value_offsets()[row + 1] as usize;
    Ok(range.find(|at| names.value(*at) == name).map(|at| bytes(data, at)))
}

fn metrics(batch: &RecordBatch, row: usize) -> Result<Option<Metrics>, CheckpointError> {
    let found = of(batch, column::LAYER_METRICS)?.as_struct();
    if found.is_null(row) {
        return Ok(None);
    }
    let count = |name| Ok::<_, CheckpointError>(field(found, name)?.as_primitive::<UInt64Type>().value(row));
    let number = |name| {
        let numbers = field(found, name)?.as_primitive::<Float64Type>();
        Ok::<_, CheckpointError>(numbers.is_valid(row).then(|| numbers.value(row)))
    };
    Ok(Some(Metrics {
        elements: count("elements")?,
        mse: number("mse")?,
        sqnr_db: number("sqnr_db")?,
        cosine: number("cosine")?,
        max_abs_error: number("max_abs_error")?,
        amax: number("amax")?,
        saturated: count("saturated")?,
        bits_per_weight: number("bits_per_weight")?,
    }))
}

/// Bytes of a large_binary row, which stay where they are.
pub(crate) fn bytes(array: &ArrayRef, row: usize) -> Bytes {
    let binary = array.as_binary::<i64>();
    let (start, end) = (binary.value_offsets()[row] as usize, binary.value_offsets()[row + 1] as usize);
    binary.values().slice_with_length(start, end - start).into()
}

/// A text; empty where it is null.
pub(crate) fn text(batch: &RecordBatch, name: &str, row: usize) -> Result<String, CheckpointError> {
    let texts = of(batch, name)?.as_string::<i32>();
    Ok(if texts.is_valid(row) { texts.value(row).to_owned() } else { String::new() })
}

/// The type of a row's weights.
pub(crate) fn dtype(batch: &RecordBatch, row: usize) -> Result<Dtype, CheckpointError> {
    Ok(dtype_of(&text(batch, column::DTYPE, row)?))
}

/// The shape of a row's layer.
pub(crate) fn shape(batch: &RecordBatch, row: usize) -> Result<Vec<u64>, CheckpointError> {
    let shape = of(batch, column::SHAPE)?.as_list::<i32>().value(row);
    Ok(shape.as_primitive::<Int64Type>().values().iter().map(|dimension| *dimension as u64).collect())
}

pub(crate) fn of<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef, CheckpointError> {
    batch.column_by_name(name).ok_or_else(|| missing(name))
}

fn field<'a>(structs: &'a StructArray, name: &str) -> Result<&'a ArrayRef, CheckpointError> {
    structs.column_by_name(name).ok_or_else(|| missing(name))
}

fn missing(name: &str) -> CheckpointError {
    CheckpointError::Ours(format!("the engine's answer has no `{name}`"))
}

/// The item of a list, as every Arrow implementation names it.
pub(crate) fn item(data_type: DataType) -> FieldRef {
    Arc::new(Field::new_list_field(data_type, true))
}

/// A column `shape` of one row.
pub(crate) fn shapes(shape: &[u64]) -> Result<ArrayRef, CheckpointError> {
    let numbers = Int64Array::from_iter_values(shape.iter().map(|dimension| *dimension as i64));
    let lists =
        ListArray::try_new(item(DataType::Int64), OffsetBuffer::from_lengths([shape.len()]), Arc::new(numbers), None);
    Ok(Arc::new(lists.map_err(|error| CheckpointError::Ours(error.to_string()))?))
}
