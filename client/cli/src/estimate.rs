//! `quarrel estimate`: what `quarrel quantize` would make, from headers alone.

use std::collections::BTreeMap;

use quarrel_checkpoint::{Estimate, Estimated, JOB_BYTES, estimate as looked_at, is_gguf, mixes};

use crate::{
    args::EstimateArgs,
    failure::Failure,
    paths::{is_folder, stores},
    quantize::{Becomes, command},
    served::blocking,
    table::{clean, megabytes, print, shape, table},
};

pub(crate) async fn estimate(args: Box<EstimateArgs>) -> Result<(), Failure> {
    let source = stores().locate(&args.source)?;
    // Of a GGUF file, what `llama-quantize` has names for becomes another.
    let is_mix = args.what.how.scheme.as_ref().is_some_and(|scheme| mixes().any(|mix| mix == scheme));
    let what =
        if args.gguf || is_mix && is_gguf(&source) { Becomes::Gguf } else { Becomes::of(is_folder(&source).await?) };
    let command = command(&args.what, what)?;
    let metadata = args.metadata.as_ref().map(|path| stores().locate(path)).transpose()?;
    let looking = move || {
        let gguf = (what == Becomes::Gguf).then_some(metadata.as_ref());
        looked_at(&source, command, gguf, JOB_BYTES as u64)
    };
    let found = blocking(looking).await?;
    if args.json {
        return print(&serde_json::to_string_pretty(&found).map_err(|error| Failure::ours(error.to_string()))?);
    }
    if args.verbose {
        let mut lines = table(["layer", "shape", "", "bits/weight", "MB", "becomes MB"]);
        for layer in &found.layers {
            lines.add_row([
                clean(&layer.name),
                shape(&layer.shape),
                clean(&becomes_of(layer)),
                bits(layer.bits_per_weight),
                mb(layer.bytes),
                range(layer.destination_bytes),
            ]);
        }
        print(&lines.to_string())?;
    }
    let mut groups: BTreeMap<(bool, String), Vec<&Estimated>> = BTreeMap::new();
    for layer in &found.layers {
        groups.entry((layer.schemes.is_empty(), becomes_of(layer))).or_default().push(layer);
    }
    let mut lines = table(["", "layers", "MB", "becomes MB", "bits/weight"]);
    for ((_, name), layers) in groups {
        let of = layers
            .iter()
            .filter_map(|layer| Some((layer.bits_per_weight?, layer.shape.iter().product::<u64>() as f64)));
        let (sum, elements) = of.fold((0.0, 0.0), |all, (bits, of)| (all.0 + bits * of, all.1 + of));
        let becomes = layers
            .iter()
            .fold((0, 0), |all, layer| (all.0 + layer.destination_bytes.0, all.1 + layer.destination_bytes.1));
        lines.add_row([
            clean(&name),
            layers.len().to_string(),
            mb(layers.iter().map(|layer| layer.bytes).sum()),
            range(becomes),
            bits((elements > 0.0).then(|| sum / elements)),
        ]);
    }
    print(&lines.to_string())?;
    print(&summary(&found))
}

fn summary(found: &Estimate) -> String {
    let becomes = match found.destination_bytes {
        (least, most) if least == most => megabytes(least),
        (least, most) => format!("{} to {}", megabytes(least), megabytes(most)),
    };
    let average = found.bits_per_weight.map_or_else(String::new, |bits| format!(", {bits:.2} bits per weight"));
    let memory = megabytes(found.peak_memory_bytes);
    format!("{} -> {becomes}{average}; at most {memory} of memory", megabytes(found.source_bytes))
}

fn becomes_of(layer: &Estimated) -> String {
    match &layer.reason {
        Some(reason) => format!("kept: {reason}"),
        None if layer.schemes.is_empty() => "kept".to_owned(),
        None => layer.schemes.join(", or "),
    }
}

fn bits(bits: Option<f64>) -> String {
    bits.map_or_else(String::new, |bits| format!("{bits:.2}"))
}

fn mb(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

fn range((least, most): (u64, u64)) -> String {
    if least == most { mb(least) } else { format!("{} to {}", mb(least), mb(most)) }
}
