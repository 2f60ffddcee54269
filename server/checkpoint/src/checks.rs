//! What is looked at before a job begins: whether its source can be worked on, and what tells it from another job.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
};

use quarrel_engine::{Codes, Granularity, Plan, Scheme};
use quarrel_proto::{
    Reason, command,
    v1::{self, command::Verb},
};
use serde_json::{Map, Value, json};

use crate::{
    bitsandbytes::{ABSMAX, ROW_ABSMAX},
    config::says_quantized,
    error::CheckpointError,
    fate::Fate,
    layer::module_of,
    model::Model,
    modules::{DEEPSEEK_SCALES, Module},
    source::{Source, Tensor},
    storage::Location,
    stored::SCALES_PART,
};

/// A model that is quantized in a way that is not read would be told to be quantized otherwise.
pub(crate) fn refuse_quantized(model: &Model, fates: &[Vec<Fate>]) -> Result<(), CheckpointError> {
    let Some(folder) = model.folder() else { return Ok(()) };
    let coded = fates.iter().flatten().find_map(|fate| match fate {
        Fate::Copied { reason: Reason::AlreadyQuantized, message } => Some(message.clone()),
        Fate::Copied { .. } | Fate::Sent(_) => None,
    });
    let is_decoded = model.tensors().any(|(_, tensor)| tensor.scheme.is_some());
    let config = !is_decoded && folder.config.as_ref().is_some_and(says_quantized);
    let message = match (coded, config) {
        (Some(message), _) => message,
        (None, true) => format!("`{}`: its config.json says that it is quantized", model.path().display()),
        (None, false) => return Ok(()),
    };
    Err(already_quantized(&message))
}

/// A file of GGUF that is one of several would be taken for the whole.
pub(crate) fn refuse_parts(model: &Model) -> Result<(), CheckpointError> {
    for shard in model.shards() {
        if let Some(parts) = shard.gguf().and_then(|metadata| metadata.number("split.count")).filter(|parts| *parts > 1)
        {
            let detail = format!(
                "it is one of {parts} files of a model (`split.count`): join them first, as `llama-gguf-split --merge` does"
            );
            return Err(CheckpointError::Gguf { path: shard.path().to_owned(), detail });
        }
    }
    Ok(())
}

/// Layers that are seen as numbers have no codes that another layout holds.
pub(crate) fn refuse_decoded(model: &Model) -> Result<(), CheckpointError> {
    let decoded = model.tensors().find_map(|(_, tensor)| Some((tensor, tensor.scheme?)));
    let Some((tensor, scheme)) = decoded else { return Ok(()) };
    let columns = tensor.shape.last().copied().unwrap_or(0);
    let why = match (scheme.codes(), scheme.granularity()) {
        (Codes::Int { bits: 3, .. }, _) => "its codes have 3 bits",
        (Codes::Int { bits: 8, symmetric: false, .. }, _) => "its codes have 8 bits and zero points",
        (_, Granularity::Group(size)) if columns % u64::from(size.get()) != 0 => "its last group is shorter",
        _ => "its columns are of groups in another order (`g_idx`, of `desc_act`)",
    };
    let detail = format!(
        "{why}, which neither the layout of compressed-tensors nor a block holds: `dequantize` it, or quantize it anew"
    );
    Err(CheckpointError::Module { module: module_of(&tensor.name).to_owned(), detail })
}

/// The error of what is quantized in a way that is not read.
pub(crate) fn already_quantized(what: &str) -> CheckpointError {
    let message = format!(
        "{what}: expected a dense model, or one in the layout of compressed-tensors, of DeepSeek's FP8, or of GPTQ or AWQ with its config.json, which is decoded"
    );
    CheckpointError::Command { reason: Reason::AlreadyQuantized, message }
}

/// What is written must not be what is read, whatever either is called; of folders, neither may lie within the other.
pub(crate) fn refuse_overlap(source: &Location, destination: &Location) -> Result<(), CheckpointError> {
    match source.is(destination) || source.overlaps(destination) && source.is_folder()? {
        true => Err(CheckpointError::Overlap { source_at: source.shown(), destination: destination.shown() }),
        false => Ok(()),
    }
}

/// Models of transformers whose linear layers are `Conv1D`: stored transposed, and no `Linear` to a loader.
const TRANSPOSED: [&str; 5] = ["clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"];

/// What needs more than weights.
pub(crate) fn refuse_calibrated(plan: &Plan) -> Result<(), CheckpointError> {
    if let Some(scheme) =
        plan.schemes().iter().find(|scheme| scheme.preset().is_some_and(|preset| preset.needs_calibration))
    {
        let message = format!(
            "scheme `{scheme}` has static activation scales, which need calibration: a checkpoint without them does not load"
        );
        return Err(CheckpointError::Command { reason: Reason::NeedsCalibration, message });
    }
    Ok(())
}

/// What the files that a model is written to have no place for: ggml's blocks; and what needs more than weights.
pub(crate) fn refuse_for_models(plan: &Plan) -> Result<(), CheckpointError> {
    refuse_calibrated(plan)?;
    let blocks = |scheme: &&Scheme| matches!(scheme.codes(), Codes::Block(_));
    if let Some(scheme) = plan.schemes().iter().find(blocks) {
        let message = format!(
            "scheme `{scheme}` makes blocks of GGUF, which a model in safetensors has no layout for: expected another scheme, or \
             a GGUF file (`.gguf`) or layers in columns (`.arrow`, `.parquet`) as the destination of `quantize` or of a job"
        );
        return Err(CheckpointError::Command { reason: Reason::OptionInvalid, message });
    }
    // A configuration names one method, and of bitsandbytes one width.
    let kinds = BTreeMap::from_iter(plan.schemes().into_iter().map(|scheme| (kind(&scheme), scheme)));
    if let [(_, one), .., (_, other)] = Vec::from_iter(&kinds).as_slice() {
        let message = format!(
            "schemes `{one}` and `{other}` do not go into one model: a `config.json` says one of compressed-tensors, `nf4`, `fp4` and \
             `int8_rowwise`"
        );
        return Err(CheckpointError::Command { reason: Reason::OptionConflict, message });
    }
    Ok(())
}

/// A layer of one dimension has no channels, which scales in a model lie beside: no loader reads its codes.
pub(crate) fn refuse_vectors(model: &Model, fates: &[Vec<Fate>]) -> Result<(), CheckpointError> {
    let sent =
        |((_, tensor), fate): &((&Source, &Tensor), &Fate)| matches!(fate, Fate::Sent(_)) && tensor.shape.len() < 2;
    if let Some(((_, tensor), _)) = model.tensors().zip(fates.iter().flatten()).find(sent) {
        let message = format!(
            "layer `{}` would be quantized, but has shape {:?}: a model in safetensors has a layout for codes of two dimensions or \
             more; put it into `ignore`, or let no rule name it",
            tensor.name, tensor.shape
        );
        return Err(CheckpointError::Layer { reason: Reason::RankUnsupported, message });
    }
    Ok(())
}

/// What a loader is told of a scheme's layers.
fn kind(scheme: &Scheme) -> &'static str {
    match scheme.codes() {
        Codes::Codebook(book) => book.name(),
        Codes::Rowwise => "int8_rowwise",
        _ => "compressed-tensors",
    }
}

/// Codes along the wrong dimension, in modules where nobody looks for them, would be no model.
pub(crate) fn refuse_transposed(config: &Map<String, Value>, path: PathBuf) -> Result<(), CheckpointError> {
    let kind = config.get("model_type").and_then(Value::as_str).unwrap_or_default();
    if !TRANSPOSED.contains(&kind) {
        return Ok(());
    }
    let detail = format!(
        "its model_type is `{kind}`, whose linear layers are stored transposed (Conv1D): no loader finds codes in them"
    );
    Err(CheckpointError::Model { path, detail })
}

/// A module of which parts are in different files would be taken for dense.
pub(crate) fn refuse_scattered(model: &Model, modules: &[Vec<Module>]) -> Result<(), CheckpointError> {
    for (shard, modules) in model.shards().iter().zip(modules) {
        let known = HashSet::<&str>::from_iter(modules.iter().map(|module| module.name.as_str()));
        let names = shard.tensors().iter().map(|tensor| tensor.name.as_str());
        let scales = names.filter_map(|name| {
            [SCALES_PART, DEEPSEEK_SCALES, ABSMAX, ROW_ABSMAX]
                .iter()
                .find_map(|part| name.strip_suffix(part)?.strip_suffix('.'))
        });
        if let Some(module) = { scales }.find(|module| !known.contains(module)) {
            let detail = format!(
                "its scales are in `{}` without its codes: this version wants both in one file",
                name(shard.path())
            );
            return Err(CheckpointError::Module { module: module.to_owned(), detail });
        }
    }
    Ok(())
}

/// What tells a job from another: its source and its command.
pub(crate) fn identity(model: &Model, command: Value) -> Result<Value, CheckpointError> {
    let mut files = Map::new();
    for shard in model.shards() {
        let found = shard.location().identity().map_err(CheckpointError::io("cannot read", shard.path()))?;
        files.insert(name(shard.path()), found);
    }
    let config = model.folder().and_then(|folder| folder.config.clone());
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "source": files,
        "configuration": config,
        "command": command,
    }))
}

pub(crate) fn as_json(quantize: &v1::Quantize) -> Result<Value, CheckpointError> {
    let verb = Verb::Quantize(quantize.clone());
    let text = command::to_json(&v1::Command { verb: Some(verb), ..Default::default() });
    serde_json::from_str(&text).map_err(|error| CheckpointError::Ours(error.to_string()))
}

/// A file's name.
pub(crate) fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
