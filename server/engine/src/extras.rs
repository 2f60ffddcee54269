//! What a row carries beside codes and scales: the column `extra_tensors`.

use std::sync::Arc;

use arrow_array::{ArrayRef, LargeBinaryArray, ListArray, StringArray, StructArray};
use arrow_buffer::{Buffer, NullBuffer, OffsetBuffer};
use arrow_schema::DataType;
use quarrel_kernels::Dtype;
use quarrel_proto::column::tensor;

use crate::{
    answer::{Line, Status, shapes},
    rows::Row,
    schemas,
};

/// What a row carries beside codes and scales: a kept row its weights, where they were asked for, as `weight`; a layer's
/// first row the number that its scales are divided by, as `weight_global_scale`, or its scales as they are stored where they are quantized too.
pub(crate) fn extra_tensors(lines: &[Line<'_>]) -> ListArray {
    let extras = Vec::from_iter(lines.iter().map(extras_of));
    let tensors: Vec<&Extra> = extras.iter().flatten().collect();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(tensors.iter().map(|extra| extra.name))),
        Arc::new(StringArray::from_iter_values(tensors.iter().map(|extra| extra.dtype))),
        Arc::new(shapes(tensors.iter().map(|extra| extra.shape.as_slice()))),
        Arc::new(LargeBinaryArray::from_iter_values(tensors.iter().map(|extra| extra.data.as_slice()))),
    ];
    let fields = schemas::extra_tensor_fields();
    let values = StructArray::try_new(fields.clone(), columns, None).expect("columns follow `extra_tensor_fields`");
    ListArray::new(
        schemas::item(DataType::Struct(fields)),
        OffsetBuffer::from_lengths(extras.iter().map(Vec::len)),
        Arc::new(values),
        Some(NullBuffer::from_iter(extras.iter().map(|extras| !extras.is_empty()))),
    )
}

fn extras_of(line: &Line<'_>) -> Vec<Extra> {
    let numbers = |name, numbers: &[f32]| Extra {
        name,
        dtype: Dtype::F32.name(),
        shape: vec![numbers.len() as i64],
        data: Buffer::from_vec(numbers.to_vec()),
    };
    match (&line.status, &line.row.kept) {
        (Status::Kept(_), Some(data)) => vec![Extra {
            name: tensor::WEIGHT,
            dtype: line.row.layer.dtype.name(),
            shape: run_shape(line.row, data.len()),
            data: data.clone(),
        }],
        (Status::Quantized(_), _) => {
            let global = line.global.map(|global| numbers(tensor::WEIGHT_GLOBAL_SCALE, &[global]));
            let nested = line.nested.map(|nested| {
                let bytes = Extra {
                    name: tensor::ABSMAX,
                    dtype: BYTES,
                    shape: vec![nested.codes.len() as i64],
                    data: Buffer::from_slice_ref(&nested.codes),
                };
                let (absmax, offset) = (tensor::NESTED_ABSMAX, tensor::NESTED_OFFSET);
                [bytes, numbers(absmax, &nested.absmax), numbers(offset, &[nested.offset])]
            });
            global.into_iter().chain(nested.into_iter().flatten()).collect()
        }
        (Status::Kept(_) | Status::Failed(_), _) => Vec::new(),
    }
}

/// The type of bytes that are no numbers of weights.
const BYTES: &str = "u8";

/// One tensor of `extra_tensors`.
struct Extra {
    name: &'static str,
    dtype: &'static str,
    shape: Vec<i64>,
    data: Buffer,
}

/// The shape of one run: the layer's, with as many slices of the first dimension as the run holds; flat where it cuts
/// deeper than that.
fn run_shape(row: &Row, bytes: usize) -> Vec<i64> {
    let elements = bytes / row.layer.dtype.bytes();
    let dims = row.layer.shape.dims();
    match dims {
        [_, rest @ ..] if elements != row.layer.shape.elements() => {
            let slice: i64 = rest.iter().product();
            match slice {
                1.. if (elements as i64) % slice == 0 => [&[elements as i64 / slice], rest].concat(),
                _ => vec![elements as i64],
            }
        }
        _ => dims.to_vec(),
    }
}
