//! Rows of `quantize`'s answers as runs.

use arrow_array::{
    Array, Float64Array, LargeBinaryArray, ListArray, RecordBatch, StringArray, StructArray, UInt8Array, UInt32Array,
    UInt64Array,
    types::{Float32Type, Int32Type},
};
use bytes::Bytes;
use quarrel_proto::column::{self, status, tensor};

use crate::{
    columns::{binary, column, field, number, numbers, text, texts},
    cut::Cut,
    error::Error,
    layer::Layer,
    quantize::{Codes, Metrics, Nested, Outcome, Run},
};

/// The columns of one batch of answers.
pub(crate) struct Answered<'a> {
    pub(crate) names: &'a StringArray,
    statuses: &'a StringArray,
    reasons: &'a StringArray,
    messages: &'a StringArray,
    data: &'a LargeBinaryArray,
    scales: &'a ListArray,
    zero_points: &'a ListArray,
    extra: &'a ListArray,
    schemes: &'a StringArray,
    widths: &'a UInt8Array,
    metrics: &'a StructArray,
    layer_metrics: &'a StructArray,
    checksums: &'a UInt32Array,
}

impl<'a> Answered<'a> {
    pub(crate) fn of(batch: &'a RecordBatch) -> Result<Answered<'a>, Error> {
        Ok(Answered {
            names: texts(batch, column::LAYER_NAME)?,
            statuses: texts(batch, column::STATUS)?,
            reasons: texts(batch, column::REASON)?,
            messages: texts(batch, column::MESSAGE)?,
            data: column(batch, column::QUANTIZED_DATA)?,
            scales: column(batch, column::SCALES)?,
            zero_points: column(batch, column::ZERO_POINTS)?,
            extra: column(batch, column::EXTRA_TENSORS)?,
            schemes: texts(batch, column::SCHEME)?,
            widths: column(batch, column::BIT_WIDTH)?,
            metrics: column(batch, column::METRICS)?,
            layer_metrics: column(batch, column::LAYER_METRICS)?,
            checksums: column(batch, column::CHECKSUM)?,
        })
    }

    /// A row as the run at place `at` of its layer, and how many bytes it holds.
    pub(crate) fn run(&self, row: usize, layer: Layer, cut: Cut, at: u64) -> Result<(Run, usize), Error> {
        let reason = || text(self.reasons, row).unwrap_or_default().to_owned();
        let message = || text(self.messages, row).unwrap_or_default().to_owned();
        let outcome = match self.statuses.value(row) {
            status::QUANTIZED => Outcome::Quantized(self.codes(row, &layer)?),
            status::KEPT => {
                let weights = self.extra(row, tensor::WEIGHT)?;
                Outcome::Kept { reason: reason(), message: message(), weights }
            }
            status::FAILED => Outcome::Failed { reason: reason(), message: message() },
            other => return Err(Error::Answer { detail: format!("status `{other}` is none") }),
        };
        let bytes = match &outcome {
            Outcome::Quantized(codes) => codes.data.len() + 4 * codes.scales.len(),
            Outcome::Kept { weights, .. } => weights.as_ref().map_or(0, Bytes::len),
            Outcome::Failed { .. } => 0,
        };
        let (metrics, layer_metrics) = (metrics(self.metrics, row)?, metrics(self.layer_metrics, row)?);
        let (channels, channels_total, is_last) = (cut.channels(at), cut.total(), at + 1 == cut.rows());
        Ok((Run { layer, channels, channels_total, is_last, outcome, metrics, layer_metrics }, bytes))
    }

    fn codes(&self, row: usize, layer: &Layer) -> Result<Codes, Error> {
        let missing =
            |name| Error::Answer { detail: format!("layer `{}` is quantized without `{name}`", layer.name()) };
        let data = binary(self.data, row).ok_or_else(|| missing(column::QUANTIZED_DATA))?;
        let checksum = number(self.checksums, row).ok_or_else(|| missing(column::CHECKSUM))?;
        if crc32c::crc32c(&data) != checksum {
            let detail = format!("layer `{}`: the codes do not have their checksum {checksum:#010x}", layer.name());
            return Err(Error::Answer { detail });
        }
        let scheme = text(self.schemes, row).ok_or_else(|| missing(column::SCHEME))?;
        let scales = match numbers::<Float32Type>(self.scales, row)? {
            None if !column::codes_hold_scales(scheme) => return Err(missing(column::SCALES)),
            scales => scales.unwrap_or_default(),
        };
        let all = |name| {
            let of = |data: Bytes| Vec::from_iter(data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
            Ok::<_, Error>(self.extra(row, name)?.map(of))
        };
        let one = |name| Ok::<_, Error>(all(name)?.and_then(|numbers| numbers.first().copied()));
        Ok(Codes {
            data,
            scales,
            zero_points: numbers::<Int32Type>(self.zero_points, row)?,
            global_scale: one(tensor::WEIGHT_GLOBAL_SCALE)?,
            nested: match (self.extra(row, tensor::ABSMAX)?, all(tensor::NESTED_ABSMAX)?, one(tensor::NESTED_OFFSET)?) {
                (Some(absmax), Some(nested_absmax), Some(offset)) => Some(Nested { absmax, nested_absmax, offset }),
                _ => None,
            },
            scheme: scheme.to_owned(),
            bit_width: number(self.widths, row).ok_or_else(|| missing(column::BIT_WIDTH))?,
        })
    }

    /// The tensor of that name among a row's extra tensors.
    fn extra(&self, row: usize, name: &str) -> Result<Option<Bytes>, Error> {
        if self.extra.is_null(row) {
            return Ok(None);
        }
        let tensors = self.extra.value(row);
        let broken = || Error::Answer { detail: format!("column `{}` holds no tensors", column::EXTRA_TENSORS) };
        let tensors = tensors.as_any().downcast_ref::<StructArray>().ok_or_else(broken)?;
        let names = field::<StringArray>(tensors, "name")?;
        let data = field::<LargeBinaryArray>(tensors, "data")?;
        let at = (0..tensors.len()).find(|at| names.value(*at) == name);
        Ok(at.and_then(|at| binary(data, at)))
    }
}

fn metrics(structs: &StructArray, row: usize) -> Result<Option<Metrics>, Error> {
    if structs.is_null(row) {
        return Ok(None);
    }
    let float = |name| Ok::<_, Error>(number(field::<Float64Array>(structs, name)?, row));
    let count = |name| Ok::<_, Error>(field::<UInt64Array>(structs, name)?.value(row));
    Ok(Some(Metrics {
        elements: count("elements")?,
        mse: float("mse")?,
        sqnr_db: float("sqnr_db")?,
        cosine: float("cosine")?,
        max_abs_error: float("max_abs_error")?,
        amax: float("amax")?,
        saturated: count("saturated")?,
        bits_per_weight: float("bits_per_weight")?,
    }))
}
