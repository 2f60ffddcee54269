//! Columns of an input batch: which there are, of what types, and their values row by row.
//!
//! A schema is checked once, when it comes; rows are then read without further questions of type.

use std::sync::Arc;

use arrow_array::{
    Array, ArrayRef, RecordBatch,
    cast::AsArray,
    types::{Float16Type, Float32Type, Float64Type, Int64Type},
};
use arrow_buffer::{ArrowNativeType, Buffer, NullBuffer};
use arrow_schema::{DataType, Field, Schema};
use quarrel_kernels::Dtype;
use quarrel_proto::{Reason, column};

use crate::shape::Shape;

/// A schema that the contract does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ColumnError {
    /// The contract's word.
    pub reason: Reason,
    message: String,
}

impl ColumnError {
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Self {
        ColumnError { reason, message: message.into() }
    }
}

/// Where the columns of `quantize` stand.
#[derive(Debug, Clone)]
pub(crate) struct WeightColumns {
    name: usize,
    weights: usize,
    /// The element type of lists; binary weights say theirs row by row.
    list_dtype: Option<Dtype>,
    dtype: Option<usize>,
    shape: Option<usize>,
    importance: Option<usize>,
    /// The shape of a `fixed_shape_tensor`: the whole shape of each row that says no other.
    tensor_shape: Option<Shape>,
}

impl WeightColumns {
    /// Finds them.
    pub(crate) fn of(schema: &Schema) -> Result<WeightColumns, ColumnError> {
        let known = [column::LAYER_NAME, column::WEIGHTS, column::DTYPE, column::SHAPE, column::IMPORTANCE];
        let [name, weights, dtype, shape, importance] = places(schema, known)?;
        let name = required(name, column::LAYER_NAME)?;
        let weights = required(weights, column::WEIGHTS)?;
        check(schema.field(name), is_text, "utf8, large_utf8, utf8_view or a dictionary of these")?;
        check(
            schema.field(weights),
            is_weights,
            "a list, large_list or fixed_size_list of f16, f32 or f64, or binary",
        )?;
        if let Some(at) = dtype {
            check(schema.field(at), is_text, "utf8")?;
        } else if matches!(schema.field(weights).data_type(), DataType::Binary | DataType::LargeBinary) {
            return Err(ColumnError::new(
                Reason::ColumnMissing,
                "column `dtype` is missing: binary weights need it, with one of f32, f16, bf16, f64, f8_e4m3, f8_e5m2",
            ));
        }
        if let Some(at) = shape {
            check(schema.field(at), is_shape, "a list of int64")?;
        }
        if let Some(at) = importance {
            let is_f32 = |data_type: &DataType| list_dtype(data_type) == Some(Dtype::F32);
            check(schema.field(at), is_f32, "a list of float32")?;
        }
        let tensor_shape = tensor_shape(schema.field(weights))?;
        let list_dtype = list_dtype(schema.field(weights).data_type());
        Ok(WeightColumns { name, weights, list_dtype, dtype, shape, importance, tensor_shape })
    }

    /// The columns of one batch.
    pub(crate) fn read(&self, batch: &RecordBatch) -> Result<WeightRows, ColumnError> {
        Ok(WeightRows {
            rows: batch.num_rows(),
            names: Texts::new(batch.column(self.name))?,
            weights: Weights::new(batch.column(self.weights), self.list_dtype),
            dtypes: self.dtype.map(|at| Texts::new(batch.column(at))).transpose()?,
            shapes: self.shape.map(|at| Lists::new(batch.column(at))),
            importance: self.importance.map(|at| Lists::new(batch.column(at))),
            tensor_shape: self.tensor_shape.clone(),
        })
    }
}

/// The rows of one batch of weights.
#[derive(Debug)]
pub(crate) struct WeightRows {
    pub(crate) rows: usize,
    pub(crate) names: Texts,
    pub(crate) weights: Weights,
    pub(crate) dtypes: Option<Texts>,
    pub(crate) shapes: Option<Lists>,
    pub(crate) importance: Option<Lists>,
    pub(crate) tensor_shape: Option<Shape>,
}

/// The index of each known column, in their order; an unknown or doubled one is an error.
pub(crate) fn places<const N: usize>(schema: &Schema, known: [&str; N]) -> Result<[Option<usize>; N], ColumnError> {
    let mut places = [None; N];
    for (at, field) in schema.fields().iter().enumerate() {
        match known.iter().position(|name| name == field.name()) {
            Some(place) if places[place].is_none() => places[place] = Some(at),
            Some(_) => {
                let message = format!("column `{}` stands twice", field.name());
                return Err(ColumnError::new(Reason::ColumnUnexpected, message));
            }
            None => {
                let name = crate::shorten(field.name(), 200);
                let message = format!("column `{name}` is not known here: expected {}", known.join(", "));
                return Err(ColumnError::new(Reason::ColumnUnexpected, message));
            }
        }
    }
    Ok(places)
}

pub(crate) fn required(place: Option<usize>, name: &str) -> Result<usize, ColumnError> {
    place.ok_or_else(|| ColumnError::new(Reason::ColumnMissing, format!("column `{name}` is missing")))
}

pub(crate) fn check(field: &Field, allowed: fn(&DataType) -> bool, expected: &str) -> Result<(), ColumnError> {
    match allowed(field.data_type()) {
        true => Ok(()),
        false => Err(ColumnError::new(
            Reason::ColumnType,
            format!(
                "column `{}` is {}: expected {expected}",
                field.name(),
                crate::shorten(&field.data_type().to_string(), 200)
            ),
        )),
    }
}

pub(crate) fn is_text(data_type: &DataType) -> bool {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Dictionary(_, values) => {
            matches!(**values, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View)
        }
        _ => false,
    }
}

fn is_weights(data_type: &DataType) -> bool {
    list_dtype(data_type).is_some() || matches!(data_type, DataType::Binary | DataType::LargeBinary)
}

/// The element type of lists of floats.
fn list_dtype(data_type: &DataType) -> Option<Dtype> {
    match data_type {
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => match item.data_type() {
            DataType::Float16 => Some(Dtype::F16),
            DataType::Float32 => Some(Dtype::F32),
            DataType::Float64 => Some(Dtype::F64),
            _ => None,
        },
        _ => None,
    }
}

pub(crate) fn is_shape(data_type: &DataType) -> bool {
    match data_type {
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            *item.data_type() == DataType::Int64
        }
        _ => false,
    }
}

/// The shape that the extension type `arrow.fixed_shape_tensor` gives each row.
fn tensor_shape(field: &Field) -> Result<Option<Shape>, ColumnError> {
    if field.extension_type_name() != Some("arrow.fixed_shape_tensor") {
        return Ok(None);
    }
    let bad = |what: &str| {
        ColumnError::new(
            Reason::ColumnType,
            format!("column `{}` is no arrow.fixed_shape_tensor: {what}", field.name()),
        )
    };
    let text = field.extension_type_metadata().ok_or_else(|| bad("it has no metadata"))?;
    let metadata: TensorMetadata = serde_json::from_str(text).map_err(|error| bad(&error.to_string()))?;
    if metadata.permutation.is_some_and(|permutation| !permutation.iter().copied().eq(0..permutation.len())) {
        return Err(ColumnError::new(
            Reason::Permuted,
            format!("column `{}` has a permuted tensor type: expected row-major elements", field.name()),
        ));
    }
    let shape = Shape::new(metadata.shape).map_err(|what| bad(&what))?;
    match field.data_type() {
        DataType::FixedSizeList(_, size) if *size as usize == shape.elements() => Ok(Some(shape)),
        _ => Err(bad("its shape does not multiply out to its list size")),
    }
}

#[derive(serde::Deserialize)]
struct TensorMetadata {
    shape: Vec<i64>,
    permutation: Option<Vec<usize>>,
}

/// A column of strings, dictionary or not.
#[derive(Debug)]
pub(crate) struct Texts {
    values: ArrayRef,
    /// The place in `values` of each row of a dictionary.
    keys: Option<Vec<Option<usize>>>,
}

impl Texts {
    pub(crate) fn new(array: &ArrayRef) -> Result<Texts, ColumnError> {
        let Some(dictionary) = array.as_any_dictionary_opt() else {
            return Ok(Texts { values: Arc::clone(array), keys: None });
        };
        let values = dictionary.values();
        let places = if values.is_empty() { vec![0; array.len()] } else { dictionary.normalized_keys() };
        let keys: Vec<Option<usize>> =
            places.into_iter().enumerate().map(|(row, key)| array.is_valid(row).then_some(key)).collect();
        if keys.iter().flatten().any(|key| *key >= values.len()) {
            return Err(ColumnError::new(Reason::FrameInvalid, "a dictionary key points beyond its dictionary"));
        }
        Ok(Texts { values: Arc::clone(values), keys: Some(keys) })
    }

    /// The string of a row, unless it is null.
    pub(crate) fn get(&self, row: usize) -> Option<&str> {
        let row = match &self.keys {
            Some(keys) => keys[row]?,
            None => row,
        };
        if self.values.is_null(row) {
            return None;
        }
        match self.values.data_type() {
            DataType::Utf8 => Some(self.values.as_string::<i32>().value(row)),
            DataType::LargeUtf8 => Some(self.values.as_string::<i64>().value(row)),
            DataType::Utf8View => Some(self.values.as_string_view().value(row)),
            _ => unreachable!("`is_text` was asked"),
        }
    }
}

/// A column of lists, of whatever values.
#[derive(Debug)]
pub(crate) struct Lists {
    nulls: Option<NullBuffer>,
    bounds: Bounds,
    pub(crate) values: ArrayRef,
}

#[derive(Debug)]
enum Bounds {
    Small(arrow_buffer::OffsetBuffer<i32>),
    Large(arrow_buffer::OffsetBuffer<i64>),
    Fixed(usize),
}

impl Lists {
    pub(crate) fn new(array: &ArrayRef) -> Lists {
        let nulls = array.nulls().cloned();
        let (bounds, values) = match array.data_type() {
            DataType::List(_) => {
                let list = array.as_list::<i32>();
                (Bounds::Small(list.offsets().clone()), list.values())
            }
            DataType::LargeList(_) => {
                let list = array.as_list::<i64>();
                (Bounds::Large(list.offsets().clone()), list.values())
            }
            DataType::FixedSizeList(..) => {
                let list = array.as_fixed_size_list();
                (Bounds::Fixed(list.value_length() as usize), list.values())
            }
            _ => unreachable!("the column's type was checked"),
        };
        Lists { nulls, bounds, values: Arc::clone(values) }
    }

    /// Where a row's elements stand in `values`, unless the row is null.
    pub(crate) fn range(&self, row: usize) -> Option<std::ops::Range<usize>> {
        if self.nulls.as_ref().is_some_and(|nulls| nulls.is_null(row)) {
            return None;
        }
        Some(match &self.bounds {
            Bounds::Small(offsets) => offsets[row].as_usize()..offsets[row + 1].as_usize(),
            Bounds::Large(offsets) => offsets[row].as_usize()..offsets[row + 1].as_usize(),
            Bounds::Fixed(size) => row * size..(row + 1) * size,
        })
    }

    /// A row's elements as dimensions; `Err` where one of them is null.
    pub(crate) fn dims(&self, row: usize) -> Option<Result<Vec<i64>, String>> {
        let range = self.range(row)?;
        let values = self.values.as_primitive::<Int64Type>();
        if let Some(at) = range.clone().position(|index| values.is_null(index)) {
            return Some(Err(format!("dimension {at} is null")));
        }
        Some(Ok(values.values()[range].to_vec()))
    }
}

/// The weights column.
#[derive(Debug)]
pub(crate) enum Weights {
    /// Floats in lists.
    Lists {
        /// Where each row's elements stand.
        lists: Lists,
        /// Their type.
        dtype: Dtype,
        /// Their bytes.
        bytes: Buffer,
    },
    /// Bytes, whose type stands in the column `dtype`.
    Binary(ArrayRef),
}

/// Why a row has no elements to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoWeights {
    /// The row is null.
    Row,
    /// So is an element, counted from the row's start.
    Element(usize),
}

impl Weights {
    fn new(array: &ArrayRef, list_dtype: Option<Dtype>) -> Weights {
        let Some(dtype) = list_dtype else { return Weights::Binary(Arc::clone(array)) };
        let lists = Lists::new(array);
        let bytes = match lists.values.data_type() {
            DataType::Float16 => lists.values.as_primitive::<Float16Type>().values().inner().clone(),
            DataType::Float32 => lists.values.as_primitive::<Float32Type>().values().inner().clone(),
            _ => lists.values.as_primitive::<Float64Type>().values().inner().clone(),
        };
        Weights::Lists { lists, dtype, bytes }
    }

    /// The element type, if the column's own type says it.
    pub(crate) fn dtype(&self) -> Option<Dtype> {
        match self {
            Weights::Lists { dtype, .. } => Some(*dtype),
            Weights::Binary(_) => None,
        }
    }

    /// A row's elements: little-endian bytes, shared with the batch.
    pub(crate) fn bytes(&self, row: usize) -> Result<Buffer, NoWeights> {
        match self {
            Weights::Lists { lists, dtype, bytes } => {
                let range = lists.range(row).ok_or(NoWeights::Row)?;
                if let Some(nulls) = lists.values.nulls().filter(|nulls| nulls.null_count() > 0)
                    && let Some(at) = range.clone().position(|index| nulls.is_null(index))
                {
                    return Err(NoWeights::Element(at));
                }
                Ok(bytes.slice_with_length(range.start * dtype.bytes(), range.len() * dtype.bytes()))
            }
            Weights::Binary(array) if array.is_null(row) => Err(NoWeights::Row),
            Weights::Binary(array) => Ok(binary_row(array, row)),
        }
    }
}

/// The bytes of a row of a binary or large_binary column, shared with the batch.
pub(crate) fn binary_row(array: &ArrayRef, row: usize) -> Buffer {
    let (values, start, end) = match array.data_type() {
        DataType::Binary => {
            let binary = array.as_binary::<i32>();
            (binary.values(), binary.value_offsets()[row].as_usize(), binary.value_offsets()[row + 1].as_usize())
        }
        _ => {
            let binary = array.as_binary::<i64>();
            (binary.values(), binary.value_offsets()[row].as_usize(), binary.value_offsets()[row + 1].as_usize())
        }
    };
    values.slice_with_length(start, end - start)
}
