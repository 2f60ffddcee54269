//! Columns of answers, by name and type; what is missing or of another type breaks the contract.

use std::ops::Range;

use arrow_array::{
    Array, ArrowPrimitiveType, GenericListArray, LargeBinaryArray, LargeListArray, ListArray, OffsetSizeTrait,
    PrimitiveArray, RecordBatch, StringArray, StructArray,
};
use arrow_buffer::Buffer;

use crate::error::Error;

/// An array, and where a row's values stand in it.
type Values<'a, P> = (&'a PrimitiveArray<P>, Range<usize>);

pub(crate) fn column<'a, T: 'static>(batch: &'a RecordBatch, name: &str) -> Result<&'a T, Error> {
    let found = batch.column_by_name(name).ok_or_else(|| missing(name))?;
    found
        .as_any()
        .downcast_ref()
        .ok_or_else(|| Error::Answer { detail: format!("column `{name}` is {}", found.data_type()) })
}

pub(crate) fn texts<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a StringArray, Error> {
    column(batch, name)
}

/// The text of a row, none where it is null.
pub(crate) fn text(texts: &StringArray, row: usize) -> Option<&str> {
    (!texts.is_null(row)).then(|| texts.value(row))
}

/// The bytes of a row, without copying; none where it is null.
pub(crate) fn binary(bytes: &LargeBinaryArray, row: usize) -> Option<bytes::Bytes> {
    if bytes.is_null(row) {
        return None;
    }
    let (start, end) = (bytes.value_offsets()[row] as usize, bytes.value_offsets()[row + 1] as usize);
    Some(slice(bytes.values(), start..end))
}

pub(crate) fn slice(buffer: &Buffer, range: Range<usize>) -> bytes::Bytes {
    buffer.slice_with_length(range.start, range.len()).into()
}

/// The numbers of a row of a list column, none where it is null.
pub(crate) fn numbers<P: ArrowPrimitiveType>(lists: &ListArray, row: usize) -> Result<Option<Vec<P::Native>>, Error> {
    let Some((values, range)) = list::<P, i32>(lists, row)? else { return Ok(None) };
    Ok(Some(values.values()[range].to_vec()))
}

/// The values of large lists, and where a row's stand in them.
pub(crate) fn large_numbers<P: ArrowPrimitiveType>(
    lists: &LargeListArray,
    row: usize,
) -> Result<Option<Values<'_, P>>, Error> {
    list::<P, i64>(lists, row)
}

fn list<P: ArrowPrimitiveType, O: OffsetSizeTrait>(
    lists: &GenericListArray<O>,
    row: usize,
) -> Result<Option<Values<'_, P>>, Error> {
    if lists.is_null(row) {
        return Ok(None);
    }
    let values = lists.values().as_any().downcast_ref().ok_or_else(|| missing("a list's items"))?;
    let offsets = lists.value_offsets();
    Ok(Some((values, offsets[row].as_usize()..offsets[row + 1].as_usize())))
}

/// A field of a struct column.
pub(crate) fn field<'a, T: 'static>(structs: &'a StructArray, name: &str) -> Result<&'a T, Error> {
    let found = structs.column_by_name(name).ok_or_else(|| missing(name))?;
    found.as_any().downcast_ref().ok_or_else(|| missing(name))
}

/// A number of a row, none where it is null.
pub(crate) fn number<P: ArrowPrimitiveType>(numbers: &PrimitiveArray<P>, row: usize) -> Option<P::Native> {
    (!numbers.is_null(row)).then(|| numbers.value(row))
}

fn missing(name: &str) -> Error {
    Error::Answer { detail: format!("column `{name}` is missing or of another type") }
}
