//! Columns of an input batch of `dequantize`: which there are, of what types, and their values row by row.

use std::{ops::Range, sync::Arc};

use arrow_array::{Array, ArrayRef, RecordBatch, cast::AsArray};
use arrow_buffer::Buffer;
use arrow_schema::{DataType, FieldRef, Schema};
use quarrel_proto::column;

use crate::arrow_in::{ColumnError, Lists, Texts, binary_row, check, is_shape, is_text, places, required};

/// Where the columns of `dequantize` stand.
#[derive(Debug)]
pub(crate) struct CodedColumns {
    name: usize,
    status: usize,
    data: usize,
    scales: usize,
    zero_points: Option<usize>,
    extra: Option<usize>,
    dtype: usize,
    shape: usize,
    scheme: usize,
    checksum: Option<usize>,
}

/// The rows of one batch of codes.
#[derive(Debug)]
pub(crate) struct CodedBatch {
    pub(crate) rows: usize,
    pub(crate) names: Texts,
    pub(crate) statuses: Texts,
    pub(crate) data: ArrayRef,
    pub(crate) scales: Lists,
    pub(crate) zero_points: Option<Lists>,
    pub(crate) extra: Option<ArrayRef>,
    pub(crate) dtypes: Texts,
    pub(crate) shapes: Lists,
    pub(crate) schemes: Texts,
    pub(crate) checksums: Option<ArrayRef>,
}

impl CodedColumns {
    /// Finds them.
    pub(crate) fn of(schema: &Schema) -> Result<CodedColumns, ColumnError> {
        let known = [
            column::LAYER_NAME,
            column::STATUS,
            column::REASON,
            column::MESSAGE,
            column::QUANTIZED_DATA,
            column::SCALES,
            column::ZERO_POINTS,
            column::EXTRA_TENSORS,
            column::DTYPE,
            column::SHAPE,
            column::SCHEME,
            column::BIT_WIDTH,
            column::METRICS,
            column::LAYER_METRICS,
            column::CHECKSUM,
        ];
        let at = places(schema, known)?;
        let place = |name: &str| known.iter().position(|known| *known == name).and_then(|index| at[index]);
        let text = |name| {
            let at = required(place(name), name)?;
            check(schema.field(at), is_text, "utf8")?;
            Ok::<_, ColumnError>(at)
        };
        let typed = |name, allowed: fn(&DataType) -> bool, expected| {
            let at = required(place(name), name)?;
            check(schema.field(at), allowed, expected)?;
            Ok::<_, ColumnError>(at)
        };
        let optional = |name, allowed: fn(&DataType) -> bool, expected| match place(name) {
            Some(_) => typed(name, allowed, expected).map(Some),
            None => Ok(None),
        };
        // What is not read has a known type too: none may cost more than its bytes to check.
        for unread in [column::REASON, column::MESSAGE] {
            optional(unread, |t| is_text(t) || t.is_null(), "utf8")?;
        }
        optional(column::BIT_WIDTH, |t| t.is_integer() || t.is_null(), "uint8")?;
        for unread in [column::METRICS, column::LAYER_METRICS] {
            optional(unread, |t| is_numbers(t) || t.is_null(), "a struct of numbers")?;
        }
        Ok(CodedColumns {
            name: text(column::LAYER_NAME)?,
            status: text(column::STATUS)?,
            data: typed(column::QUANTIZED_DATA, is_binary, "large_binary")?,
            scales: typed(column::SCALES, |t| is_list_of(t, &DataType::Float32), "a list of float32")?,
            zero_points: optional(column::ZERO_POINTS, |t| is_list_of(t, &DataType::Int32), "a list of int32")?,
            extra: optional(column::EXTRA_TENSORS, is_tensors, "a list of struct of name, dtype, shape, data")?,
            dtype: text(column::DTYPE)?,
            shape: typed(column::SHAPE, is_shape, "a list of int64")?,
            scheme: text(column::SCHEME)?,
            checksum: optional(column::CHECKSUM, |t| *t == DataType::UInt32, "uint32")?,
        })
    }

    /// The columns of one batch.
    pub(crate) fn read(&self, batch: &RecordBatch) -> Result<CodedBatch, ColumnError> {
        Ok(CodedBatch {
            rows: batch.num_rows(),
            names: Texts::new(batch.column(self.name))?,
            statuses: Texts::new(batch.column(self.status))?,
            data: Arc::clone(batch.column(self.data)),
            scales: Lists::new(batch.column(self.scales)),
            zero_points: self.zero_points.map(|at| Lists::new(batch.column(at))),
            extra: self.extra.map(|at| Arc::clone(batch.column(at))),
            dtypes: Texts::new(batch.column(self.dtype))?,
            shapes: Lists::new(batch.column(self.shape)),
            schemes: Texts::new(batch.column(self.scheme))?,
            checksums: self.checksum.map(|at| Arc::clone(batch.column(at))),
        })
    }
}

/// A row's numbers; none where the row is null.
pub(crate) fn numbers<T>(lists: &Lists, at: usize, read: impl Fn(&ArrayRef, Range<usize>) -> Vec<T>) -> Vec<T> {
    lists.range(at).map_or_else(Vec::new, |range| read(&lists.values, range))
}

/// The tensor of that name among a row's extra tensors.
pub(crate) fn extra_tensor(extra: &ArrayRef, at: usize, name: &str) -> Option<Buffer> {
    let lists = Lists::new(extra);
    let tensors = lists.values.as_struct();
    let names = Texts::new(tensors.column_by_name("name")?).ok()?;
    let data = tensors.column_by_name("data")?;
    let index = lists.range(at)?.find(|index| names.get(*index) == Some(name))?;
    (!data.is_null(index)).then(|| binary_row(data, index))
}

fn is_binary(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Binary | DataType::LargeBinary)
}

fn is_list_of(data_type: &DataType, item: &DataType) -> bool {
    match data_type {
        DataType::List(field) | DataType::LargeList(field) | DataType::FixedSizeList(field, _) => {
            field.data_type() == item
        }
        _ => false,
    }
}

fn is_numbers(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Struct(fields) if fields.iter().all(|field| field.data_type().is_numeric()))
}

fn is_tensors(data_type: &DataType) -> bool {
    let (DataType::List(field) | DataType::LargeList(field)) = data_type else { return false };
    let DataType::Struct(fields) = field.data_type() else { return false };
    let is_plain_text = |t: &DataType| matches!(t, DataType::Utf8 | DataType::LargeUtf8);
    let is_known = |field: &FieldRef| match field.name().as_str() {
        "name" | "dtype" => is_plain_text(field.data_type()),
        "shape" => is_shape(field.data_type()),
        "data" => is_binary(field.data_type()),
        _ => false,
    };
    fields.iter().all(is_known) && ["name", "dtype", "data"].iter().all(|name| fields.find(name).is_some())
}
