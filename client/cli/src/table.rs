//! What is printed at the end, on standard output.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write,
    path::Path,
};

use comfy_table::{CellAlignment, Table};
use quarrel_checkpoint::{LayerReport, Status};

use quarrel_checkpoint::Report;

use crate::{args::OutputArgs, failure::Failure};

/// A line under the head, and no other: tables are pasted into messages and read there.
const HEAD_LINE: &str = "     ──            ";

/// Layers that the closing table names without `--verbose`.
pub(crate) const WORST: usize = 5;

/// Prints the report in the way that was asked for.
pub(crate) fn close(report: &Report, path: &Path, output: OutputArgs) -> Result<(), Failure> {
    let text = match output {
        OutputArgs { quiet: true, .. } => return Ok(()),
        OutputArgs { json: true, .. } => {
            serde_json::to_string_pretty(report).map_err(|error| Failure::ours(error.to_string()))?
        }
        OutputArgs { verbose, .. } => summary(report, path, verbose),
    };
    print(&text)
}

/// Prints a text; a reader that has gone away is no fault.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::output(&error)),
        _ => Ok(()),
    }
}

/// A text from a file or a server without what a terminal would obey, or take for a new line.
pub(crate) fn clean(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

fn summary(report: &Report, path: &Path, verbose: bool) -> String {
    let mut lines = Vec::new();
    if verbose {
        lines.push(every_layer(report));
    }
    lines.push(by_scheme(report));
    let rated = |layer: &&LayerReport| layer.metrics.is_some_and(|metrics| metrics.sqnr_db.is_some());
    let mut worst = Vec::from_iter(report.layers.iter().filter(rated));
    worst.sort_by(|a, b| sqnr(a).total_cmp(&sqnr(b)));
    if worst.len() > WORST && !verbose {
        lines.push("lowest SQNR, dB:".to_owned());
        lines.extend(worst.iter().take(WORST).map(|layer| format!("{:7.1}  {}", sqnr(layer), clean(&layer.name))));
    }
    let totals = &report.totals;
    let bits = totals.bits_per_weight.map_or_else(String::new, |bits| format!(", {bits:.2} bits per weight"));
    lines.push(format!(
        "{} quantized, {} kept, {} failed{bits}; {} -> {} in {:.1} s {}",
        totals.quantized,
        totals.kept,
        totals.failed,
        megabytes(totals.source_bytes),
        megabytes(totals.destination_bytes),
        report.seconds,
        place(report.server.as_deref()),
    ));
    let decoded = BTreeSet::from_iter(report.layers.iter().filter_map(|layer| layer.from.as_deref()));
    if !decoded.is_empty() {
        let layers = report.layers.iter().filter(|layer| layer.from.is_some()).count();
        let schemes = Vec::from_iter(decoded.into_iter().map(clean)).join(", ");
        lines.push(format!(
            "{layers} layers were quantized before ({schemes}): quality is told against what they decode to."
        ));
    }
    if totals.quantized == 0 && report.layers.iter().any(|layer| layer.reason.is_some()) {
        lines.push("Nothing was quantized: see the reasons above.".to_owned());
    }
    if !report.left_out.is_empty() {
        let files = Vec::from_iter(report.left_out.iter().map(|file| clean(file)));
        lines.push(format!("Not of the model, and not copied: {}", files.join(", ")));
    }
    lines.push(format!("{}\n{}", report.destination, path.display()));
    lines.join("\n")
}

/// A line for each scheme, and for each reason of a layer that has none.
fn by_scheme(report: &Report) -> String {
    let mut groups: BTreeMap<(u8, String), Vec<&LayerReport>> = BTreeMap::new();
    for layer in &report.layers {
        let key = match (layer.status, &layer.scheme, &layer.reason) {
            (_, Some(scheme), _) => (0, scheme.clone()),
            (status, None, reason) => {
                let rank = if status == Status::Kept { 1 } else { 2 };
                (rank, unquantized(status, reason.as_deref()))
            }
        };
        groups.entry(key).or_default().push(layer);
    }
    let mut table = table(["", "layers", "MB", "bits/weight", "SQNR dB worst", "median", "cosine worst"]);
    for ((_, name), layers) in groups {
        let mut decibels = Vec::from_iter(layers.iter().filter_map(|layer| layer.metrics?.sqnr_db));
        decibels.sort_by(f64::total_cmp);
        let cosine = layers.iter().filter_map(|layer| layer.metrics?.cosine).min_by(f64::total_cmp);
        let bits = layers.iter().filter_map(|layer| {
            let metrics = layer.metrics?;
            Some((metrics.bits_per_weight? * elements(layer), elements(layer)))
        });
        let (bits, of) = bits.fold((0.0, 0.0), |(bits, of), (more, elements)| (bits + more, of + elements));
        table.add_row([
            clean(&name),
            layers.len().to_string(),
            format!("{:.1}", layers.iter().map(|layer| layer.bytes).sum::<u64>() as f64 / 1e6),
            shown((of > 0.0).then(|| bits / of), 2),
            shown(decibels.first().copied(), 1),
            shown(median(&decibels), 1),
            shown(cosine, 5),
        ]);
    }
    table.to_string()
}

/// What became of a layer that has no scheme. Where nothing was asked of it, there is no reason.
fn unquantized(status: Status, reason: Option<&str>) -> String {
    reason.map_or_else(|| status.word().to_owned(), |reason| format!("{}: {reason}", status.word()))
}

/// Of sorted numbers.
fn median(sorted: &[f64]) -> Option<f64> {
    let (low, high) = (sorted.get(sorted.len().checked_sub(1)? / 2)?, sorted.get(sorted.len() / 2)?);
    Some((low + high) / 2.0)
}

fn every_layer(report: &Report) -> String {
    let mut table = table(["layer", "shape", "", "bits/weight", "SQNR dB", "cosine", "max error"]);
    for layer in &report.layers {
        let what = match (&layer.scheme, &layer.reason) {
            (Some(scheme), _) => scheme.clone(),
            (None, reason) => unquantized(layer.status, reason.as_deref()),
        };
        let metrics = layer.metrics;
        table.add_row([
            clean(&layer.name),
            shape(&layer.shape),
            clean(&what),
            shown(metrics.and_then(|metrics| metrics.bits_per_weight), 2),
            shown(metrics.and_then(|metrics| metrics.sqnr_db), 1),
            shown(metrics.and_then(|metrics| metrics.cosine), 5),
            metrics.and_then(|metrics| metrics.max_abs_error).map_or_else(String::new, |error| format!("{error:.2e}")),
        ]);
    }
    table.to_string()
}

/// An empty table; texts stand left, numbers right.
pub(crate) fn table<const N: usize>(head: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(HEAD_LINE).set_header(head);
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for column in table.column_iter_mut().take(1) {
        column.set_cell_alignment(CellAlignment::Left);
    }
    table
}

/// Where the work was done.
pub(crate) fn place(server: Option<&str>) -> String {
    server.map_or_else(|| "in this process".to_owned(), |server| format!("at {}", clean(server)))
}

pub(crate) fn shape(shape: &[u64]) -> String {
    Vec::from_iter(shape.iter().map(u64::to_string)).join(" x ")
}

pub(crate) fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

pub(crate) fn shown(number: Option<f64>, digits: usize) -> String {
    number.map_or_else(String::new, |number| format!("{number:.digits$}"))
}

fn sqnr(layer: &LayerReport) -> f64 {
    layer.metrics.and_then(|metrics| metrics.sqnr_db).unwrap_or(f64::INFINITY)
}

fn elements(layer: &LayerReport) -> f64 {
    layer.shape.iter().product::<u64>() as f64
}
