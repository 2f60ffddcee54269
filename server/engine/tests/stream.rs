//! A stream without a network: batches in, answers out.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use arrow_array::{ArrayRef, Float32Array, LargeListArray, ListArray, RecordBatch, StringArray, types::Int64Type};
use arrow_buffer::OffsetBuffer;
use arrow_schema::{DataType, Field};
use quarrel_engine::{Cancel, Cancelled, Intake, Level, Limits, Need, Output, Plan, Unit};
use quarrel_proto::command;
use quarrel_shelf::Shelf;

const LIMITS: Limits = Limits {
    message_bytes_max: 64 << 20,
    span_bytes_max: 64 << 20,
    batch_rows_max: 1_000,
    layers_max: 1_000,
    name_bytes_max: 1_000,
};

fn plan(text: &str) -> Plan {
    Plan::new(&command::parse(text.as_bytes()).unwrap()).unwrap()
}

/// One layer of that shape, a row for each run of so many channels.
fn layer(shape: [usize; 2], runs: &[usize]) -> RecordBatch {
    let [channels, columns] = shape;
    assert_eq!(runs.iter().sum::<usize>(), channels);
    let values: Vec<f32> = (0..channels * columns).map(|i| ((i * 7_919) % 1_009) as f32 / 1_009.0 - 0.4).collect();
    let offsets = OffsetBuffer::from_lengths(runs.iter().map(|run| run * columns));
    let item = Arc::new(Field::new_list_field(DataType::Float32, true));
    let shapes = runs.iter().map(|_| Some(shape.map(|dim| Some(dim as i64))));
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("layer_name", Arc::new(StringArray::from_iter_values(runs.iter().map(|_| "layer")))),
        ("weights", Arc::new(LargeListArray::new(item, offsets, Arc::new(Float32Array::from(values)), None))),
        ("shape", Arc::new(ListArray::from_iter_primitive::<Int64Type, _, _>(shapes))),
    ];
    RecordBatch::try_from_iter(columns).unwrap()
}

fn units(plan: &Plan, batch: &RecordBatch) -> Vec<Unit> {
    let mut intake = Intake::new(plan, LIMITS, &batch.schema()).unwrap();
    intake.begin(batch).unwrap();
    let mut units = Vec::new();
    while let Some(need) = intake.next().unwrap() {
        if let Need::Unit(unit) = need {
            units.push(unit);
        }
    }
    intake.end().unwrap();
    units
}

#[test]
fn a_cancelled_unit_is_not_computed() {
    for scheme in ["int8", "int8/tensor", "FP8_BLOCK"] {
        let plan = plan(&format!(r#"{{"quantize": {{"scheme": "{scheme}"}}}}"#));
        let cancel = Cancel::default();
        cancel.cancel();
        for unit in units(&plan, &layer([256, 4096], &[256])) {
            assert!(matches!(unit.compute(Level::detect(), &cancel, &Shelf::default()), Err(Cancelled)), "{scheme}");
        }
    }
}

/// What a batch is answered with.
fn answers(plan: &Plan, batch: &RecordBatch, shelf: &Shelf) -> Vec<RecordBatch> {
    let mut output = Output::new(plan, Arc::new(Output::schema(plan)));
    let mut batches = Vec::new();
    for unit in units(plan, batch) {
        let result = unit.compute(Level::detect(), &Cancel::default(), shelf).unwrap();
        let (answers, ended) = output.take(result);
        ended.unwrap();
        batches.extend(answers.into_iter().map(|answer| answer.batch));
    }
    batches
}

/// The bytes of a column, of binary or f32 lists, row after row.
fn bytes(batches: &[RecordBatch], column: &str) -> Vec<u8> {
    let of = |batch: &RecordBatch| -> Vec<u8> {
        let array = batch.column_by_name(column).unwrap().as_any();
        match array.downcast_ref::<LargeListArray>() {
            Some(lists) => {
                let values = lists.values().as_any().downcast_ref::<Float32Array>().unwrap();
                values.values().iter().flat_map(|value| value.to_bits().to_le_bytes()).collect()
            }
            None => {
                let data = array.downcast_ref::<arrow_array::LargeBinaryArray>().unwrap();
                data.iter().flatten().flatten().copied().collect()
            }
        }
    };
    batches.iter().flat_map(of).collect()
}

/// Writes other bytes where results of that length lay, which will lie there again; and where that is.
fn spoil(shelf: &Shelf, length: usize) -> *const u8 {
    let mut room = shelf.room(length);
    room.fill(0xa5);
    room.lent().as_ptr()
}

#[test]
fn codes_do_not_depend_on_what_lay_where_they_are_written() {
    let schemes = "int8 int8/tensor W8A16 W4A16 W4A16_ASYM int2 int3 int5/g128 int6-asym int7 FP8_DYNAMIC FP8_BLOCK NVFP4A16 MXFP4A16 MXFP6A16 \
                   MXFP8A16 nf4 fp4 nf4;double_quant=true int8_rowwise int4;solver=mse int4-asym/g64;solver=hqq Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 \
                   Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL MXFP4 NVFP4";
    let batch = layer([1024, 512], &[1024]);
    for scheme in schemes.split_whitespace() {
        let plan = plan(&format!(r#"{{"quantize": {{"scheme": "{scheme}"}}}}"#));
        let shelf = Shelf::default();
        let expected = bytes(&answers(&plan, &batch, &shelf), "quantized_data");
        let at = spoil(&shelf, expected.len());
        let quantized = answers(&plan, &batch, &shelf);
        assert!(bytes(&quantized, "quantized_data") == expected, "{scheme}");
        drop(quantized);
        assert_eq!(shelf.room(expected.len()).lent().as_ptr(), at, "{scheme}: it was not used again");
    }
}

#[test]
fn values_do_not_depend_on_what_lay_where_they_are_written() {
    let batch = layer([128, 512], &[128]);
    for scheme in ["int8", "W4A16_ASYM", "int3", "FP8_BLOCK", "NVFP4A16", "MXFP4A16", "nf4", "int8_rowwise", "Q4_K"] {
        let quantize = plan(&format!(r#"{{"quantize": {{"scheme": "{scheme}"}}}}"#));
        let quantized = answers(&quantize, &batch, &Shelf::default());
        for dtype in ["f32", "bf16", "f16"] {
            let dequantize = plan(&format!(r#"{{"dequantize": {{"dtype": "{dtype}"}}}}"#));
            let shelf = Shelf::default();
            let expected = bytes(&answers(&dequantize, &quantized[0], &shelf), "weights");
            let at = spoil(&shelf, expected.len());
            let values = answers(&dequantize, &quantized[0], &shelf);
            assert!(bytes(&values, "weights") == expected, "{scheme} to {dtype}");
            drop(values);
            assert_eq!(shelf.room(expected.len()).lent().as_ptr(), at, "{scheme} to {dtype}: it was not used again");
        }
    }
}

#[test]
fn there_are_as_many_rows_out_as_in_however_a_layer_is_cut() {
    for scheme in ["int4/g32", "int3/tensor", "FP8_BLOCK", "fp8/b7x48"] {
        let plan = plan(&format!(r#"{{"quantize": {{"scheme": "{scheme}"}}}}"#));
        let mut wholes = Vec::new();
        for runs in [&[300][..], &[100, 100, 100], &[1, 127, 2, 0, 126, 44], &[0, 299, 1]] {
            let batches = answers(&plan, &layer([300, 96], runs), &Shelf::default());
            let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
            let codes = bytes(&batches, "quantized_data");
            assert_eq!(rows, runs.len(), "{scheme} {runs:?}");
            wholes.push(codes);
        }
        assert!(wholes.windows(2).all(|pair| pair[0] == pair[1]), "{scheme}");
    }
}
