//! `config.json` and the index of a quantized model: what transformers and vLLM must be told of it.
//!
//! Source: `CompressionConfig` of compressed-tensors 0.20, `quantization/quant_config.py` and `quant_scheme.py`.

use std::collections::{BTreeMap, BTreeSet};

use quarrel_engine::{Codes, Granularity, Scaling, Scheme};
use serde_json::{Map, Value, json};

use crate::{bitsandbytes, error::CheckpointError, model::Model, modules::Module, report::LayerReport, site::Record};

/// The version of compressed-tensors whose layout is written.
const LAYOUT_VERSION: &str = "0.20.0";

/// Where configurations say it.
const SAYS_QUANTIZED: [&str; 2] = ["quantization_config", "compression_config"];

/// What became of the modules of a model.
#[derive(Debug, Default)]
pub(crate) struct Decided {
    /// Quantized: module to scheme.
    pub(crate) quantized: BTreeMap<String, Scheme>,
    /// Left as they are, though they have a weight of two dimensions or more.
    pub(crate) kept: BTreeSet<String>,
}

impl Decided {
    /// Of a model that is quantized already.
    pub(crate) fn of(model: &Model, modules: &[Vec<Module>]) -> Decided {
        let modules = modules.iter().flatten();
        let quantized = BTreeMap::from_iter(modules.map(|module| (module.name.clone(), module.scheme)));
        let weights = model.tensors().filter(|(_, tensor)| tensor.shape.len() >= 2);
        let names = weights.filter_map(|(_, tensor)| tensor.name.strip_suffix(".weight"));
        let kept = names.filter(|name| !quantized.contains_key(*name)).map(str::to_owned);
        let fused = model.tensors().filter_map(|(_, tensor)| fused_experts(&tensor.name, &tensor.shape));
        Decided { kept: kept.chain(fused).collect(), quantized }
    }
}

/// Experts in one tensor: whoever splits them must not take them for quantized.
fn fused_experts(name: &str, shape: &[u64]) -> Option<String> {
    let (parent, _) = name.rsplit_once('.').filter(|_| shape.len() >= 3 && !name.ends_with(".weight"))?;
    Some(format!("re:{}\\..*", parent.replace('.', "\\.")))
}

/// What became of the modules.
pub(crate) fn decided(layers: &[LayerReport]) -> Result<Decided, CheckpointError> {
    let mut decided = Decided::default();
    for layer in layers {
        let Some(module) = layer.name.strip_suffix(".weight") else {
            decided.kept.extend(fused_experts(&layer.name, &layer.shape));
            continue;
        };
        match &layer.scheme {
            Some(scheme) => {
                let scheme = scheme.parse().map_err(|_| CheckpointError::Ours(format!("`{scheme}` was answered")))?;
                decided.quantized.insert(module.to_owned(), scheme);
            }
            None if layer.shape.len() >= 2 => drop(decided.kept.insert(module.to_owned())),
            None => {}
        }
    }
    Ok(decided)
}

/// Which tensor is in which file.
pub(crate) fn index(metadata: &Map<String, Value>, records: &[Record]) -> Value {
    let mut metadata = metadata.clone();
    let total: u64 = records.iter().flat_map(|record| record.tensors.values()).sum();
    metadata.insert("total_size".to_owned(), json!(total));
    // It counted those of the dense model.
    metadata.remove("total_parameters");
    let homes =
        records.iter().flat_map(|record| record.tensors.keys().map(|tensor| (tensor.clone(), json!(record.file))));
    let homes = BTreeMap::from_iter(homes);
    json!({ "metadata": metadata, "weight_map": homes })
}

pub(crate) fn text(value: &Value) -> Result<Vec<u8>, CheckpointError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| CheckpointError::Ours(error.to_string()))?;
    text.push(b'\n');
    Ok(text)
}

/// Whether a configuration, or one within it, says that its model is quantized.
pub(crate) fn says_quantized(config: &Map<String, Value>) -> bool {
    let has_it = SAYS_QUANTIZED.iter().any(|key| config.get(*key).is_some_and(|value| !value.is_null()));
    has_it || config.values().any(|value| value.as_object().is_some_and(says_quantized))
}

/// Whether a configuration says that its model is in the layout of compressed-tensors.
pub(crate) fn says_compressed_tensors(config: &Map<String, Value>) -> bool {
    let says = |value: &Value| value.get("quant_method").and_then(Value::as_str) == Some("compressed-tensors");
    config.get("quantization_config").is_some_and(says)
}

/// The configuration without what it says of codes that are decoded.
pub(crate) fn dense_config(config: Map<String, Value>) -> Map<String, Value> {
    let is_other = |key: &String| !SAYS_QUANTIZED.contains(&key.as_str());
    let within = |(key, value): (String, Value)| match value {
        Value::Object(object) => (key, Value::Object(dense_config(object))),
        other => (key, other),
    };
    config.into_iter().filter(|(key, _)| is_other(key)).map(within).collect()
}

/// The configuration of the dense model, with what was decided.
pub(crate) fn quantized_config(mut config: Map<String, Value>, decided: &Decided) -> Map<String, Value> {
    if decided.quantized.is_empty() {
        return config;
    }
    // What computes with bytes for scales is bf16: compressed-tensors makes that of it.
    let is_narrow = |scheme: &Scheme| !bitsandbytes::is_one(scheme) && scheme.format().scaling != Scaling::Weights;
    if decided.quantized.values().any(is_narrow) {
        let old = config.contains_key("torch_dtype");
        config.insert("dtype".to_owned(), json!("bfloat16"));
        if old {
            config.insert("torch_dtype".to_owned(), json!("bfloat16"));
        }
    }
    let mut ignore = decided.kept.clone();
    // A tied head has no tensor of its own, but it is a `Linear` all the same.
    if !decided.quantized.keys().any(|module| module.ends_with("lm_head")) {
        ignore.extend(["lm_head".to_owned(), "re:.*\\.lm_head$".to_owned()]);
    }
    let said = match decided.quantized.values().find(|scheme| bitsandbytes::is_one(scheme)) {
        Some(scheme) => bitsandbytes::configuration(&config, scheme, decided.quantized.values(), &ignore),
        None => quantization(decided, &ignore),
    };
    config.insert("quantization_config".to_owned(), said);
    config
}

fn quantization(decided: &Decided, ignore: &BTreeSet<String>) -> Value {
    let mut groups = BTreeMap::<String, (Scheme, Vec<&str>)>::new();
    for (module, scheme) in &decided.quantized {
        // How scales were chosen is over; what they are is not.
        let shown = group(scheme, &[]).to_string();
        groups.entry(shown).or_insert((*scheme, Vec::new())).1.push(module);
    }
    let formats = BTreeSet::from_iter(groups.values().map(|(scheme, _)| scheme.checkpoint_format()));
    let only = groups.len() == 1;
    let config_groups = groups.values().enumerate().map(|(at, (scheme, modules))| {
        let targets = if only { vec!["Linear"] } else { modules.clone() };
        (format!("group_{at}"), group(scheme, &targets))
    });
    let format = match formats.iter().next() {
        Some(format) if formats.len() == 1 => format,
        _ => "mixed-precision",
    };
    json!({
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "version": LAYOUT_VERSION,
        "global_compression_ratio": null,
        "kv_cache_scheme": null,
        "ignore": ignore,
        "config_groups": Map::from_iter(config_groups),
    })
}

fn group(scheme: &Scheme, targets: &[&str]) -> Value {
    json!({
        "targets": targets,
        "format": scheme.checkpoint_format(),
        "weights": weights(scheme),
        "input_activations": activations(scheme),
        "output_activations": null,
    })
}

fn weights(scheme: &Scheme) -> Value {
    let (bits, kind, symmetric) = match scheme.codes() {
        Codes::Int { bits, symmetric, .. } => (bits, "int", symmetric),
        Codes::Fp8E4m3 => (8, "float", true),
        Codes::Fp6E2m3 => (6, "float", true),
        Codes::Fp4E2m1 => (4, "float", true),
        // Refused before it comes to that: `checks.rs`. Those of bitsandbytes are said otherwise.
        codes @ (Codes::Codebook(_) | Codes::Rowwise | Codes::Block(_)) => (codes.bits(), "int", true),
    };
    let mut weights = json!({ "num_bits": bits, "type": kind, "symmetric": symmetric, "dynamic": false });
    let mut put = |key: &str, value: Value| weights[key] = value;
    match scheme.granularity() {
        Granularity::Tensor => put("strategy", json!("tensor")),
        Granularity::Channel => put("strategy", json!("channel")),
        Granularity::Group(size) => {
            let is_two_level = scheme.format().scaling == Scaling::E4m3;
            put("strategy", json!(if is_two_level { "tensor_group" } else { "group" }));
            put("group_size", json!(size.get()));
        }
        Granularity::Block { rows, columns } => {
            put("strategy", json!("block"));
            put("block_structure", json!([rows.get(), columns.get()]));
        }
    }
    let scale = match scheme.format().scaling {
        Scaling::Weights | Scaling::Absmax | Scaling::Nested | Scaling::InBlocks => None,
        Scaling::E8m0(_) => Some("torch.uint8"),
        Scaling::E4m3 => Some("torch.float8_e4m3fn"),
    };
    if let Some(scale) = scale {
        put("scale_dtype", json!(scale));
        put("zp_dtype", json!(scale));
    }
    weights
}

/// How the engine quantizes activations, for the presets that say so.
fn activations(scheme: &Scheme) -> Value {
    match scheme.preset().map(|preset| preset.name) {
        Some("W8A8" | "INT8") => {
            json!({ "num_bits": 8, "type": "int", "symmetric": true, "strategy": "token", "dynamic": true })
        }
        Some("FP8_DYNAMIC") => {
            json!({ "num_bits": 8, "type": "float", "symmetric": true, "strategy": "token", "dynamic": true })
        }
        Some("FP8_BLOCK") => {
            json!({ "num_bits": 8, "type": "float", "symmetric": true, "strategy": "group", "group_size": 128, "dynamic": true })
        }
        _ => Value::Null,
    }
}
