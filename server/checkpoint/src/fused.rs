//! Layers that inference engines fuse into one, and so must share NVFP4's global scale: a first pass over the model finds the
//! greatest magnitude of each set, and rules give it to the quantizer as a fact.
//!
//! The sets are those of llm-compressor 0.14, `FUSED_LAYER_NAMES`.

use std::{
    collections::{BTreeMap, HashMap},
    io,
};

use quarrel_engine::{Granularity, Level, Plan, Scaling, Scheme, amax};
use quarrel_proto::{
    Reason,
    v1::{self, quantize::How},
};
use serde::{Deserialize, Serialize};

use crate::{
    error::CheckpointError,
    fate::{float_word, plan_of},
    layer::module_of,
    source::{Source, Tensor},
    target::Stop,
};

/// Names of modules under one parent that are fused.
const SETS: [&[&str]; 4] =
    [&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"], &["w1", "w3"], &["q_a_proj", "kv_a_proj_with_mqa"]];

/// A tensor, and the file that it is in.
type Found<'a> = (&'a Source, &'a Tensor);

/// A larger layer is not held until its global scale is known: it is read twice, alone or not.
const LARGE_BYTES: u64 = 32 << 20;

/// Whether all of a layer is held while it is quantized.
pub(crate) fn is_whole(scheme: &Scheme, tensor: &Tensor) -> bool {
    let is_small = tensor.bytes() <= LARGE_BYTES;
    match scheme.format().scaling {
        Scaling::Nested => true,
        Scaling::E4m3 => is_small,
        _ => scheme.granularity() == Granularity::Tensor,
    }
}

/// Bytes of a tensor that are read at a time.
const STEP_BYTES: u64 = 4 << 20;

/// A set of fused layers that share a global scale, or one layer that is large: a fact over the whole model.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Fused {
    /// Their tensors.
    layers: Vec<String>,
    scheme: String,
    /// Their greatest magnitude.
    amax: f64,
}

/// The fused sets that get a scheme with a global scale. Where a set's numbers are not finite there is none: the quantizer says which.
///
/// # Errors
/// [`CheckpointError::Command`] for a command that gets something wrong, [`CheckpointError::Io`]; the latter too, of kind
/// `Interrupted`, if `stop` comes first.
pub(crate) fn fused(shards: &[Source], command: &v1::Quantize, stop: &Stop) -> Result<Vec<Fused>, CheckpointError> {
    let plan = plan_of(command)?;
    let mut found = Vec::new();
    let Some(How::Recipe(recipe)) = &command.how else { return Ok(found) };
    // Somebody knows better.
    let is_said = recipe.rules.iter().any(|rule| rule.amax.is_some());
    for (scheme, tensors) in sets(shards, &plan) {
        let is_large = !is_said && tensors.iter().any(|(_, tensor)| tensor.bytes() > LARGE_BYTES);
        if (tensors.len() > 1 || is_large)
            && let Some(amax) = greatest(&tensors, stop)?
        {
            let layers = tensors.iter().map(|(_, tensor)| tensor.name.clone()).collect();
            found.push(Fused { layers, scheme: scheme.to_string(), amax: amax.into() });
        }
    }
    Ok(found)
}

/// The command for some layers, with a rule more for each fused set that has one among them.
pub(crate) fn with_shared_scales(
    command: &v1::Quantize,
    sets: &[Fused],
    is_asked: impl Fn(&str) -> bool,
) -> v1::Quantize {
    let mut command = command.clone();
    if let Some(How::Recipe(recipe)) = &mut command.how {
        let sets = sets.iter().filter(|set| set.layers.iter().any(|layer| is_asked(layer)));
        let rules = sets.map(|set| v1::Rule {
            targets: set.layers.iter().map(|layer| exactly(layer)).collect(),
            scheme: set.scheme.clone(),
            amax: Some(set.amax),
            ..Default::default()
        });
        recipe.rules.splice(0..0, Vec::from_iter(rules));
    }
    command
}

/// Global scales of fused layers as a stream brings them.
#[derive(Debug, Default)]
pub(crate) struct Shared(HashMap<(String, usize), (String, f32)>);

impl Shared {
    /// Whether a layer has its set's.
    ///
    /// # Errors
    /// [`CheckpointError::Layer`] if another layer of the set has a different one.
    pub(crate) fn check(&mut self, layer: &str, scale: f32) -> Result<(), CheckpointError> {
        let Some((parent, set)) = set_of(module_of(layer)) else { return Ok(()) };
        let first = self.0.entry((parent.to_owned(), set)).or_insert_with(|| (layer.to_owned(), scale));
        if first.1 == scale {
            return Ok(());
        }
        let message = format!(
            "layer `{layer}` has the global scale {scale} and `{}` {}: inference engines fuse them, and expect one; give both \
             the greatest magnitude over the set, `amax`",
            first.0, first.1
        );
        Err(CheckpointError::Layer { reason: Reason::FusedScalesDiffer, message })
    }
}

/// The parent of a module that is fused with others, and the set that they are.
fn set_of(module: &str) -> Option<(&str, usize)> {
    let (parent, name) = module.rsplit_once('.').unwrap_or(("", module));
    Some((parent, SETS.iter().position(|set| set.contains(&name))?))
}

/// The target that matches a layer of that name alone: a name may read as a pattern, which would match others, or be none that can be compiled.
pub(crate) fn exactly(layer: &str) -> String {
    const MARKS: [char; 6] = ['*', '?', '[', '{', '}', '\\'];
    let is_plain = !layer.contains(MARKS) && !layer.starts_with("re:") && !layer.starts_with('@');
    if is_plain {
        return layer.to_owned();
    }
    // What it begins with makes it a regex or a set.
    let is_first = |at: usize, letter: char| at == 0 && ['r', '@'].contains(&letter);
    let class = |(at, letter): (usize, char)| match is_first(at, letter) || MARKS.contains(&letter) {
        true => format!("[{letter}]"),
        false => letter.to_string(),
    };
    layer.chars().enumerate().map(class).collect()
}

/// The fused sets among what is quantized with a global scale, in the order of their names.
fn sets<'a>(shards: &'a [Source], plan: &Plan) -> Vec<(Scheme, Vec<Found<'a>>)> {
    let mut found: BTreeMap<(&str, usize, String), (Scheme, Vec<Found<'_>>)> = BTreeMap::new();
    let tensors = shards.iter().flat_map(|shard| shard.tensors().iter().map(move |tensor| (shard, tensor)));
    for (shard, tensor) in tensors {
        let Some(module) = tensor.name.strip_suffix(".weight") else { continue };
        // What cannot be quantized is told when its turn comes.
        let schemes = float_word(tensor.dtype).and_then(|word| plan.schemes_of(&tensor.name, &tensor.shape, word).ok());
        let scheme = schemes.and_then(|schemes| <[Scheme; 1]>::try_from(schemes).ok()).map(|[scheme]| scheme);
        // One that is not fused is a set of its own.
        let (parent, set) = set_of(module).unwrap_or((module, SETS.len()));
        if let Some(scheme) = scheme
            && scheme.format().scaling == Scaling::E4m3
        {
            found.entry((parent, set, scheme.to_string())).or_insert((scheme, Vec::new())).1.push((shard, tensor));
        }
    }
    found.into_values().collect()
}

/// The greatest magnitude over the tensors, if all of their numbers are finite.
fn greatest(tensors: &[Found<'_>], stop: &Stop) -> Result<Option<f32>, CheckpointError> {
    let mut most = 0f32;
    for (source, tensor) in tensors {
        let Some(word) = float_word(tensor.dtype) else { return Ok(None) };
        for start in (0..tensor.bytes()).step_by(STEP_BYTES as usize) {
            let range = start..tensor.bytes().min(start + STEP_BYTES);
            let read =
                if stop.is_stopped() { Err(io::ErrorKind::Interrupted.into()) } else { source.read(tensor, range) };
            let bytes = read.map_err(CheckpointError::io("cannot read", source.path()))?;
            match amax(Level::detect(), word, &bytes) {
                Some(found) => most = most.max(found),
                None => return Ok(None),
            }
        }
    }
    Ok(Some(most))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]

    use super::*;

    /// The schemes of a layer where a set of one layer is fused; any other layer is kept.
    fn schemes(fused: &str, layer: &str) -> Vec<String> {
        let rule = v1::Rule { targets: vec!["nothing".to_owned()], scheme: "int8".to_owned(), ..Default::default() };
        let recipe = v1::Recipe { rules: vec![rule], ignore: Vec::new() };
        let command = v1::Quantize { how: Some(How::Recipe(recipe)), ..Default::default() };
        let set = Fused { layers: vec![fused.to_owned()], scheme: "NVFP4A16".to_owned(), amax: 1.0 };
        let plan = plan_of(&with_shared_scales(&command, &[set], |_| true)).unwrap();
        let schemes = plan.schemes_of(layer, &[2, 32], "f32").unwrap();
        schemes.iter().map(Scheme::to_string).collect()
    }

    #[test]
    fn a_fused_layer_whose_name_reads_as_a_pattern_is_matched_alone() {
        for name in ["m.q", "*.q", "re:(.q", "re:.*q", "@m.q", "m[0].q", "m{a.q", "m}?.q", "\\d.q", "!*.q", "^[!a].q"] {
            let name = format!("{name}_proj.weight");
            assert_eq!(schemes(&name, &name), ["NVFP4A16"], "{name} as {}", exactly(&name));
            assert!(schemes(&name, "m.0.q_proj.weight").is_empty(), "{name} as {}", exactly(&name));
        }
    }
}
