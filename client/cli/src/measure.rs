//! `quarrel measure`: how far a checkpoint is from another.

use quarrel_checkpoint::{CheckpointError, Comparison, Gate, Measured, Model};

use crate::{
    args::{MeasureArgs, OutputArgs, PlaceArgs},
    failure::Failure,
    paths::stores,
    served::{blocking, here},
    table::{WORST, clean, print, shape, shown, table},
};

pub(crate) async fn measure(args: MeasureArgs) -> Result<(), Failure> {
    let stores = stores();
    let (first, second) = (stores.locate(&args.first)?, stores.locate(&args.second)?);
    let place = PlaceArgs { threads: args.threads, cpu_level: args.cpu_level, ..PlaceArgs::default() };
    let (local, level) = here(&place)?;
    let (first, second) = blocking(move || Ok((Model::open(&first)?, Model::open(&second)?))).await?;
    let found = Comparison::of((&first, &second), &local, level).await?;
    match args.output {
        OutputArgs { quiet: true, .. } => {}
        OutputArgs { json: true, .. } => {
            print(&serde_json::to_string_pretty(&found).map_err(|error| Failure::ours(error.to_string()))?)?;
        }
        OutputArgs { verbose, .. } => print(&summary(&found, verbose))?,
    }
    let gate = Gate { sqnr_db_min: args.sqnr_db_min, cosine_min: args.cosine_min };
    match found.missed(gate) {
        Some((layer, detail)) => Err(CheckpointError::Gate { layer, detail }.into()),
        None => Ok(()),
    }
}

fn summary(found: &Comparison, verbose: bool) -> String {
    let mut lines = Vec::new();
    let is_shown = |layer: &&Measured| layer.metrics.sqnr_db.is_some() || layer.is_undefined();
    let mut by_quality = Vec::from_iter(found.layers.iter().filter(is_shown));
    by_quality.sort_by(|a, b| sqnr(a).total_cmp(&sqnr(b)));
    let shown = if verbose { Vec::from_iter(&found.layers) } else { by_quality.into_iter().take(WORST).collect() };
    if !shown.is_empty() {
        lines.push(layers(&shown));
    }
    let same = found.layers.iter().filter(|layer| layer.metrics.max_abs_error == Some(0.0)).count();
    let undefined = found.layers.iter().filter(|layer| layer.is_undefined()).count();
    let differing = found.layers.len() - same - undefined;
    let and = match undefined {
        0 => String::new(),
        count => format!(", {count} hold numbers that are not finite"),
    };
    lines.push(format!(
        "{differing} layers differ{}, {same} are the same{and}",
        if verbose || shown.is_empty() { "" } else { ", the worst above" }
    ));
    for (names, whose) in [(&found.only_in_first, "first"), (&found.only_in_second, "second")] {
        if let [name, others @ ..] = names.as_slice() {
            let more = if others.is_empty() { String::new() } else { format!(" and {} more", others.len()) };
            lines.push(format!("Only in the {whose}, or there in another shape: {}{more}", clean(name)));
        }
    }
    lines.join("\n")
}

fn layers(layers: &[&Measured]) -> String {
    let mut table = table(["layer", "shape", "A", "B", "SQNR dB", "cosine", "max error"]);
    for layer in layers {
        table.add_row([
            clean(&layer.name),
            shape(&layer.shape),
            clean(&layer.first),
            clean(&layer.second),
            shown(layer.metrics.sqnr_db, 1),
            shown(layer.metrics.cosine, 5),
            layer.metrics.max_abs_error.map_or_else(|| "not finite".to_owned(), |error| format!("{error:.2e}")),
        ]);
    }
    table.to_string()
}

/// What is undefined is the worst.
fn sqnr(layer: &Measured) -> f64 {
    if layer.is_undefined() {
        return f64::NEG_INFINITY;
    }
    layer.metrics.sqnr_db.unwrap_or(f64::INFINITY)
}
