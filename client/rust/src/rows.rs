//! Rows of layers as batches: binary weights with their element type and full shape.

use std::sync::Arc;

use arrow_array::{ArrayRef, Int64Array, LargeBinaryArray, ListArray, RecordBatch, StringArray};
use arrow_buffer::{Buffer, OffsetBuffer, ScalarBuffer};
use arrow_schema::{DataType, Field, FieldRef, Schema, SchemaRef};
use bytes::Bytes;
use quarrel_proto::column;

use crate::{error::Error, layer::Layer};

/// One run of a layer.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) layer: Layer,
    pub(crate) data: Bytes,
}

pub(crate) fn layer_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new(column::LAYER_NAME, DataType::Utf8, false),
        Field::new(column::WEIGHTS, DataType::LargeBinary, false),
        Field::new(column::DTYPE, DataType::Utf8, false),
        Field::new(column::SHAPE, DataType::List(item(DataType::Int64)), false),
    ]))
}

pub(crate) fn item(data_type: DataType) -> FieldRef {
    Arc::new(Field::new_list_field(data_type, true))
}

pub(crate) fn layer_batch(schema: &SchemaRef, rows: &[Row]) -> Result<RecordBatch, Error> {
    let names = StringArray::from_iter_values(rows.iter().map(|row| row.layer.name()));
    let dtypes = StringArray::from_iter_values(rows.iter().map(|row| row.layer.dtype.word()));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(names),
        Arc::new(binaries(rows.iter().map(|row| &row.data))?),
        Arc::new(dtypes),
        Arc::new(shapes(rows.iter().map(|row| &*row.layer.shape))?),
    ];
    RecordBatch::try_new(Arc::clone(schema), columns).map_err(broken)
}

/// A column of bytes; those of a single row are not copied.
pub(crate) fn binaries<'a>(rows: impl ExactSizeIterator<Item = &'a Bytes> + Clone) -> Result<LargeBinaryArray, Error> {
    let lengths = rows.clone().map(Bytes::len);
    let offsets = OffsetBuffer::from_lengths(lengths);
    let mut rows = rows;
    let values = match (rows.len(), rows.next()) {
        (1, Some(only)) => Buffer::from(only.clone()),
        (_, first) => {
            let mut joined = Vec::new();
            first.into_iter().chain(rows).for_each(|row| joined.extend_from_slice(row));
            Buffer::from_vec(joined)
        }
    };
    LargeBinaryArray::try_new(offsets, values, None).map_err(broken)
}

pub(crate) fn shapes<'a>(rows: impl Iterator<Item = &'a [u64]> + Clone) -> Result<ListArray, Error> {
    let lengths = rows.clone().map(<[u64]>::len);
    // A dimension over 2^63 is beyond any layer; the server says so of -1 too.
    let dimensions = rows.flatten().map(|dimension| i64::try_from(*dimension).unwrap_or(-1));
    let values = Int64Array::new(ScalarBuffer::from_iter(dimensions), None);
    ListArray::try_new(item(DataType::Int64), OffsetBuffer::from_lengths(lengths), Arc::new(values), None)
        .map_err(broken)
}

pub(crate) fn broken(error: arrow_schema::ArrowError) -> Error {
    Error::Answer { detail: format!("a batch cannot be made: {error}") }
}
