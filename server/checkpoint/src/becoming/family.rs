//! A model of the Llama family, as transformers saves it, as the tensors and the metadata of a GGUF file.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
};

use bytes::Bytes;
use quarrel_engine::Block;
use safetensors::Dtype;

use super::Named;
use crate::{
    element::Element,
    error::CheckpointError,
    fate::float_word,
    gguf::{Metadata, Shapes, llama, shapes, tokenizer},
    layer::module_of,
    model::Model,
    source::{Source, Tensor},
    storage::Location,
    view::{From, dense_files, repacked_files},
};

/// More than any file of a tokenizer has, as which it takes several times as much memory.
const TOKENIZER_BYTES_MAX: u64 = 128 << 20;
/// Kept in f32 by llama.cpp's converter: besides what has one dimension.
const WIDE: &str = "ffn_gate_inp.weight";

/// The tensors under their new names, and what the file says: of the model's own configuration and tokenizer, or what a GGUF file of it says.
pub(super) fn named(
    model: &Model,
    given: Option<&Location>,
    is_copy: bool,
) -> Result<(Vec<Named>, Metadata), CheckpointError> {
    let path = model.path();
    let wrong = |detail: String| CheckpointError::Model { path: path.clone(), detail };
    let config = model.folder().and_then(|folder| folder.config.clone());
    if let Some(config) = &config {
        llama::is_of_the_family(config).map_err(wrong)?;
    }
    let (metadata, expected) = match (given, &config) {
        (Some(location), _) => of_given(location)?,
        (None, Some(config)) => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let mut metadata = llama::metadata(config, &name).map_err(wrong)?;
            let missing =
                |detail: String| wrong(format!("{detail}. Or give a GGUF file of the model, whose metadata are taken"));
            metadata.extend(tokenizer::metadata(&files(model)?, config).map_err(missing)?);
            (metadata, Shapes::new())
        }
        (None, None) => {
            return Err(wrong(
                "it is no GGUF file and has no config.json: expected one of them, or a GGUF file whose metadata are taken".to_owned(),
            ));
        }
    };
    let heads = llama::heads(&metadata).map_err(wrong)?;
    let (mut found, mut experts) = (Vec::new(), BTreeMap::<String, BTreeMap<u64, (Source, Tensor)>>::new());
    let shards = if is_copy { repacked_files(model)? } else { dense_files(model)? };
    for shard in shards {
        for tensor in shard.tensors() {
            let unknown = || {
                let detail = format!("tensor `{}` has no name in GGUF that is known here", tensor.name);
                CheckpointError::Model { path: path.clone(), detail }
            };
            match llama::named(&tensor.name).ok_or_else(unknown)? {
                llama::Named::Nothing => {}
                llama::Named::Whole(name, rows) => {
                    let heads = rows.heads(heads, &tensor.shape);
                    let heads = heads.map_err(|detail| wrong(format!("tensor `{}` {detail}", tensor.name)))?;
                    let from = From { heads, ..From::one(&shard, tensor) };
                    found.extend(scale(model, &name, tensor)?);
                    found.push(of(name, tensor.shape.clone(), tensor, from).map_err(wrong)?);
                }
                llama::Named::Expert(name, _) if tensor.dtype == Block::Nvfp4.into() => {
                    return Err(wrong(format!(
                        "`{name}` of NVFP4 experts, each with a scale of its own, is not known here"
                    )));
                }
                llama::Named::Expert(name, number) => {
                    let part = (shard.clone(), tensor.clone());
                    if experts.entry(name).or_default().insert(number, part).is_some() {
                        return Err(wrong(format!(
                            "tensor `{}` is expert {number} of a layer a second time",
                            tensor.name
                        )));
                    }
                }
            }
        }
    }
    for (name, parts) in experts {
        let all = metadata.number("llama.expert_count");
        let is_whole = parts.keys().copied().eq(0..parts.len() as u64) && all == Some(parts.len() as u64);
        let parts = Vec::from_iter(parts.into_values());
        let alike = |(_, one): &(Source, Tensor), (_, other): &(Source, Tensor)| {
            (one.dtype, &one.shape) == (other.dtype, &other.shape)
        };
        let Some((_, first)) = parts.first().filter(|first| is_whole && parts.iter().all(|part| alike(first, part)))
        else {
            return Err(wrong(format!(
                "of `{name}` it has {} experts, or not all of one shape: expected {all:?}",
                parts.len()
            )));
        };
        let shape = [&[parts.len() as u64][..], &first.shape].concat();
        let first = first.clone();
        found.push(of(name, shape, &first, From { parts, heads: None, bytes: None }).map_err(wrong)?);
    }
    let factors = config.as_ref().map(llama::frequency_factors).transpose().map_err(wrong)?;
    if let Some(factors) = factors.flatten() {
        let shape = vec![factors.len() as u64];
        let name = "rope_freqs.weight".to_owned();
        let tensor = Tensor { name, dtype: Dtype::F32.into(), shape, at: 0..0, scheme: None };
        found.push(Named { tensor, from: From::numbers(&factors) });
    }
    // Those of a given file, if it has any, else what the metadata tell.
    let [must, may] = if expected.is_empty() { shapes(&metadata).map_err(wrong)? } else { of_file(expected, &found) };
    check(&found, &must, &may).map_err(wrong)?;
    Ok((found, metadata))
}

/// The tensors that a model must have of which a file has those, and what may be beside them: scales of NVFP4, where that file is of another type or this
/// model is.
fn of_file(mut must: Shapes, found: &[Named]) -> [Shapes; 2] {
    let is_scale = |name: &str, shape: &[u64]| name.ends_with(".scale") && shape == [1];
    let mut may: Shapes = must.extract_if(|name, shape| is_scale(name, shape)).collect();
    let nvfp4 = found.iter().filter(|named| named.tensor.dtype == Block::Nvfp4.into());
    may.extend(nvfp4.map(|named| (format!("{}.scale", module_of(&named.tensor.name)), vec![1])));
    [must, may]
}

/// What a tensor of blocks is multiplied by, where that is another number than 1: a tensor beside it.
fn scale(model: &Model, name: &str, tensor: &Tensor) -> Result<Option<Named>, CheckpointError> {
    if tensor.dtype != Block::Nvfp4.into() {
        return Ok(None);
    }
    let global = format!("{}.weight_global_scale", module_of(&tensor.name));
    let found = model.shards().iter().find_map(|shard| Some((shard, shard.tensor(&global)?)));
    let Some((shard, global)) = found else { return Ok(None) };
    let bytes = shard.read_whole(global)?;
    let number = bytes.first_chunk().map_or(1.0, |bytes| f32::from_le_bytes(*bytes));
    // Where compressed-tensors divides.
    let factor = 1.0 / number;
    if !(number.is_normal() && factor.is_normal() && number > 0.0) {
        let detail = format!("its global scale is {number:e}: expected a finite number above zero, as its inverse");
        return Err(CheckpointError::Module { module: module_of(&tensor.name).to_owned(), detail });
    }
    let name = format!("{}.scale", module_of(name));
    let tensor = Tensor { name, dtype: Dtype::F32.into(), shape: vec![1], at: 0..0, scheme: None };
    Ok(Some(Named { tensor, from: From::numbers(&[factor]) }))
}

/// A tensor of numbers, in the type that it has where nothing else is wanted.
fn of(name: String, shape: Vec<u64>, tensor: &Tensor, from: From) -> Result<Named, String> {
    if tensor.dtype.plain().is_none() {
        return Ok(Named { tensor: Tensor { name, dtype: tensor.dtype, shape, at: 0..0, scheme: None }, from });
    }
    if float_word(tensor.dtype).is_none() {
        return Err(format!("tensor `{}` is of {}: expected F32, F16, BF16 or F64", tensor.name, tensor.dtype));
    }
    let is_wide = shape.len() < 2 || name.ends_with(WIDE) || tensor.dtype == Dtype::F64.into();
    let dtype: Element = if is_wide { Dtype::F32.into() } else { tensor.dtype };
    Ok(Named { tensor: Tensor { name, dtype, shape, at: 0..0, scheme: tensor.scheme }, from })
}

/// What a GGUF file says, and the shapes of its tensors.
fn of_given(location: &Location) -> Result<(Metadata, Shapes), CheckpointError> {
    let source = Source::open(location)?;
    let wrong = |detail: &str| CheckpointError::Gguf { path: source.path().to_owned(), detail: detail.to_owned() };
    let metadata = source.gguf().cloned().ok_or_else(|| wrong("it is safetensors"))?;
    if metadata.text("general.architecture") != Some("llama") {
        return Err(wrong("its architecture is not `llama`: names and order of rows are known of that alone"));
    }
    let shapes = source.tensors().iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect();
    Ok((metadata, shapes))
}

/// Whether these are the tensors that a model of such metadata has, each once.
fn check(found: &[Named], must: &Shapes, may: &Shapes) -> Result<(), String> {
    let mut names = HashSet::<&str>::new();
    for Named { tensor, .. } in found {
        if !names.insert(&tensor.name) {
            return Err(format!("two of its tensors are `{}` in GGUF", tensor.name));
        }
        match must.get(&tensor.name).or_else(|| may.get(&tensor.name)) {
            Some(shape) if *shape == tensor.shape => {}
            Some(shape) => {
                return Err(format!("`{}` has shape {:?}: its metadata say {shape:?}", tensor.name, tensor.shape));
            }
            None => {
                return Err(format!(
                    "`{}` of shape {:?} is none of a model of its metadata",
                    tensor.name, tensor.shape
                ));
            }
        }
    }
    match must.keys().filter(|name| !names.contains(name.as_str())).min() {
        Some(name) => Err(format!("it has no `{name}`, which a model of its metadata has")),
        None => Ok(()),
    }
}

/// The files of a model's tokenizer.
fn files(model: &Model) -> Result<tokenizer::Files, CheckpointError> {
    let others = model.folder().map(|folder| folder.others.as_slice()).unwrap_or_default();
    let read = |name: &str| -> Result<Option<Bytes>, CheckpointError> {
        let is_there = others.iter().any(|other| other == Path::new(name));
        let file = model.location().join(Path::new(name));
        let read = is_there.then(|| file.read(TOKENIZER_BYTES_MAX));
        read.transpose().map_err(CheckpointError::io("cannot read", file.shown()))
    };
    Ok(tokenizer::Files {
        pieces: read("tokenizer.model")?,
        tokenizer: read("tokenizer.json")?,
        configuration: read("tokenizer_config.json")?,
        added: read("added_tokens.json")?,
        template: read("chat_template.jinja")?,
        template_json: read("chat_template.json")?,
    })
}
