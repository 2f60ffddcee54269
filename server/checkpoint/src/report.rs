//! What became of every tensor, measured: kept in the records of a job, and told in its report.

use std::{fs::File, io::Write, time::Instant};

use arrow_array::RecordBatch;
use quarrel_proto::{column, command::to_json, v1};
use serde::{Deserialize, Serialize};

use crate::{
    answers::{self, Asked},
    error::CheckpointError,
    job::{Job, Made},
    target::{Stop, Target},
    unit::Outcome,
};

/// What became of a tensor of the source. Field names are those of the contract where it has them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerReport {
    /// The tensor.
    pub name: String,
    /// What became of it.
    pub status: Status,
    /// The contract's word, unless it was quantized.
    pub reason: Option<String>,
    /// The same as a sentence.
    pub message: Option<String>,
    /// Its element type, as safetensors says it.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// The canonical scheme, if it was quantized.
    pub scheme: Option<String>,
    /// The scheme that it had in the source, if it was decoded: quality is told against what it was decoded to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// Quality of the layer; none unless quantized.
    pub metrics: Option<Metrics>,
    /// The tensors of the destination.
    pub tensors: Vec<String>,
    /// Bytes in the source.
    pub bytes: u64,
}

/// What became of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It was quantized.
    Quantized,
    /// It was left as it is.
    Kept,
    /// It could not be quantized, and was left as it is.
    Failed,
    /// It was quantized, and is dense now.
    Dequantized,
}

impl Status {
    /// The contract's word.
    pub fn word(self) -> &'static str {
        match self {
            Status::Quantized => "quantized",
            Status::Kept => "kept",
            Status::Failed => "failed",
            Status::Dequantized => "dequantized",
        }
    }
}

/// What codes lose. SPEC.md, section "Output", has the formulas.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the contract's own fields")]
pub struct Metrics {
    pub elements: u64,
    pub mse: Option<f64>,
    pub sqnr_db: Option<f64>,
    pub cosine: Option<f64>,
    pub max_abs_error: Option<f64>,
    pub amax: Option<f64>,
    pub saturated: u64,
    pub bits_per_weight: Option<f64>,
}

/// The least quality that every quantized layer must have.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Gate {
    /// In dB.
    pub sqnr_db_min: Option<f64>,
    /// Of the angle between weights and decoded weights.
    pub cosine_min: Option<f64>,
}

impl Gate {
    /// The layer that misses it by most, and how. An exact layer, whose SQNR is undefined, passes.
    pub fn missed<'a>(
        &self,
        layers: impl Iterator<Item = (&'a str, &'a Metrics)> + Clone,
    ) -> Option<(&'a str, String)> {
        let worst = |of: fn(&Metrics) -> Option<f64>| {
            let rated = layers.clone().filter_map(move |(layer, metrics)| Some((layer, of(metrics)?)));
            rated.min_by(|a, b| a.1.total_cmp(&b.1))
        };
        let misses = |found: Option<(&'a str, f64)>, least: Option<f64>| {
            found.zip(least).filter(|((_, value), least)| value < least)
        };
        let sqnr = misses(worst(|metrics| metrics.sqnr_db), self.sqnr_db_min)
            .map(|((layer, value), least)| (layer, format!("an SQNR of {value:.2} dB: expected at least {least} dB")));
        let cosine = || {
            misses(worst(|metrics| metrics.cosine), self.cosine_min)
                .map(|((layer, value), least)| (layer, format!("a cosine of {value:.6}: expected at least {least}")))
        };
        sqnr.or_else(cosine)
    }
}

/// Whether every layer is good enough.
pub(crate) fn pass(gate: Gate, layers: &[LayerReport]) -> Result<(), CheckpointError> {
    let measured = layers.iter().filter_map(|layer| Some((layer.name.as_str(), layer.metrics.as_ref()?)));
    match gate.missed(measured) {
        Some((layer, detail)) => Err(CheckpointError::Gate { layer: layer.to_owned(), detail }),
        None => Ok(()),
    }
}

/// What became of a model. Field names are those of the contract where it has them.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Path or URI.
    pub source: String,
    /// Path or URI.
    pub destination: String,
    /// Where it was done; null for this process.
    pub server: Option<String>,
    /// The version that did it.
    pub quarrel: &'static str,
    /// The contract's version.
    pub contract: String,
    /// The CPU level that computed.
    pub cpu_level: String,
    /// The effective command, as the server echoed it.
    pub command: Option<serde_json::Value>,
    /// From the first look at the source to the last file.
    pub seconds: f64,
    /// Over all layers.
    pub totals: Totals,
    /// Weights in a model's folder that are not of it, and were not copied.
    pub left_out: Vec<String>,
    /// In the order of the source.
    pub layers: Vec<LayerReport>,
}

/// Who did a job, for its report.
#[derive(Debug)]
pub struct By {
    /// A server's address; none for this process.
    pub server: Option<String>,
    /// The contract's version.
    pub contract: String,
    /// The CPU level that computed.
    pub cpu_level: String,
}

impl Report {
    /// Of what a job has made within so many seconds, or before.
    pub fn of(job: &Job, made: &Made, by: By, seconds: f64) -> Report {
        Report {
            source: job.model().path().display().to_string(),
            destination: job.destination().display().to_string(),
            server: by.server,
            quarrel: env!("CARGO_PKG_VERSION"),
            contract: by.contract,
            cpu_level: by.cpu_level,
            command: job.effective().and_then(|command| serde_json::from_str(&to_json(command)).ok()),
            seconds,
            totals: Totals::of(&made.layers, job.model().stored_bytes(), made.bytes),
            left_out: job.model().left_out().map(|path| path.display().to_string()).collect(),
            layers: made.layers.clone(),
        }
    }

    /// Of a model that a stream brought, with what it was quantized with.
    pub(crate) fn of_stream(
        (source, destination): (String, String),
        command: &v1::Command,
        (totals, layers): (Totals, Vec<LayerReport>),
        by: By,
        began: Instant,
    ) -> Report {
        Report {
            source,
            destination,
            server: by.server,
            quarrel: env!("CARGO_PKG_VERSION"),
            contract: by.contract,
            cpu_level: by.cpu_level,
            command: serde_json::from_str(&to_json(command)).ok(),
            seconds: began.elapsed().as_secs_f64(),
            totals,
            left_out: Vec::new(),
            layers,
        }
    }

    /// Writes it: complete under its name, or not at all.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn write(&self, target: &Target) -> Result<(), CheckpointError> {
        let mut text = serde_json::to_vec_pretty(self).map_err(|error| CheckpointError::Ours(error.to_string()))?;
        text.push(b'\n');
        // Nobody stops here: a checkpoint that is a file has its name by now.
        let write = |out: &mut File| out.write_all(&text).map_err(target.writing());
        target.write(&Stop::default(), write)
    }
}

/// What became of the layers of a stream, by the answers to its rows.
#[derive(Debug, Default)]
pub(crate) struct Layers(Vec<LayerReport>);

impl Layers {
    /// Takes the next answers.
    pub(crate) fn take(&mut self, batch: &RecordBatch) -> Result<(), CheckpointError> {
        for row in 0..batch.num_rows() {
            let name = answers::text(batch, column::LAYER_NAME, row)?;
            if self.last_layer() != Some(&name) {
                self.0.push(LayerReport::of_row(batch, row)?);
            }
            let Some(layer) = self.0.last_mut() else { continue };
            let asked = Asked { name, begins: false, completes: false, done: 0 };
            let answered = answers::one(batch, row, &mut [asked].into_iter())?;
            layer.metrics = answered.metrics.or(layer.metrics);
            match answered.outcome {
                Outcome::Quantized { scheme, .. } => layer.scheme = Some(scheme),
                Outcome::Not { status, reason, message, .. } => {
                    (layer.status, layer.reason, layer.message) = (status, Some(reason), Some(message));
                }
            }
        }
        Ok(())
    }

    pub(crate) fn last_layer(&self) -> Option<&str> {
        self.0.last().map(|layer| layer.name.as_str())
    }

    pub(crate) fn all(&self) -> &[LayerReport] {
        &self.0
    }

    pub(crate) fn into_all(self) -> Vec<LayerReport> {
        self.0
    }
}

impl LayerReport {
    /// Of the layer of an answer's row, of which nothing more is known.
    pub(crate) fn of_row(batch: &RecordBatch, row: usize) -> Result<LayerReport, CheckpointError> {
        let (name, dtype) = (answers::text(batch, column::LAYER_NAME, row)?, answers::dtype(batch, row)?);
        let shape = answers::shape(batch, row)?;
        Ok(LayerReport {
            name,
            status: Status::Quantized,
            reason: None,
            message: None,
            dtype: format!("{dtype:?}"),
            bytes: elements(&shape) * dtype.bitsize() as u64 / 8,
            shape,
            scheme: None,
            from: None,
            metrics: None,
            tensors: Vec::new(),
        })
    }
}

/// How many elements a shape has, which may be none of however many.
fn elements(shape: &[u64]) -> u64 {
    if shape.contains(&0) { 0 } else { shape.iter().product() }
}

/// Sums of a report.
#[derive(Debug, Default, Serialize)]
pub struct Totals {
    /// Layers that were quantized.
    pub quantized: usize,
    /// Tensors that stayed as they were.
    pub kept: usize,
    /// Layers that could not be quantized, and stayed as they were.
    pub failed: usize,
    /// Of quantized layers.
    pub elements: u64,
    /// Over all quantized layers.
    pub bits_per_weight: Option<f64>,
    /// The quantized layer of least SQNR.
    pub worst_layer: Option<String>,
    /// Its SQNR.
    pub worst_sqnr_db: Option<f64>,
    /// Of the source's tensors.
    pub source_bytes: u64,
    /// Of the files of tensors that were made.
    pub destination_bytes: u64,
}

impl Totals {
    pub(crate) fn of(layers: &[LayerReport], source_bytes: u64, destination_bytes: u64) -> Totals {
        let count = |status| layers.iter().filter(|layer| layer.status == status).count();
        let measured = || layers.iter().filter_map(|layer| Some((layer, layer.metrics?)));
        let elements = measured().map(|(_, metrics)| metrics.elements).sum();
        let bits: f64 = measured().filter_map(|(_, of)| Some(of.bits_per_weight? * of.elements as f64)).sum();
        let rated = measured().filter_map(|(layer, metrics)| Some((layer, metrics.sqnr_db?)));
        let worst = rated.min_by(|a, b| a.1.total_cmp(&b.1));
        Totals {
            quantized: count(Status::Quantized),
            kept: count(Status::Kept),
            failed: count(Status::Failed),
            elements,
            bits_per_weight: (elements > 0).then(|| bits / elements as f64),
            worst_layer: worst.map(|(layer, _)| layer.name.clone()),
            worst_sqnr_db: worst.map(|(_, sqnr_db)| sqnr_db),
            source_bytes,
            destination_bytes,
        }
    }
}
