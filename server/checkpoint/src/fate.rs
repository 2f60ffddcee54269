//! What becomes of each tensor of a checkpoint: whether it goes through the quantizer, or is copied and why.
//!
//! A tensor that a recipe keeps is known by the plan before its bytes are read, so they need not travel. The plan is the
//! engine's own, the one that a server makes of the same command.

use std::collections::BTreeSet;

use quarrel_engine::{Granularity, Plan, Scheme};
use quarrel_proto::{
    Reason,
    v1::{self, command::Verb, quantize::How},
};
use safetensors::Dtype;

use crate::{
    checks::refuse_calibrated,
    element::Element,
    error::CheckpointError,
    gguf::mixes,
    source::{Source, Tensor},
};

/// What is to become of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It goes through the quantizer, with this element type.
    Sent(&'static str),
    /// It is copied unchanged.
    Copied {
        /// Why.
        reason: Reason,
        /// The same as a sentence.
        message: String,
    },
}

/// The recipe that a scheme stands for where whole checkpoints are quantized: `* -> scheme`, of a model's folder `Linear -> scheme`, with what `ignore` names and
/// what its groups do not divide left as it is.
pub fn checkpoint_recipe(rule: v1::Rule, ignore: Vec<String>, is_model: bool) -> v1::Recipe {
    let is_grouped = |scheme: Scheme| matches!(scheme.granularity(), Granularity::Group(_));
    let is_grouped = rule.group_size.is_some() || rule.scheme.parse().is_ok_and(is_grouped);
    let keep = || is_grouped.then(|| "keep".to_owned());
    let on_indivisible = rule.on_indivisible.clone().or_else(keep);
    // Fused experts have two channel dimensions; the ordinary weights beside them have one.
    let linear = rule.channel_dims.is_some_and(|dims| dims > 1).then(|| v1::Rule {
        targets: vec!["Linear".to_owned()],
        on_indivisible: on_indivisible.clone(),
        channel_dims: None,
        ..rule.clone()
    });
    // Of a model, whoever loads it looks for codes in `Linear` modules alone.
    let targets = if is_model { "Linear" } else { "*" };
    let every = v1::Rule { targets: vec![targets.to_owned()], on_indivisible, ..rule };
    v1::Recipe { rules: linear.into_iter().chain([every]).collect(), ignore }
}

/// What a stream's command means for a whole checkpoint: a bare scheme stands for the recipe that leaves `@standard` as it is.
pub fn of_checkpoint(command: v1::Quantize, is_model: bool) -> v1::Quantize {
    match command.how {
        Some(How::Scheme(scheme)) => {
            let rule = v1::Rule {
                targets: Vec::new(),
                scheme,
                group_size: command.group_size,
                channel_dims: command.channel_dims,
                on_indivisible: command.on_indivisible,
                fallback: command.fallback,
                amax: command.amax,
            };
            let recipe = checkpoint_recipe(rule, vec!["@standard".to_owned()], is_model);
            let (arith, on_error) = (command.arith, command.on_error);
            v1::Quantize { how: Some(How::Recipe(recipe)), arith, on_error, ..v1::Quantize::default() }
        }
        how => v1::Quantize { how, ..command },
    }
}

/// The element type of weights, in the wire's word.
pub(crate) fn float_word(element: Element) -> Option<&'static str> {
    match element.plain()? {
        Dtype::F32 => Some("f32"),
        Dtype::F16 => Some("f16"),
        Dtype::BF16 => Some("bf16"),
        Dtype::F64 => Some("f64"),
        _ => None,
    }
}

/// The type of a word of the wire, the other way.
pub(crate) fn dtype_of(word: &str) -> Dtype {
    match word {
        "f16" => Dtype::F16,
        "bf16" => Dtype::BF16,
        "f64" => Dtype::F64,
        "f8_e4m3" => Dtype::F8_E4M3,
        "f8_e5m2" => Dtype::F8_E5M2,
        _ => Dtype::F32,
    }
}

/// The plan of a command, as the engine makes it of a stream's.
pub(crate) fn plan_of(command: &v1::Quantize) -> Result<Plan, CheckpointError> {
    let verb = Verb::Quantize(command.clone());
    Plan::new(&v1::Command { verb: Some(verb), ..Default::default() }).map_err(|error| {
        let (reason, mut message) = (error.reason(), error.to_string());
        let rules = match &command.how {
            Some(How::Recipe(recipe)) => recipe.rules.as_slice(),
            _ => &[],
        };
        let asked = command.how.iter().filter_map(|how| if let How::Scheme(name) = how { Some(name) } else { None });
        let of_files = asked.chain(rules.iter().map(|rule| &rule.scheme)).find(|name| mixes().any(|mix| mix == **name));
        if let Some(name) = of_files.filter(|_| reason == Reason::SchemeUnknown) {
            message = format!(
                "scheme `{name}` is of a whole GGUF file, and of no layer: expected a destination `.gguf` (of `estimate` the flag `--gguf`) and \
                 no recipe, or a scheme of layers, as `Q4_K`"
            );
        }
        CheckpointError::Command { reason, message }
    })
}

/// Decides for each tensor of a model, in the order of its files.
///
/// # Errors
/// [`CheckpointError::Command`] for a command that gets something wrong, or that needs what weights alone cannot give.
pub fn fates(shards: &[Source], command: &v1::Quantize) -> Result<Vec<Vec<Fate>>, CheckpointError> {
    let plan = plan_of(command)?;
    refuse_calibrated(&plan)?;
    // What lies beside the codes of a module in the layouts of compressed-tensors, DeepSeek, GPTQ, AWQ and bitsandbytes.
    let marks = ["weight_scale", "weight_packed", "weight_scale_inv", "qweight", "weight.absmax", "SCB"];
    let names = shards.iter().flat_map(Source::tensors).map(|tensor| tensor.name.as_str());
    let coded = names.filter_map(|name| marks.iter().find_map(|mark| name.strip_suffix(mark)?.strip_suffix('.')));
    let coded = BTreeSet::from_iter(coded);
    let of = |shard: &Source| shard.tensors().iter().map(|tensor| fate(tensor, &plan, &coded)).collect();
    Ok(shards.iter().map(of).collect())
}

fn fate(tensor: &Tensor, plan: &Plan, coded: &BTreeSet<&str>) -> Fate {
    let copied = |reason, what: &str| Fate::Copied { reason, message: format!("tensor `{}`: {what}", tensor.name) };
    let module = tensor.name.strip_suffix(".weight");
    let is_fp8 = matches!(tensor.dtype.plain(), Some(Dtype::F8_E4M3 | Dtype::F8_E5M2));
    match (module, float_word(tensor.dtype)) {
        (Some(module), _) if coded.contains(module) => {
            copied(Reason::AlreadyQuantized, "scales lie beside it: it is quantized already")
        }
        (_, None) if tensor.dtype.plain().is_none() => {
            copied(Reason::AlreadyQuantized, &format!("its type is {}: it is quantized already", tensor.dtype))
        }
        // Without scales beside it: codes all the same, not numbers.
        (Some(_), None) if is_fp8 => copied(Reason::AlreadyQuantized, "it is FP8: it is quantized already"),
        (_, None) => copied(
            Reason::NotFloat,
            &format!("its type is {}: only F32, F16, BF16 and F64 are quantized", tensor.dtype),
        ),
        (None, Some(_)) => copied(Reason::NotAWeight, "its name does not end in `.weight`"),
        (Some(_), Some(word)) => match plan.keeps(&tensor.name, &tensor.shape, word) {
            Some(note) => Fate::Copied { reason: note.reason, message: note.message },
            None => Fate::Sent(word),
        },
    }
}
