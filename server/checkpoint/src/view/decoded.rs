//! Quantized layers, decoded where they are read.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use quarrel_engine::Granularity;
use safetensors::Dtype;

use crate::{
    checks::{already_quantized, refuse_scattered},
    error::CheckpointError,
    local::{Scales, decode},
    model::Model,
    modules::{Module, modules},
    source::{Source, Tensor},
};

/// Where decoded tensors lie: behind any file.
const BEHIND: u64 = 1 << 62;
/// Of so many layers scales are remembered: those that are read at once.
const REMEMBERED: usize = 4;

/// Decoded tensors of a file, by where they begin.
#[derive(Debug, Default)]
pub(crate) struct Decoded {
    layers: BTreeMap<u64, Module>,
    scales: Mutex<VecDeque<(u64, Arc<Scales>)>>,
}

/// The files of a model with dense tensors for quantized layers.
///
/// # Errors
/// [`CheckpointError::Command`] for layers in a layout of others; [`CheckpointError::Module`] for those that cannot be understood.
pub(super) fn files(model: &Model) -> Result<Vec<Source>, CheckpointError> {
    let found = model.shards().iter().map(|shard| {
        modules(shard).map_err(|error| match error {
            CheckpointError::Foreign { .. } => already_quantized(&error.to_string()),
            other => other,
        })
    });
    let found = Result::<Vec<_>, _>::from_iter(found)?;
    refuse_scattered(model, &found)?;
    Ok(model.shards().iter().zip(found).map(|(shard, modules)| file(shard, modules)).collect())
}

fn file(shard: &Source, modules: Vec<Module>) -> Source {
    if modules.is_empty() {
        return shard.clone();
    }
    let by_codes = BTreeMap::from_iter(modules.iter().map(|module| (module.codes.name.as_str(), module)));
    let parts = std::collections::HashSet::<&str>::from_iter(modules.iter().flat_map(Module::parts));
    let mut layers = BTreeMap::new();
    let mut end = BEHIND;
    let mut tensors = Vec::new();
    for tensor in shard.tensors() {
        if let Some(module) = by_codes.get(tensor.name.as_str()) {
            let start = end;
            end += module.shape.iter().product::<u64>() * width(module);
            layers.insert(start, (*module).clone());
            tensors.push(Tensor {
                name: format!("{}.weight", module.name),
                dtype: dense_type(module),
                shape: module.shape.clone(),
                at: start..end,
                scheme: Some(module.scheme),
            });
        } else if !parts.contains(tensor.name.as_str()) {
            tensors.push(tensor.clone());
        }
    }
    shard.with(tensors, Some(Arc::new(Decoded { layers, scales: Mutex::default() })))
}

/// The type that its weights had.
fn dense_type(module: &Module) -> Dtype {
    match module.dtype_word() {
        "bf16" => Dtype::BF16,
        "f16" => Dtype::F16,
        _ => Dtype::F32,
    }
}

/// Bytes of an element of them.
fn width(module: &Module) -> u64 {
    dense_type(module).bitsize() as u64 / 8
}

impl Decoded {
    /// Whether a place is one of a decoded tensor.
    pub(crate) fn holds(&self, at: u64) -> bool {
        at >= BEHIND
    }

    /// Reads some of a decoded tensor, wherever it begins and ends.
    pub(crate) fn read(&self, source: &Source, at: &Range<u64>) -> io::Result<Bytes> {
        let found = self.layers.range(..=at.start).next_back();
        let (start, module) = found.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let (channels, _) = module.channels();
        let bytes = module.shape.iter().product::<u64>() * width(module);
        let Some(channel) = bytes.checked_div(channels).filter(|channel| *channel > 0) else {
            return Ok(Bytes::new());
        };
        let wanted = at.start - start..at.end - start;
        // Blocks are decoded whole, and what has several dimensions of channels.
        let together = match module.scheme.granularity() {
            _ if module.scheme.channel_dims().get() > 1 => channels,
            Granularity::Block { rows, .. } => u64::from(rows.get()),
            Granularity::Tensor | Granularity::Channel | Granularity::Group(_) => 1,
        };
        let first = wanted.start / channel / together * together;
        let last = wanted.end.div_ceil(channel).next_multiple_of(together).min(channels);
        let scales = self.scales(source, *start, module).map_err(io::Error::other)?;
        let decoded = decode(source, module, &scales, first..last).map_err(io::Error::other)?;
        let skipped = first * channel;
        Ok(decoded.slice((wanted.start - skipped) as usize..(wanted.end - skipped) as usize))
    }

    fn scales(&self, source: &Source, start: u64, module: &Module) -> Result<Arc<Scales>, CheckpointError> {
        let known = |scales: &VecDeque<(u64, Arc<Scales>)>| {
            scales.iter().find(|(of, _)| *of == start).map(|(_, scales)| Arc::clone(scales))
        };
        let lock = || self.scales.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(scales) = known(&lock()) {
            return Ok(scales);
        }
        let read = Arc::new(Scales::read(source, module)?);
        let mut scales = lock();
        if scales.len() >= REMEMBERED {
            scales.pop_front();
        }
        scales.push_back((start, Arc::clone(&read)));
        Ok(read)
    }
}
