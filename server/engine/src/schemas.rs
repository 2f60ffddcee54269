//! The schemas of answers. Names and meanings: `proto/SPEC.md`, section "Output".

use std::sync::{Arc, LazyLock};

use arrow_schema::{DataType, Field, FieldRef, Fields, Schema};
use quarrel_kernels::Decoded;
use quarrel_proto::column;

/// The columns that `quantize` answers.
pub fn quantized_schema() -> Schema {
    Schema::new(vec![
        Field::new(column::LAYER_NAME, DataType::Utf8, false),
        Field::new(column::STATUS, DataType::Utf8, false),
        Field::new(column::REASON, DataType::Utf8, true),
        Field::new(column::MESSAGE, DataType::Utf8, true),
        Field::new(column::QUANTIZED_DATA, DataType::LargeBinary, true),
        Field::new(column::SCALES, DataType::List(item(DataType::Float32)), true),
        Field::new(column::ZERO_POINTS, DataType::List(item(DataType::Int32)), true),
        Field::new(column::EXTRA_TENSORS, DataType::List(item(DataType::Struct(extra_tensor_fields()))), true),
        Field::new(column::DTYPE, DataType::Utf8, false),
        Field::new(column::SHAPE, DataType::List(item(DataType::Int64)), false),
        Field::new(column::SCHEME, DataType::Utf8, true),
        Field::new(column::BIT_WIDTH, DataType::UInt8, true),
        Field::new(column::METRICS, DataType::Struct(metrics_fields()), true),
        Field::new(column::LAYER_METRICS, DataType::Struct(metrics_fields()), true),
        Field::new(column::CHECKSUM, DataType::UInt32, true),
    ])
}

/// The columns that `dequantize` answers.
pub fn dequantized_schema(decoded: Decoded) -> Schema {
    let weights = match decoded {
        Decoded::F32 => Field::new(column::WEIGHTS, DataType::LargeList(item(DataType::Float32)), false),
        Decoded::Bf16 | Decoded::F16 => Field::new(column::WEIGHTS, DataType::LargeBinary, false),
    };
    let mut fields = vec![Field::new(column::LAYER_NAME, DataType::Utf8, false), weights];
    if decoded != Decoded::F32 {
        fields.push(Field::new(column::DTYPE, DataType::Utf8, false));
    }
    fields.push(Field::new(column::SHAPE, DataType::List(item(DataType::Int64)), false));
    Schema::new(fields)
}

/// The item of a list, as every Arrow implementation names it.
pub(crate) fn item(data_type: DataType) -> FieldRef {
    Arc::new(Field::new_list_field(data_type, true))
}

// Of every batch: made once.
static EXTRA_TENSORS: LazyLock<Fields> = LazyLock::new(|| {
    Fields::from(vec![
        Field::new("name", DataType::Utf8, false),
        Field::new("dtype", DataType::Utf8, false),
        Field::new("shape", DataType::List(item(DataType::Int64)), false),
        Field::new("data", DataType::LargeBinary, false),
    ])
});
static METRICS: LazyLock<Fields> = LazyLock::new(|| {
    Fields::from(vec![
        Field::new("elements", DataType::UInt64, false),
        Field::new("mse", DataType::Float64, true),
        Field::new("sqnr_db", DataType::Float64, true),
        Field::new("cosine", DataType::Float64, true),
        Field::new("max_abs_error", DataType::Float64, true),
        Field::new("amax", DataType::Float64, true),
        Field::new("saturated", DataType::UInt64, false),
        Field::new("bits_per_weight", DataType::Float64, true),
    ])
});

pub(crate) fn extra_tensor_fields() -> Fields {
    EXTRA_TENSORS.clone()
}

pub(crate) fn metrics_fields() -> Fields {
    METRICS.clone()
}
