//! A model as it becomes a GGUF file: its tensors under llama.cpp's names and in its order, what each of them is to be, and what the file says beside them.
//!
//! From a GGUF file names, order of dimensions and metadata stay; `family` makes them of a model as transformers saves it.

mod family;

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
};

use quarrel_engine::{Codes, Plan, Scheme};
use quarrel_proto::{
    Reason,
    v1::{self, quantize::How},
};

use crate::{
    checks::{refuse_decoded, refuse_parts},
    element::Element,
    error::CheckpointError,
    fate::{Fate, float_word, plan_of},
    fused::exactly,
    gguf::{ALIGNMENT, ALIGNMENT_KEY, Facts, Head, Metadata, Mix, natural},
    model::Model,
    modules::{Module, blocks},
    source::{Source, Tensor},
    storage::Location,
    view::{From, dense, moved},
};

/// What a model is to become.
#[derive(Debug)]
pub(crate) struct Becoming {
    /// Of one file, with the tensors that the new one has.
    pub(crate) model: Model,
    /// A recipe that names each tensor that gets blocks.
    pub(crate) command: v1::Quantize,
    /// What was asked for.
    pub(crate) asked: v1::Quantize,
    /// Tensors whose numbers get another type: what that is, by name.
    converted: HashMap<String, String>,
    pub(crate) head: Head,
}

/// The scheme of a GGUF file whose tensors stay what they are; what is quantized otherwise gets blocks of the same numbers.
pub const COPY: &str = "COPY";

/// Whether a command quantizes nothing: what is quantized is stored in another layout, with the same numbers.
pub fn is_copy(command: &v1::Quantize) -> bool {
    matches!(&command.how, Some(How::Scheme(name)) if name == COPY)
}

/// Whether a file is to be GGUF.
pub fn is_gguf(location: &Location) -> bool {
    location.shown().extension().is_some_and(|ending| ending == "gguf")
}

/// What a command gets wrong that is to make a GGUF file.
///
/// # Errors
/// [`CheckpointError::Command`].
pub fn check_for_gguf(command: &v1::Quantize) -> Result<(), CheckpointError> {
    match &command.how {
        Some(How::Scheme(name)) => {
            let options = [
                ("group_size", command.group_size.is_some()),
                ("channel_dims", command.channel_dims.is_some()),
                ("on_indivisible", command.on_indivisible.is_some()),
                ("fallback", command.fallback.is_some()),
                ("amax", command.amax.is_some()),
                // Where nothing is computed, there are no faults and no arithmetic.
                ("on_error", name == COPY && command.on_error.as_deref() == Some("continue")),
                ("arith", name == COPY && command.arith.as_deref() == Some("weight-dtype")),
            ];
            if let Some((option, _)) = options.iter().find(|(_, is_there)| *is_there) {
                let message =
                    format!("`{option}` has no effect on `{name}` here, which says what becomes of every tensor");
                return Err(CheckpointError::Command { reason: Reason::OptionConflict, message });
            }
            if name == COPY { Ok(()) } else { Mix::named(name).map(drop) }
        }
        _ => only_blocks(&plan_of(command)?),
    }
}

/// A file of GGUF has no place for what is of no type of ggml.
fn only_blocks(plan: &Plan) -> Result<(), CheckpointError> {
    let is_other = |scheme: &&Scheme| scheme.checkpoint_format() != "gguf";
    let Some(scheme) = plan.schemes().into_iter().find(|scheme| is_other(&scheme)) else { return Ok(()) };
    let message =
        format!("scheme `{scheme}` is of no type of GGUF: expected `Q8_0`, `Q4_K` or another of ggml's types");
    Err(CheckpointError::Command { reason: Reason::OptionInvalid, message })
}

/// A tensor under its new name, and what it is made of.
pub(crate) struct Named {
    /// Of the type that it has where nothing else is wanted.
    pub(crate) tensor: Tensor,
    pub(crate) from: From,
}

impl Becoming {
    /// Of a model, and what it is asked to be; with what another GGUF file says of it, if one is given.
    ///
    /// # Errors
    /// [`CheckpointError`] for a model whose names or metadata are not known, and for a command that gets something wrong.
    pub(crate) fn new(
        model: &Model,
        command: v1::Quantize,
        metadata: Option<&Location>,
    ) -> Result<Becoming, CheckpointError> {
        check_for_gguf(&command)?;
        refuse_parts(model)?;
        let is_copy = is_copy(&command);
        if is_copy {
            refuse_decoded(model)?;
        }
        let path = model.path();
        let wrong = |detail: String| CheckpointError::Model { path: path.clone(), detail };
        let gguf = model.shards().iter().find_map(|shard| Some((shard, shard.gguf()?)));
        let (mut named, metadata) = match (gguf, metadata) {
            (Some((source, metadata)), None) => (as_they_are(source), metadata.clone()),
            (Some(_), Some(_)) => return Err(no_effect()),
            (None, given) => family::named(model, given, is_copy)?,
        };
        named.sort_by(|one, other| natural(&one.tensor.name, &other.tensor.name));
        let tensors = Vec::from_iter(named.iter().map(|named| named.tensor.clone()));
        let wanted = match &command.how {
            Some(How::Scheme(_)) if is_copy => {
                let elements = Vec::from_iter(tensors.iter().map(|tensor| tensor.dtype));
                let said = metadata.number("general.file_type").and_then(|number| u32::try_from(number).ok());
                Wanted { file_type: said.unwrap_or_else(|| file_type(&elements)), elements }
            }
            Some(How::Scheme(name)) => {
                let mix = Mix::named(name)?;
                let elements = mix.elements(&tensors, &Facts::of(&metadata)).map_err(wrong)?;
                Wanted { elements, file_type: mix.file_type }
            }
            _ => by_recipe(&tensors, &plan_of(&command)?)?,
        };
        let asked = command;
        let command = recipe(&asked, &tensors, &wanted.elements);
        let head = Head { metadata: becoming(metadata, wanted.file_type) };
        if let Some((source, _)) = gguf {
            decode(source, &mut named, &wanted.elements)?;
        }
        let mut converted = HashMap::new();
        let seen = named.into_iter().zip(wanted.elements).map(|(Named { tensor, from }, to)| {
            // Blocks are made of what is read: only numbers are read otherwise.
            let dtype = if to.plain().is_some() { to } else { tensor.dtype };
            if let Some((_, part)) = from.parts.first().filter(|(_, part)| part.dtype != dtype) {
                let message = format!(
                    "tensor `{}`: its numbers of {} become {dtype}, rounded and not measured",
                    tensor.name, part.dtype
                );
                converted.insert(tensor.name.clone(), message);
            }
            (tensor.name, dtype, tensor.shape, from)
        });
        let first = model.shards().first().ok_or_else(|| wrong("it has no file of tensors".to_owned()))?;
        let shard = moved(first, Vec::from_iter(seen));
        Ok(Becoming { model: model.as_one(shard), command, asked, converted, head })
    }

    /// Says of tensors whose numbers get another type that they do.
    pub(crate) fn tell(&self, fates: &mut [Vec<Fate>]) {
        let tensors = self.model.tensors().map(|(_, tensor)| tensor);
        for (tensor, fate) in tensors.zip(fates.iter_mut().flatten()) {
            if let Fate::Copied { reason: Reason::Unmatched, message } = fate {
                // No rule of the recipe that the command stands for: nobody wrote it.
                *message = match self.converted.get(&tensor.name) {
                    Some(said) => said.clone(),
                    None => format!("tensor `{}`: it is not quantized, and stays {}", tensor.name, tensor.dtype),
                };
            }
        }
    }
}

/// The error of metadata where nobody asks for it.
pub(crate) fn no_effect() -> CheckpointError {
    let message = "`metadata` has no effect here: it is for a GGUF file made of what is none".to_owned();
    CheckpointError::Command { reason: Reason::OptionConflict, message }
}

/// The tensors of a GGUF file.
fn as_they_are(source: &Source) -> Vec<Named> {
    let of = |tensor: &Tensor| Named { tensor: tensor.clone(), from: From::one(source, tensor) };
    source.tensors().iter().map(of).collect()
}

/// Has blocks decoded that are to become something else.
fn decode(source: &Source, named: &mut [Named], wanted: &[Element]) -> Result<(), CheckpointError> {
    let is_changed = |(named, to): (&Named, &Element)| {
        (named.tensor.dtype != *to && named.tensor.dtype.plain().is_none()).then(|| named.tensor.name.clone())
    };
    let changed = HashSet::<String>::from_iter(named.iter().zip(wanted).filter_map(is_changed));
    if changed.is_empty() {
        return Ok(());
    }
    let coded = source.tensors().iter().filter(|tensor| changed.contains(&tensor.name));
    let coded = coded
        .filter_map(|tensor| blocks(source, tensor))
        .map(|module| module.map(Module::without_scale))
        .collect::<Result<Vec<_>, _>>()?;
    let decoded = dense(source, coded);
    for named in named.iter_mut().filter(|named| changed.contains(&named.tensor.name)) {
        if let Some(tensor) = decoded.tensor(&named.tensor.name) {
            *named = Named { tensor: tensor.clone(), from: From::one(&decoded, tensor) };
        }
    }
    Ok(())
}

struct Wanted {
    elements: Vec<Element>,
    file_type: u32,
}

/// What a recipe names gets what it says; others stay.
fn by_recipe(tensors: &[Tensor], plan: &Plan) -> Result<Wanted, CheckpointError> {
    let of = |tensor: &Tensor| -> Result<Element, CheckpointError> {
        let is_weight = tensor.name.ends_with(".weight") && tensor.shape.len() > 1;
        // Blocks are read as f32.
        let word = float_word(tensor.dtype).or(matches!(tensor.dtype, Element::Blocks(_)).then_some("f32"));
        let Some(word) = word.filter(|_| is_weight || tensor.shape.len() < 2) else { return Ok(tensor.dtype) };
        let schemes = plan.schemes_of(&tensor.name, &tensor.shape, word)?;
        if !schemes.is_empty() && tensor.shape.len() < 2 {
            let message = format!(
                "layer `{}` is named, but has shape {:?}: llama.cpp reads blocks of two dimensions or more; put it into `ignore`, or let \
                 no rule name it",
                tensor.name, tensor.shape
            );
            return Err(CheckpointError::Layer { reason: Reason::RankUnsupported, message });
        }
        match schemes.as_slice() {
            [] => Ok(tensor.dtype),
            [scheme] => Ok(match scheme.codes() {
                Codes::Block(block) => block.into(),
                _ => tensor.dtype,
            }),
            _ => {
                let message = format!(
                    "tensor `{}` has a ladder: a GGUF file's types are decided before, by one scheme each",
                    tensor.name
                );
                Err(CheckpointError::Command { reason: Reason::OptionInvalid, message })
            }
        }
    };
    let elements = tensors.iter().map(of).collect::<Result<Vec<_>, _>>()?;
    let file_type = file_type(&elements);
    Ok(Wanted { elements, file_type })
}

/// What most tensors of a file are, as the number of the mix of that name; llama.cpp shows it, and looks at the tensors.
fn file_type(elements: &[Element]) -> u32 {
    let mut counts = HashMap::<(bool, String), usize>::new();
    for element in elements {
        // Any block before any number.
        *counts.entry((matches!(element, Element::Blocks(_)), element.to_string())).or_default() += 1;
    }
    let rank = |((is_blocks, name), count): &((bool, String), usize)| {
        (*is_blocks, name != "F32", *count, Reverse(name.clone()))
    };
    let most = counts.into_iter().max_by_key(rank).map(|((_, name), _)| name).unwrap_or_default();
    match most.as_str() {
        "MXFP4" => 38,
        "NVFP4" => 39,
        // LLAMA_FTYPE_GUESSED, where no mix is of that type.
        name => Mix::named(name).map_or(1024, |mix| mix.file_type),
    }
}

/// A rule for each type, with the names that get it.
fn recipe(command: &v1::Quantize, tensors: &[Tensor], wanted: &[Element]) -> v1::Quantize {
    let mut rules: Vec<v1::Rule> = Vec::new();
    for (tensor, element) in tensors.iter().zip(wanted) {
        if *element == tensor.dtype || element.plain().is_some() {
            continue;
        }
        let dims = tensor.shape.len().saturating_sub(1) as u32;
        let (scheme, channel_dims) = (element.to_string(), (dims > 1).then_some(dims));
        let rule = rules.iter_mut().find(|rule| rule.scheme == scheme && rule.channel_dims == channel_dims);
        match rule {
            Some(rule) => rule.targets.push(exactly(&tensor.name)),
            None => rules.push(v1::Rule {
                targets: vec![exactly(&tensor.name)],
                scheme,
                channel_dims,
                ..v1::Rule::default()
            }),
        }
    }
    if rules.is_empty() {
        // Nothing is quantized, and a recipe has a rule: no tensor has this name.
        rules.push(v1::Rule { targets: vec!["\0".to_owned()], scheme: "Q8_0".to_owned(), ..v1::Rule::default() });
    }
    let recipe = v1::Recipe { rules, ignore: Vec::new() };
    let (arith, on_error) = (command.arith.clone(), command.on_error.clone());
    v1::Quantize { how: Some(How::Recipe(recipe)), arith, on_error, ..v1::Quantize::default() }
}

/// What the new file says: of llama.cpp's own tool the same, in the same order.
fn becoming(mut metadata: Metadata, file_type: u32) -> Metadata {
    const QUANTIZATION_VERSION: u32 = 2;
    metadata.put_u32("general.quantization_version", QUANTIZATION_VERSION);
    metadata.put_u32("general.file_type", file_type);
    // Of a model in several files; this one is in one.
    for key in ["split.no", "split.count", "split.tensors.count"] {
        metadata.remove(key);
    }
    if metadata.number(ALIGNMENT_KEY).is_some_and(|said| said != ALIGNMENT) {
        metadata.remove(ALIGNMENT_KEY);
    }
    metadata
}
