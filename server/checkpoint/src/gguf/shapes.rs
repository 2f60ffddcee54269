//! The tensors of a model of the Llama family, as its metadata tell them.

use std::collections::HashMap;

use super::metadata::Metadata;

/// Tensors by name, and their shapes.
pub(crate) type Shapes = HashMap<String, Vec<u64>>;

/// More layers than any model; llama.cpp has at most 512.
const LAYERS_MAX: u64 = 1 << 10;
/// More than any number of a model.
const NUMBER_MAX: u64 = 1 << 32;

/// The tensors that a file with such metadata must have, and those that it may.
///
/// # Errors
/// A number that the metadata lack, or that is no model's.
pub(crate) fn shapes(metadata: &Metadata) -> Result<[Shapes; 2], String> {
    let said = |key: &str| metadata.number(&format!("llama.{key}")).filter(|number| (1..=NUMBER_MAX).contains(number));
    let needed = |key: &str| said(key).ok_or_else(|| format!("its metadata have no number `llama.{key}`"));
    let (layers, hidden) = (needed("block_count")?, needed("embedding_length")?);
    let (inner, heads) = (needed("feed_forward_length")?, needed("attention.head_count")?);
    let keys = said("attention.head_count_kv").unwrap_or(heads);
    let dimension = said("attention.key_length").unwrap_or(hidden / heads);
    let (queries, keys) = (heads.saturating_mul(dimension), keys.saturating_mul(dimension));
    if layers > LAYERS_MAX {
        return Err(format!("its metadata say {layers} layers: expected at most {LAYERS_MAX}"));
    }
    let vocabulary = vec![needed("vocab_size")?, hidden];
    let (mut must, mut may) = (Shapes::new(), Shapes::new());
    must.insert("token_embd.weight".to_owned(), vocabulary.clone());
    must.insert("output_norm.weight".to_owned(), vec![hidden]);
    may.insert("output.weight".to_owned(), vocabulary);
    may.insert("rope_freqs.weight".to_owned(), vec![dimension / 2]);
    let attention = [
        ("attn_q", vec![queries, hidden]),
        ("attn_k", vec![keys, hidden]),
        ("attn_v", vec![keys, hidden]),
        ("attn_output", vec![hidden, queries]),
    ];
    let rest = match said("expert_count") {
        None => {
            vec![("ffn_gate", vec![inner, hidden]), ("ffn_up", vec![inner, hidden]), ("ffn_down", vec![hidden, inner])]
        }
        Some(experts) => vec![
            ("ffn_gate_inp", vec![experts, hidden]),
            ("ffn_gate_exps", vec![experts, inner, hidden]),
            ("ffn_up_exps", vec![experts, inner, hidden]),
            ("ffn_down_exps", vec![experts, hidden, inner]),
        ],
    };
    for layer in 0..layers {
        for norm in ["attn_norm", "ffn_norm"] {
            must.insert(format!("blk.{layer}.{norm}.weight"), vec![hidden]);
        }
        for (part, shape) in attention.iter().chain(&rest) {
            let name = format!("blk.{layer}.{part}");
            may.insert(format!("{name}.bias"), vec![shape[shape.len() - 2]]);
            may.insert(format!("{name}.scale"), vec![1]);
            must.insert(format!("{name}.weight"), shape.clone());
        }
    }
    Ok([must, may])
}
