//! Which type each tensor gets of what `llama-quantize` calls a type: `Q4_K_M` gives some tensors more bits than others, and those whose columns it
//! does not divide another one.
//!
//! Source: `src/llama-quant.cpp` of llama.cpp as of PyPI's llama-cpp-python 0.3.36, without an importance matrix.

use quarrel_engine::Block;
use quarrel_proto::Reason;
use safetensors::Dtype;

use super::metadata::Metadata;
use crate::{element::Element, error::CheckpointError, fate::float_word, source::Tensor};

/// What `llama-quantize` can be asked for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mix {
    name: &'static str,
    /// Its number in a file, `general.file_type`.
    pub(crate) file_type: u32,
    usual: Usual,
}

/// What most tensors get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Usual {
    Float(Dtype),
    Blocks(Block),
}

const fn mix(name: &'static str, file_type: u32, block: Block) -> Mix {
    Mix { name, file_type, usual: Usual::Blocks(block) }
}

const fn float(name: &'static str, file_type: u32, dtype: Dtype) -> Mix {
    Mix { name, file_type, usual: Usual::Float(dtype) }
}

const MXFP4_MOE: &str = "MXFP4_MOE";

static MIXES: [Mix; 19] = [
    float("F32", 0, Dtype::F32),
    float("F16", 1, Dtype::F16),
    float("BF16", 32, Dtype::BF16),
    mix("Q8_0", 7, Block::Q8_0),
    mix("Q4_0", 2, Block::Q4_0),
    mix("Q4_1", 3, Block::Q4_1),
    mix("Q5_0", 8, Block::Q5_0),
    mix("Q5_1", 9, Block::Q5_1),
    mix("Q2_K", 10, Block::Q2K),
    mix("Q3_K_S", 11, Block::Q3K),
    mix("Q3_K_M", 12, Block::Q3K),
    mix("Q3_K_L", 13, Block::Q3K),
    mix("Q4_K_S", 14, Block::Q4K),
    mix("Q4_K_M", 15, Block::Q4K),
    mix("Q5_K_S", 16, Block::Q5K),
    mix("Q5_K_M", 17, Block::Q5K),
    mix("Q6_K", 18, Block::Q6K),
    mix("IQ4_NL", 25, Block::Iq4Nl),
    mix(MXFP4_MOE, 38, Block::Mxfp4),
];

/// What `llama-quantize` takes for others.
const ALIASES: [(&str, &str); 3] = [("Q3_K", "Q3_K_M"), ("Q4_K", "Q4_K_M"), ("Q5_K", "Q5_K_M")];

/// Of what models the rules of llama.cpp, or what it takes for their number of layers, are others than here.
const OTHERS: [&str; 6] = ["falcon", "bailingmoe3", "clip", "glm5-next", "granite-switch", "nanbeige"];

/// More layers than llama.cpp allows.
const BLOCKS_MAX: u64 = 512;

/// What a whole GGUF file may be, as `llama-quantize` calls it.
pub fn mixes() -> impl Iterator<Item = &'static str> {
    MIXES.iter().map(|mix| mix.name).chain(ALIASES.map(|(alias, _)| alias))
}

impl Mix {
    /// The mix of that name.
    ///
    /// # Errors
    /// [`CheckpointError::Command`] for a name of none.
    pub(crate) fn named(name: &str) -> Result<&'static Mix, CheckpointError> {
        let whole = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, whole)| whole);
        let found = MIXES.iter().find(|mix| mix.name == whole);
        found.ok_or_else(|| {
            let names = Vec::from_iter(mixes()).join(", ");
            let message = format!(
                "scheme `{}` is none of a whole GGUF file: expected {names}, COPY, or a recipe whose rules name types tensor by tensor",
                quarrel_engine::shorten(name, 100)
            );
            CheckpointError::Command { reason: Reason::SchemeUnknown, message }
        })
    }

    /// What each of a model's tensors gets, which are in the order of [`natural`](super::natural).
    ///
    /// # Errors
    /// Of what model the rules are not known.
    pub(crate) fn elements(&self, tensors: &[Tensor], facts: &Facts) -> Result<Vec<Element>, String> {
        if facts.architecture.is_empty() || facts.blocks > BLOCKS_MAX {
            return Err(format!(
                "it names no architecture, or {} layers: expected `general.architecture`, and at most {BLOCKS_MAX} of `block_count`",
                facts.blocks
            ));
        }
        if OTHERS.contains(&facts.architecture.as_str()) {
            return Err(format!(
                "llama.cpp has rules of their own for models of architecture `{}`, which this version does not: expected a recipe",
                facts.architecture
            ));
        }
        let usual = match self.usual {
            Usual::Float(dtype) => {
                let of = |tensor: &Tensor| if is_quantized(tensor) { dtype.into() } else { tensor.dtype };
                return Ok(tensors.iter().map(of).collect());
            }
            Usual::Blocks(block) => block,
        };
        let is_tied = !tensors.iter().any(|tensor| tensor.name == "output.weight");
        let values = tensors.iter().filter(|tensor| Part::of(&tensor.name).is_value()).count() as u64;
        let mut choice = Choice { mix: self, facts, is_tied, values, values_seen: 0, down_seen: 0 };
        let of = |tensor: &Tensor| match is_quantized(tensor) {
            true => Ok(fallback(tensor, choice.of(tensor, usual)?)),
            false => Ok(tensor.dtype),
        };
        tensors.iter().map(of).collect()
    }
}

/// What the rules look at beside names.
#[derive(Debug, Default)]
pub(crate) struct Facts {
    architecture: String,
    blocks: u64,
    experts: u64,
    /// Heads of queries to one of keys.
    shared: u64,
    /// Whether llama.cpp takes it for one of 70B.
    is_70b: bool,
}

impl Facts {
    /// Of what a file says.
    pub(crate) fn of(metadata: &Metadata) -> Facts {
        let architecture = metadata.text("general.architecture").unwrap_or_default().to_owned();
        let number = |key: &str| metadata.number(&format!("{architecture}.{key}"));
        let blocks = number("block_count").unwrap_or(0);
        let heads = number("attention.head_count").unwrap_or(0);
        let key_heads = number("attention.head_count_kv").unwrap_or(heads);
        let is_70b = match (architecture.as_str(), blocks) {
            ("llama", 80) => heads != key_heads,
            ("deci" | "olmo" | "qwen2", 80) | ("jais2", 68) => true,
            _ => false,
        };
        let shared = heads.checked_div(key_heads).unwrap_or(0);
        Facts { blocks, experts: number("expert_count").unwrap_or(0), shared, is_70b, architecture }
    }
}

/// What a tensor is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Output,
    Embedding,
    Fused,
    FusedKeyValue,
    Value,
    Key,
    AttentionOutput,
    Down,
    Other,
}

impl Part {
    fn of(name: &str) -> Part {
        let names = [
            ("attn_qkv.weight", Part::Fused),
            ("attn_kv_b.weight", Part::FusedKeyValue),
            ("attn_v.weight", Part::Value),
            ("attn_k.weight", Part::Key),
            ("attn_q.weight", Part::Other),
            ("attn_output.weight", Part::AttentionOutput),
            ("ffn_up", Part::Other),
            ("ffn_gate", Part::Other),
            ("ffn_down", Part::Down),
        ];
        match name {
            "output.weight" => Part::Output,
            "token_embd.weight" | "per_layer_token_embd.weight" => Part::Embedding,
            _ => names.iter().find(|(within, _)| name.contains(within)).map_or(Part::Other, |(_, part)| *part),
        }
    }

    fn is_value(self) -> bool {
        matches!(self, Part::Fused | Part::FusedKeyValue | Part::Value)
    }
}

/// What stays as it is, whatever is asked for: names that end so, are so, or have this in them.
const WHOLE: [&str; 2] = ["position_embd.weight", "token_types.weight"];
const WITHIN: [&str; 35] = [
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
];

/// Whether it is of those that get another type at all.
fn is_quantized(tensor: &Tensor) -> bool {
    // Leading ones are no dimensions to ggml.
    let rank = tensor.shape.iter().skip_while(|dimension| **dimension == 1).count();
    let name = tensor.name.as_str();
    let is_kept = WHOLE.contains(&name) || WITHIN.iter().any(|within| name.contains(within));
    // Of whole numbers nothing is made.
    let is_number = tensor.dtype.plain().is_none() || float_word(tensor.dtype).is_some();
    rank >= 2 && name.ends_with("weight") && !is_kept && is_number
}

/// The type of which the columns are whole blocks.
fn fallback(tensor: &Tensor, block: Block) -> Element {
    let columns = tensor.shape.last().copied().unwrap_or(1);
    let divides = |block: Block| columns.is_multiple_of(block.elements() as u64);
    let other = match block {
        block if divides(block) => return block.into(),
        Block::Q2K | Block::Q3K => Block::Q4_0,
        Block::Q4K => Block::Q5_0,
        Block::Q5K => Block::Q5_1,
        Block::Q6K => Block::Q8_0,
        other => other,
    };
    if divides(other) { other.into() } else { Dtype::F16.into() }
}

/// Tensor by tensor: some rules count.
struct Choice<'a> {
    mix: &'a Mix,
    facts: &'a Facts,
    is_tied: bool,
    values: u64,
    values_seen: u64,
    down_seen: u64,
}

impl Choice<'_> {
    fn of(&mut self, tensor: &Tensor, usual: Block) -> Result<Block, String> {
        let (facts, mix) = (self.facts, self.mix.name);
        let part = Part::of(&tensor.name);
        let is_eight = facts.experts == 8;
        let columns = tensor.shape.last().copied().unwrap_or(1);
        let chosen = match part {
            // Tied embeddings are the output too.
            Part::Output | Part::Embedding if part == Part::Output || self.is_tied => {
                let is_plain = mix == MXFP4_MOE || !columns.is_multiple_of(usual.elements() as u64);
                if is_plain || usual == Block::Q8_0 { Block::Q8_0 } else { Block::Q6K }
            }
            _ if mix == MXFP4_MOE => {
                let is_of_experts = tensor.shape.len() > 2 && tensor.shape[tensor.shape.len() - 3] > 1;
                if is_of_experts { Block::Mxfp4 } else { Block::Q8_0 }
            }
            Part::Fused | Part::FusedKeyValue | Part::Value => {
                let (at, all) = (self.values_seen, self.values);
                self.values_seen += 1;
                let chosen = match mix {
                    "Q2_K" if facts.shared >= 4 => Block::Q4K,
                    "Q2_K" => Block::Q3K,
                    "Q3_K_M" if at < 2 => Block::Q5K,
                    "Q3_K_M" => Block::Q4K,
                    "Q3_K_L" => Block::Q5K,
                    "IQ4_NL" if facts.shared >= 4 => Block::Q5K,
                    "Q4_K_M" | "Q5_K_M" if has_more_bits(at, all) => Block::Q6K,
                    "Q4_K_S" if at < 4 => Block::Q5K,
                    _ => usual,
                };
                match chosen {
                    _ if is_eight => Block::Q8_0,
                    Block::Q3K | Block::Q4K if facts.is_70b => Block::Q5K,
                    chosen => chosen,
                }
            }
            Part::Key if is_eight => Block::Q8_0,
            Part::Down => {
                let (at, all) = (self.layer(tensor)?, facts.blocks);
                self.down_seen += 1;
                match mix {
                    "Q2_K" => Block::Q3K,
                    "Q3_K_M" if at < all / 16 => Block::Q5K,
                    "Q3_K_M" => Block::Q4K,
                    "Q3_K_L" => Block::Q5K,
                    "Q4_K_M" | "Q5_K_M" if has_more_bits(at, all) => Block::Q6K,
                    "IQ4_NL" | "Q4_K_S" if at < all / 8 => Block::Q5K,
                    _ => usual,
                }
            }
            Part::AttentionOutput if is_eight => match mix {
                "Q2_K" | "Q3_K_S" | "Q3_K_M" | "Q4_K_S" | "Q4_K_M" | "IQ4_NL" => Block::Q5K,
                _ => usual,
            },
            Part::AttentionOutput => match mix {
                "Q2_K" => Block::Q3K,
                "Q3_K_M" => Block::Q4K,
                "Q3_K_L" => Block::Q5K,
                _ => usual,
            },
            Part::Output | Part::Embedding | Part::Key | Part::Other => usual,
        };
        Ok(chosen)
    }

    /// Which layer a tensor is of: with experts its name says so, else they are counted.
    fn layer(&self, tensor: &Tensor) -> Result<u64, String> {
        if self.facts.experts <= 1 {
            return Ok(self.down_seen);
        }
        let number = tensor.name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')?.0.parse().ok());
        let number = number.filter(|number| *number < self.facts.blocks);
        number.ok_or_else(|| format!("tensor `{}` is of no layer below {}", tensor.name, self.facts.blocks))
    }
}

fn has_more_bits(at: u64, all: u64) -> bool {
    at < all / 8 || at >= 7 * all / 8 || (at - all / 8) % 3 == 2
}
