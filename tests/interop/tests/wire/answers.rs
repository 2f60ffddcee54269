//! What must come back.

use std::collections::BTreeMap;

use arrow_array::{
    Array, ArrayRef, RecordBatch,
    cast::AsArray,
    types::{Float32Type, Int64Type, UInt8Type, UInt32Type},
};
use serde_json::{Value, json};

use crate::layers::{Coded, Layer};

/// Fails unless `batches` hold a row for each of `layers`, in order, quantized by `int8`, and end with one of no rows.
pub fn expect_int8(batches: &[RecordBatch], layers: &[Layer]) {
    let (closing, answers) = batches.split_last().expect("a closing batch");
    assert_eq!(closing.num_rows(), 0, "the closing batch has no rows");
    let mut rows = Vec::new();
    for answer in answers {
        assert_ne!(answer.num_rows(), 0, "the closing batch is the only one of no rows");
        rows.extend((0..answer.num_rows()).map(|row| (answer, row)));
    }
    let names = Vec::from_iter(rows.iter().map(|&(answer, row)| text(answer, "layer_name", row)));
    assert_eq!(names, Vec::from_iter(layers.iter().map(|layer| layer.name)));
    for ((answer, row), layer) in rows.into_iter().zip(layers) {
        expect_row(answer, row, layer);
    }
}

fn expect_row(answer: &RecordBatch, row: usize, layer: &Layer) {
    let name = layer.name;
    let Coded { scales, codes } = layer.int8();
    assert_eq!(text(answer, "status", row), "quantized", "{name}");
    assert_eq!(text(answer, "scheme", row), "int8", "{name}");
    assert_eq!(text(answer, "dtype", row), "f32", "{name}");
    assert_eq!(column(answer, "bit_width").as_primitive::<UInt8Type>().value(row), 8, "{name}");
    let shape = column(answer, "shape").as_list::<i32>().value(row);
    assert_eq!(
        shape.as_primitive::<Int64Type>().values().to_vec(),
        layer.shape.map(|dimension| dimension as i64),
        "{name}"
    );
    for absent in ["reason", "message", "zero_points", "extra_tensors"] {
        assert!(column(answer, absent).is_null(row), "{name}: `{absent}` is not null");
    }

    let found = column(answer, "scales").as_list::<i32>().value(row);
    assert_eq!(found.as_primitive::<Float32Type>().values().to_vec(), scales, "{name}");
    let data = column(answer, "quantized_data").as_binary::<i64>().value(row);
    // Not assert_eq: a million codes would be printed.
    let differs = data.iter().zip(&codes).position(|(&byte, &code)| byte as i8 != code);
    assert_eq!((data.len(), differs), (codes.len(), None), "{name}: length, and the first code that is another");
    let checksum = column(answer, "checksum").as_primitive::<UInt32Type>().value(row);
    assert_eq!(checksum, crc32c::crc32c(data), "{name}");
}

/// Fails unless `batches` are what the codes of `layers` stand for, in as many runs as they like.
pub fn expect_decoded(batches: &[RecordBatch], layers: &[Layer]) {
    let mut found = BTreeMap::<&str, Vec<f32>>::new();
    for batch in batches {
        let weights = column(batch, "weights").as_list::<i64>();
        for row in 0..batch.num_rows() {
            let run = weights.value(row);
            let values = run.as_primitive::<Float32Type>().values();
            found.entry(text(batch, "layer_name", row)).or_default().extend_from_slice(values);
        }
    }
    assert_eq!(found.len(), layers.len());
    for layer in layers {
        let (found, expected) = (&found[layer.name], layer.decoded());
        let differs = found.iter().zip(&expected).position(|(found, expected)| found != expected);
        assert_eq!((found.len(), differs), (expected.len(), None), "{}: length, first difference", layer.name);
    }
}

/// Fails unless it is `server.info`'s body.
pub fn expect_server_info(body: &Value) {
    assert_eq!(body["contract"].as_str().unwrap().split('.').next(), Some("1"), "{body}");
    assert_eq!(body["verbs"], json!(["quantize", "dequantize"]));
    let limits = body["limits"].as_array().unwrap();
    let message = limits.iter().find(|limit| limit["name"] == "message_bytes_max");
    assert_eq!(message.unwrap()["value"], 67_108_864, "{body}");
}

/// Fails unless it is `schemes.list`'s body.
pub fn expect_schemes(body: &Value) {
    let schemes = body["schemes"].as_array().unwrap();
    let w4a16 = schemes.iter().find(|scheme| scheme["name"] == "W4A16").unwrap();
    let said = ["element", "bit_width", "symmetric", "granularity", "group_size", "packing"].map(|key| &w4a16[key]);
    assert_eq!(json!(said), json!(["int4", 4, true, "group", 128, "dense-int32"]));
}

fn text<'a>(batch: &'a RecordBatch, name: &str, row: usize) -> &'a str {
    column(batch, name).as_string::<i32>().value(row)
}

pub fn column<'a>(batch: &'a RecordBatch, name: &str) -> &'a ArrayRef {
    batch.column_by_name(name).unwrap_or_else(|| panic!("no column `{name}`"))
}
