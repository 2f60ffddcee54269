//! What is looked at before a job begins: source, destination and command fit together.

use quarrel_proto::{
    Reason,
    v1::{self, command::Verb},
};
use serde_json::{Value, json};

use super::{Destination, Ends, Job, Work};
use crate::{
    becoming::{Becoming, check_for_gguf, is_copy, is_gguf, no_effect},
    checks::{
        as_json, identity, refuse_decoded, refuse_for_models, refuse_overlap, refuse_parts, refuse_quantized,
        refuse_scattered, refuse_transposed, refuse_vectors,
    },
    columns::is_columns,
    error::CheckpointError,
    fate::{dtype_of, fates, plan_of},
    fused::{fused, with_shared_scales},
    model::Model,
    modules::{DEEPSEEK_SCALES, Module, modules},
    report::Gate,
    returned::returned,
    site::Site,
    storage::Location,
    target::{Replace, Stop, Target},
    view::view,
};

impl Job {
    /// Looks at everything before any work is done: source, destination and command fit together. It reads much of the source
    /// where fused layers must share a scale.
    ///
    /// # Errors
    /// [`CheckpointError`] of any kind.
    pub fn open(
        Ends { source, destination, metadata }: Ends<'_>,
        command: v1::Quantize,
        (replace, gate): (Replace, Gate),
        stop: &Stop,
    ) -> Result<Job, CheckpointError> {
        refuse_overlap(source, destination)?;
        if is_copy(&command) && !is_gguf(destination) {
            return Job::open_copy(source, destination, command, (replace, gate), stop);
        }
        let mut becoming = None;
        let (model, command) = if is_gguf(destination) {
            if let Some(metadata) = metadata {
                refuse_overlap(metadata, destination)?;
            }
            let found = becoming.insert(Becoming::new(&Model::open(source)?, command, metadata)?);
            (found.model.clone(), found.command.clone())
        } else if metadata.is_some() {
            return Err(no_effect());
        } else {
            refuse_for_models(&plan_of(&command)?)?;
            (view(Model::open(source)?, &command)?, command)
        };
        // What is wrong with it is said before anything is written.
        let mut fates = fates(model.shards(), &command)?;
        match &becoming {
            Some(becoming) => becoming.tell(&mut fates),
            None => refuse_vectors(&model, &fates)?,
        }
        refuse_quantized(&model, &fates)?;
        if let Some(config) = model.folder().and_then(|folder| folder.config.as_ref()) {
            refuse_transposed(config, model.path())?;
        }
        // Whoever was to wait for it may have gone: then nothing is touched any more.
        stop.check()?;
        let (destination, fused) = match model.folder() {
            None => {
                let target = Target::new(destination, replace)?;
                (Destination::File(target), fused(model.shards(), &command, stop)?)
            }
            Some(_) => {
                stop.keep();
                let identity = identity(&model, as_json(&command)?)?;
                let site = Site::open(destination, identity, replace, stop)?;
                let found = match site.facts()? {
                    Some(found) => found,
                    None => {
                        let found = fused(model.shards(), &command, stop)?;
                        site.remember_facts(&found)?;
                        found
                    }
                };
                (Destination::Folder(site), found)
            }
        };
        let (effective, head) = match becoming {
            // Not the recipe that it stands for, with the name of every tensor.
            Some(Becoming { asked, head, .. }) => {
                (v1::Command { verb: Some(Verb::Quantize(asked)), ..v1::Command::default() }, Some(head))
            }
            None => (plan_of(&with_shared_scales(&command, &fused, |_| true))?.effective, None),
        };
        Ok(Job { model, work: Work::Quantize { command, effective, fates, fused, head }, destination, gate })
    }

    /// The same for a job that stores quantized layers in the layout of compressed-tensors, whatever theirs is.
    fn open_copy(
        source: &Location,
        destination: &Location,
        command: v1::Quantize,
        (replace, gate): (Replace, Gate),
        stop: &Stop,
    ) -> Result<Job, CheckpointError> {
        check_for_gguf(&command)?;
        if gate != Gate::default() {
            let message = "`COPY` measures nothing: `sqnr_db_min` and `cosine_min` have no effect on it".to_owned();
            return Err(CheckpointError::Command { reason: Reason::OptionConflict, message });
        }
        let (model, modules) = copied_model(Model::open(source)?)?;
        let destination = place(&model, destination, as_json(&command)?, replace, stop)?;
        let effective = v1::Command { verb: Some(Verb::Quantize(command)), ..v1::Command::default() };
        Ok(Job { model, work: Work::Copy { effective, modules }, destination, gate })
    }

    /// The same for a job that makes dense layers of quantized ones, of type `dtype` or of their own.
    ///
    /// # Errors
    /// [`CheckpointError`] of any kind.
    pub fn open_dense(
        source: &Location,
        destination: &Location,
        dtype: Option<String>,
        replace: Replace,
        stop: &Stop,
    ) -> Result<Job, CheckpointError> {
        refuse_overlap(source, destination)?;
        if is_gguf(destination) || is_columns(destination) {
            let message = format!(
                "`{}` is not called what it would be: `dequantize` writes safetensors (a GGUF file is made by `quantize`, of scheme `F32`, \
                 `F16` or `BF16`)",
                destination.shown().display()
            );
            return Err(CheckpointError::Command { reason: Reason::OptionInvalid, message });
        }
        let (model, modules) = quantized_model(Model::open_as(source, dtype.as_deref().map(dtype_of))?)?;
        let what = json!({ "dequantize": { "dtype": dtype } });
        let destination = place(&model, destination, what, replace, stop)?;
        Ok(Job { model, work: Work::Dequantize { dtype, modules }, destination, gate: Gate::default() })
    }
}

/// A model as [`COPY`](crate::becoming::COPY) stores it in safetensors, and its quantized layers file by file.
pub(crate) fn copied_model(mut model: Model) -> Result<(Model, Vec<Vec<Module>>), CheckpointError> {
    if model.shards().iter().any(|shard| shard.gguf().is_some()) {
        refuse_parts(&model)?;
        model = returned(&model)?;
    }
    refuse_decoded(&model)?;
    let (model, modules) = quantized_model(model)?;
    let is_deepseek = |module: &&Module| module.parts().any(|part| part.ends_with(DEEPSEEK_SCALES));
    if let Some(module) = modules.iter().flatten().find(is_deepseek) {
        let detail = format!(
            "it is in DeepSeek's layout (`{DEEPSEEK_SCALES}`), which is not copied: quantize it anew, as FP8_BLOCK"
        );
        return Err(CheckpointError::Module { module: module.name.clone(), detail });
    }
    Ok((model, modules))
}

/// A model that is quantized, and its layers file by file.
fn quantized_model(model: Model) -> Result<(Model, Vec<Vec<Module>>), CheckpointError> {
    refuse_parts(&model)?;
    let modules = Result::<Vec<_>, _>::from_iter(model.shards().iter().map(modules))?;
    refuse_scattered(&model, &modules)?;
    let is_decoded = model.tensors().any(|(_, tensor)| tensor.scheme.is_some());
    match modules.iter().all(Vec::is_empty) && !is_decoded {
        true => Err(CheckpointError::NothingQuantized { path: model.path() }),
        false => Ok((model, modules)),
    }
}

/// Where a model goes, nothing of which is asked of numbers before.
fn place(
    model: &Model,
    destination: &Location,
    what: Value,
    replace: Replace,
    stop: &Stop,
) -> Result<Destination, CheckpointError> {
    stop.check()?;
    if model.folder().is_none() {
        return Ok(Destination::File(Target::new(destination, replace)?));
    }
    stop.keep();
    Ok(Destination::Folder(Site::open(destination, identity(model, what)?, replace, stop)?))
}
