//! The report: what became of every tensor, measured. Written as JSON beside the result; the table is made of it.

use std::{io::Write, path::PathBuf};

use quarrel_checkpoint::{LayerReport, REPORT, Status, Stop, Target};
use serde::Serialize;

use crate::{args::QuantizeArgs, failure::Failure};

/// All of it. Field names are those of the contract where it has them.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) source: String,
    pub(crate) destination: String,
    /// Where it was done; null for this process.
    pub(crate) server: Option<String>,
    pub(crate) quarrel: &'static str,
    pub(crate) contract: String,
    pub(crate) cpu_level: String,
    /// The effective command, as the server echoed it.
    pub(crate) command: Option<serde_json::Value>,
    pub(crate) seconds: f64,
    pub(crate) totals: Totals,
    /// Weights in a model's folder that are not of it, and were not copied.
    pub(crate) left_out: Vec<String>,
    /// In the order of the source.
    pub(crate) layers: Vec<LayerReport>,
}

#[derive(Debug, Default, Serialize)]
pub(crate) struct Totals {
    pub(crate) quantized: usize,
    pub(crate) kept: usize,
    pub(crate) failed: usize,
    /// Of quantized layers.
    pub(crate) elements: u64,
    /// Over all quantized layers.
    pub(crate) bits_per_weight: Option<f64>,
    /// The quantized layer of least SQNR.
    pub(crate) worst_layer: Option<String>,
    pub(crate) worst_sqnr_db: Option<f64>,
    pub(crate) source_bytes: u64,
    pub(crate) destination_bytes: u64,
}

impl Totals {
    pub(crate) fn of(layers: &[LayerReport]) -> Totals {
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
            source_bytes: 0,
            destination_bytes: 0,
        }
    }
}

/// Where the report goes.
pub(crate) fn path(args: &QuantizeArgs, is_folder: bool) -> PathBuf {
    let destination = &args.files.destination;
    if args.report.is_none() && is_folder {
        return destination.join(REPORT);
    }
    args.report.clone().unwrap_or_else(|| match destination.extension() {
        Some(ending) if ending == "safetensors" => destination.with_extension("report.json"),
        _ => destination.with_added_extension("report.json"),
    })
}

/// Writes the report: complete under its name, or not at all.
pub(crate) fn write(report: &Report, target: &Target) -> Result<(), Failure> {
    let mut text = serde_json::to_vec_pretty(report).map_err(|error| Failure::ours(error.to_string()))?;
    text.push(b'\n');
    let failed = |error: &std::io::Error| Failure::file("cannot write the report", &target.path(), error);
    // The checkpoint has its name by now: nobody stops here.
    let written = target.write(&Stop::default(), |out| Ok(out.write_all(&text)))?;
    written.map_err(|error| failed(&error))
}
