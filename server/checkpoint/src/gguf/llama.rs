//! Models of the Llama family as transformers saves them, in llama.cpp's words: names of tensors, order of rows, and what a file says of the model.
//!
//! Source: `conversion/base.py` and `conversion/llama.py` of llama.cpp as of PyPI's llama-cpp-python 0.3.36.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::metadata::Metadata;

/// Models whose tensors are those of Llama.
const FAMILY: [&str; 4] = ["LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"];

/// What a tensor of transformers is to llama.cpp.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Named {
    /// A tensor of that name; whose heads' rows are in another order, if they are.
    Whole(String, Rows),
    /// That of one expert, which is a part of one.
    Expert(String, u64),
    /// Nothing: it is computed.
    Nothing,
}

/// The order of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rows {
    AsTheyAre,
    /// As many heads as queries have, each in the order of llama.cpp's rotation.
    Queries,
    /// As many as keys have.
    Keys,
}

impl Rows {
    /// Of how many heads the rows of a tensor of that shape are to be put in another order, of these numbers of queries and of keys.
    ///
    /// # Errors
    /// Rows that are not of as many heads.
    pub(crate) fn heads(self, [queries, keys]: [u64; 2], shape: &[u64]) -> Result<Option<u64>, String> {
        let heads = match self {
            Rows::AsTheyAre => return Ok(None),
            Rows::Queries => queries,
            Rows::Keys => keys,
        };
        let fits = shape.first().is_some_and(|rows| rows.is_multiple_of(2 * heads));
        if fits { Ok(Some(heads)) } else { Err(format!("of shape {shape:?} is not of {heads} heads")) }
    }
}

const LAYER: [(&str, &str, Rows); 10] = [
    ("input_layernorm", "attn_norm", Rows::AsTheyAre),
    ("post_attention_layernorm", "ffn_norm", Rows::AsTheyAre),
    ("self_attn.q_proj", "attn_q", Rows::Queries),
    ("self_attn.k_proj", "attn_k", Rows::Keys),
    ("self_attn.v_proj", "attn_v", Rows::AsTheyAre),
    ("self_attn.o_proj", "attn_output", Rows::AsTheyAre),
    ("mlp.gate_proj", "ffn_gate", Rows::AsTheyAre),
    ("mlp.up_proj", "ffn_up", Rows::AsTheyAre),
    ("mlp.down_proj", "ffn_down", Rows::AsTheyAre),
    ("block_sparse_moe.gate", "ffn_gate_inp", Rows::AsTheyAre),
];
const OUTSIDE: [(&str, &str); 3] = [("embed_tokens", "token_embd"), ("norm", "output_norm"), ("lm_head", "output")];
const EXPERTS: [(&str, &str); 3] = [("w1", "ffn_gate_exps"), ("w2", "ffn_down_exps"), ("w3", "ffn_up_exps")];

/// What a tensor is to llama.cpp, if it is anything.
pub(crate) fn named(name: &str) -> Option<Named> {
    if name.ends_with(".rotary_emb.inv_freq") {
        return Some(Named::Nothing);
    }
    let (module, part) = name.rsplit_once('.').filter(|(_, part)| ["weight", "bias"].contains(part))?;
    let module = module.strip_prefix("model.").unwrap_or(module);
    if let Some((_, other)) = OUTSIDE.iter().find(|(known, _)| *known == module) {
        return Some(Named::Whole(format!("{other}.{part}"), Rows::AsTheyAre));
    }
    let (number, within) = module.strip_prefix("layers.")?.split_once('.')?;
    let number = number.parse::<u32>().ok()?;
    if let Some((_, other, rows)) = LAYER.iter().find(|(known, ..)| *known == within) {
        return Some(Named::Whole(format!("blk.{number}.{other}.{part}"), *rows));
    }
    let (expert, which) = within.strip_prefix("block_sparse_moe.experts.")?.split_once('.')?;
    let (_, other) = EXPERTS.iter().find(|(known, _)| *known == which)?;
    Some(Named::Expert(format!("blk.{number}.{other}.{part}"), expert.parse().ok()?))
}

/// What a tensor of llama.cpp is to transformers; none of experts, which are several.
pub(crate) fn unnamed(name: &str) -> Option<(String, Rows)> {
    let (module, part) = name.rsplit_once('.').filter(|(_, part)| ["weight", "bias"].contains(part))?;
    if let Some((known, _)) = OUTSIDE.iter().find(|(_, other)| *other == module) {
        let prefix = if *known == "lm_head" { "" } else { "model." };
        return Some((format!("{prefix}{known}.{part}"), Rows::AsTheyAre));
    }
    let (number, within) = module.strip_prefix("blk.")?.split_once('.')?;
    let number = number.parse::<u32>().ok()?;
    let (known, _, rows) = LAYER.iter().find(|(_, other, _)| *other == within)?;
    Some((format!("model.layers.{number}.{known}.{part}"), *rows))
}

/// Heads of queries and of keys.
///
/// # Errors
/// What the metadata lack, or no number of heads.
pub(crate) fn heads(metadata: &Metadata) -> Result<[u64; 2], String> {
    const MOST: u64 = 1 << 16;
    let of = |key: &str| {
        let key = format!("llama.attention.{key}");
        if !metadata.has(&key) {
            return Ok(None);
        }
        let number = metadata.number(&key).filter(|number| (1..=MOST).contains(number));
        number.map(Some).ok_or_else(|| format!("its `{key}` is no number of heads: expected one from 1 to {MOST}"))
    };
    let queries = of("head_count")?.ok_or("its number of heads is not known")?;
    Ok([queries, of("head_count_kv")?.unwrap_or(queries)])
}

/// Whether a configuration is of a model of the family.
///
/// # Errors
/// What it is instead.
pub(crate) fn is_of_the_family(config: &Map<String, Value>) -> Result<(), String> {
    let architecture = config.get("architectures").and_then(|names| names.get(0)).and_then(Value::as_str);
    match architecture {
        Some(name) if FAMILY.contains(&name) => Ok(()),
        Some(name) => Err(format!(
            "its architecture is `{name}`, whose tensors' names and order of rows in GGUF are not known here: expected one of {}",
            FAMILY.join(", ")
        )),
        None => Err("its config.json names no architecture".to_owned()),
    }
}

/// A model's configuration, whose numbers are what they say, or an error.
struct Config<'a>(&'a Map<String, Value>);

impl Config<'_> {
    fn said(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// A whole number above zero; none where nothing is said.
    fn number(&self, key: &str) -> Result<Option<u32>, String> {
        let Some(value) = self.said(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|number| *number > 0);
        let wrong = || format!("its config.json has `{key}` {value}: expected a whole number from 1 to 2^32");
        number.map(Some).ok_or_else(wrong)
    }

    fn needed(&self, key: &str) -> Result<u32, String> {
        self.number(key)?.ok_or_else(|| format!("its config.json has no number `{key}`"))
    }

    fn head_dimension(&self) -> Result<u32, String> {
        if let Some(said) = self.number("head_dim")? {
            return Ok(said);
        }
        let (hidden, heads) = (self.needed("hidden_size")?, self.needed("num_attention_heads")?);
        match hidden % heads {
            0 => Ok(hidden / heads),
            _ => Err(format!("its `hidden_size` {hidden} is not of {heads} heads: expected a `head_dim`")),
        }
    }
}

/// A number above zero that f32 holds.
fn positive(value: &Value, key: &str) -> Result<f64, String> {
    let number = value.as_f64().filter(|number| (*number as f32).is_finite() && *number as f32 > 0.0);
    number.ok_or_else(|| format!("its config.json has `{key}` {value}: expected a number above zero"))
}

/// What a file says of the model: all but its tokenizer.
///
/// # Errors
/// What lacks, is not what it should be, or has no place in a file.
pub(crate) fn metadata(config: &Map<String, Value>, name: &str) -> Result<Metadata, String> {
    is_of_the_family(config)?;
    let said = Config(config);
    let mut found = Metadata::default();
    found.put_text("general.architecture", "llama");
    found.put_text("general.type", "model");
    found.put_text("general.name", name);
    found.put_u32("llama.block_count", said.needed("num_hidden_layers")?);
    found.put_u32("llama.context_length", said.needed("max_position_embeddings")?);
    found.put_u32("llama.embedding_length", said.needed("hidden_size")?);
    found.put_u32("llama.feed_forward_length", said.needed("intermediate_size")?);
    let heads = said.needed("num_attention_heads")?;
    found.put_u32("llama.attention.head_count", heads);
    found.put_u32("llama.attention.head_count_kv", said.number("num_key_value_heads")?.unwrap_or(heads));
    let rope = Rope::of(config)?;
    rope.scaling(&mut found)?;
    found.put_f32("llama.rope.freq_base", rope.theta as f32);
    let epsilon = said.said("rms_norm_eps").ok_or("its config.json has no number `rms_norm_eps`")?;
    found.put_f32("llama.attention.layer_norm_rms_epsilon", positive(epsilon, "rms_norm_eps")? as f32);
    let experts = said.number("num_local_experts")?;
    if let Some(experts) = experts {
        found.put_u32("llama.expert_count", experts);
        found.put_u32("llama.expert_used_count", said.needed("num_experts_per_tok")?);
    }
    // transformers' own configuration of Mixtral has none where the file has none.
    let dimension = said.head_dimension()?;
    if said.number("head_dim")?.is_some() || experts.is_none() {
        found.put_u32("llama.attention.key_length", dimension);
        found.put_u32("llama.attention.value_length", dimension);
    }
    found.put_u32("llama.vocab_size", said.needed("vocab_size")?);
    found.put_u32("llama.rope.dimension_count", dimension);
    Ok(found)
}

/// How positions are rotated: of transformers 5 `rope_parameters`, before it `rope_theta` and `rope_scaling`.
struct Rope {
    theta: f64,
    kind: String,
    said: BTreeMap<String, f64>,
}

impl Rope {
    fn of(config: &Map<String, Value>) -> Result<Rope, String> {
        let mut said = Map::new();
        for key in ["rope_parameters", "rope_scaling"] {
            match config.get(key) {
                Some(Value::Object(object)) if said.is_empty() => said.clone_from(object),
                None | Some(Value::Null | Value::Object(_)) => {}
                Some(other) => return Err(format!("its config.json has `{key}` {other}: expected an object")),
            }
        }
        let there = |object: &Map<String, Value>, key: &str| object.get(key).filter(|value| !value.is_null()).cloned();
        let theta = there(&said, "rope_theta").or_else(|| there(config, "rope_theta"));
        let theta = theta.map_or(Ok(10_000.0), |theta| positive(&theta, "rope_theta"))?;
        let kind = match there(&said, "rope_type").or_else(|| there(&said, "type")) {
            None => "default".to_owned(),
            Some(Value::String(kind)) => kind,
            Some(other) => return Err(format!("its rope scaling is of type {other}: expected a text")),
        };
        let mut numbers = BTreeMap::new();
        let is_scaling = |key: &str| kind != "default" && !["rope_type", "type", "rope_theta"].contains(&key);
        for (key, value) in said.iter().filter(|(key, _)| is_scaling(key)) {
            if value.is_number() || value.is_string() {
                numbers.insert(key.clone(), positive(value, key)?);
            }
        }
        Ok(Rope { theta, kind, said: numbers })
    }

    fn scaling(&self, found: &mut Metadata) -> Result<(), String> {
        let factor = self.said.get("factor");
        let needed = |key: &str| self.said.get(key).copied().ok_or_else(|| format!("its rope scaling has no `{key}`"));
        match (self.kind.as_str(), factor) {
            ("default" | "llama3", _) => {}
            ("linear", Some(factor)) => {
                found.put_text("llama.rope.scaling.type", "linear");
                found.put_f32("llama.rope.scaling.factor", *factor as f32);
            }
            ("yarn", Some(factor)) => {
                found.put_text("llama.rope.scaling.type", "yarn");
                found.put_f32("llama.rope.scaling.factor", *factor as f32);
                let before = needed("original_max_position_embeddings")?;
                found.put_u32("llama.rope.scaling.original_context_length", before as u32);
                let others = [
                    ("extrapolation_factor", "yarn_ext_factor"),
                    ("attention_factor", "yarn_attn_factor"),
                    ("beta_fast", "yarn_beta_fast"),
                    ("beta_slow", "yarn_beta_slow"),
                ];
                for (key, word) in others {
                    if let Some(number) = self.said.get(key) {
                        found.put_f32(&format!("llama.rope.scaling.{word}"), *number as f32);
                    }
                }
            }
            (kind, _) => {
                return Err(format!(
                    "its rope scaling is `{kind}`, or has no factor: expected llama3, linear or yarn, or none"
                ));
            }
        }
        Ok(())
    }
}

/// By what Llama 3's scaling divides the frequencies: the tensor `rope_freqs.weight`; none for others.
///
/// # Errors
/// Numbers of which no scaling comes.
pub(crate) fn frequency_factors(config: &Map<String, Value>) -> Result<Option<Vec<f32>>, String> {
    let rope = Rope::of(config)?;
    if rope.kind != "llama3" {
        return Ok(None);
    }
    let dimension = Config(config).head_dimension()?;
    let of = |key: &str, usual: f64| rope.said.get(key).copied().unwrap_or(usual);
    let (factor, low, high) = (of("factor", 8.0), of("low_freq_factor", 1.0), of("high_freq_factor", 4.0));
    if low >= high || dimension > 1 << 16 {
        return Err(format!("its rope scaling has factors {low} and {high} of frequencies: expected rising ones"));
    }
    let before = of("original_max_position_embeddings", 8192.0);
    let (longest, shortest) = (before / low, before / high);
    // In f32, and a number over a tensor as the number times the inverse, where llama.cpp's converter computes so.
    let of = |at: u32| {
        let exponent = (2 * at) as f32 / dimension as f32;
        let frequency = (rope.theta.powf(f64::from(exponent)) as f32).recip();
        let wave = frequency.recip() * std::f64::consts::TAU as f32;
        match f64::from(wave) {
            length if length < shortest => 1.0,
            length if length > longest => factor as f32,
            _ => {
                let smooth = (wave.recip() * before as f32 - low as f32) / (high - low) as f32;
                ((1.0 - smooth) / factor as f32 + smooth).recip()
            }
        }
    };
    Ok(Some((0..dimension / 2).map(of).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_llama_cpp() {
        let whole = |name: &str, rows| Some(Named::Whole(name.to_owned(), rows));
        assert_eq!(named("model.embed_tokens.weight"), whole("token_embd.weight", Rows::AsTheyAre));
        assert_eq!(named("lm_head.weight"), whole("output.weight", Rows::AsTheyAre));
        assert_eq!(named("layers.3.self_attn.q_proj.bias"), whole("blk.3.attn_q.bias", Rows::Queries));
        assert_eq!(named("model.layers.12.self_attn.k_proj.weight"), whole("blk.12.attn_k.weight", Rows::Keys));
        assert_eq!(
            named("model.layers.0.block_sparse_moe.experts.7.w2.weight"),
            Some(Named::Expert("blk.0.ffn_down_exps.weight".to_owned(), 7))
        );
        assert_eq!(named("model.layers.0.self_attn.rotary_emb.inv_freq"), Some(Named::Nothing));
        assert_eq!(
            unnamed("blk.3.attn_q.bias"),
            Some(("model.layers.3.self_attn.q_proj.bias".to_owned(), Rows::Queries))
        );
        assert_eq!(unnamed("output.weight"), Some(("lm_head.weight".to_owned(), Rows::AsTheyAre)));
        assert_eq!(unnamed("blk.0.ffn_up_exps.weight"), None);
        for other in [
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.x.mlp.up_proj.weight",
            "weight",
            "model.norm.scale",
        ] {
            assert_eq!(named(other), None, "{other}");
        }
    }
}
