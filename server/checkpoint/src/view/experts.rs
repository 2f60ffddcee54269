//! Experts of a mixture that a model stores in one tensor: loaders look for codes in a module for each, so they are split.
//!
//! The rule and the names are those of llm-compressor 0.14, `split_fused_moe_experts`. What is split is a part of the source's tensor where it lies: nothing
//! is copied.

use quarrel_engine::Plan;
use serde_json::{Map, Value};

use crate::{
    fate::float_word,
    source::{Source, Tensor},
};

/// A tensor of experts, and the matrices that each has in it, one under the other.
const FUSED: [(&str, &[&str]); 2] = [("gate_up_proj", &["gate_proj", "up_proj"]), ("down_proj", &["down_proj"])];

/// More than any model has in one tensor.
const MATRICES_MAX: u64 = 1 << 14;

/// Models whose experts are stored transposed, where their shapes do not tell.
const TRANSPOSED: [&str; 4] = ["gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe"];

/// A file with such tensors split, but for those of which the command quantizes nothing.
pub(super) fn file(shard: &Source, plan: &Plan, config: &Map<String, Value>) -> Source {
    let mut is_split = false;
    let parts = shard.tensors().iter().flat_map(|tensor| {
        let parts = experts(tensor, config).filter(|parts| parts.iter().any(|part| is_quantized(part, plan)));
        is_split |= parts.is_some();
        parts.unwrap_or_else(|| vec![tensor.clone()])
    });
    let parts = parts.collect();
    if is_split { shard.with(parts, None) } else { shard.clone() }
}

fn is_quantized(tensor: &Tensor, plan: &Plan) -> bool {
    float_word(tensor.dtype).is_some_and(|word| plan.keeps(&tensor.name, &tensor.shape, word).is_none())
}

/// The matrices of a tensor of experts.
fn experts(tensor: &Tensor, config: &Map<String, Value>) -> Option<Vec<Tensor>> {
    let name = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
    let (parent, last) = name.rsplit_once('.')?;
    let (fused, parts) = FUSED.iter().find(|(fused, _)| *fused == last)?;
    let [experts, rows, columns] = *tensor.shape.as_slice() else { return None };
    // A header may claim any number of them, of nothing.
    let matrices = experts.checked_mul(parts.len() as u64).filter(|matrices| *matrices <= MATRICES_MAX)?;
    let is_whole = tensor.bytes() > 0 && rows % parts.len() as u64 == 0;
    if !is_whole || is_transposed(fused, (rows, columns), config) {
        return None;
    }
    let (height, bytes) = (rows / parts.len() as u64, tensor.bytes() / matrices);
    let matrix = |at: u64| {
        let (expert, part) = (at / parts.len() as u64, parts[(at % parts.len() as u64) as usize]);
        let start = tensor.at.start + at * bytes;
        Tensor {
            name: format!("{parent}.{expert}.{part}.weight"),
            dtype: tensor.dtype,
            shape: vec![height, columns],
            at: start..start + bytes,
            scheme: tensor.scheme,
        }
    };
    Some((0..matrices).map(matrix).collect())
}

/// Whether the matrices are stored with their inputs first: `hidden_size` is what they read or, the last of them, write.
fn is_transposed(fused: &str, (rows, columns): (u64, u64), config: &Map<String, Value>) -> bool {
    let text = config.get("text_config").and_then(Value::as_object);
    let of = |key: &str| config.get(key).or_else(|| text?.get(key));
    let is_known = |config: &Value| config.as_str().is_some_and(|kind| TRANSPOSED.contains(&kind));
    let (hidden, other) = if fused == "down_proj" { (rows, columns) } else { (columns, rows) };
    match of("hidden_size").and_then(Value::as_u64) {
        Some(size) if hidden != other => size == other,
        _ => of("model_type").is_some_and(is_known),
    }
}
