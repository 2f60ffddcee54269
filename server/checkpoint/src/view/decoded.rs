//! Quantized layers, decoded where they are read, or repacked into blocks that hold the same numbers.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    io,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::{Bytes, BytesMut};
use quarrel_engine::{Block, Granularity};
use safetensors::Dtype;

use super::{BEHIND, Computed, repacked};
use crate::{
    checks::{already_quantized, refuse_scattered},
    element::Element,
    error::CheckpointError,
    fate::dtype_of,
    local::{Scales, decode},
    model::Model,
    modules::{Module, modules},
    source::{Source, Tensor},
};

/// Of so many layers scales are remembered, those that are read at once; of fewer where they are large.
const REMEMBERED: usize = 4;
const REMEMBERED_BYTES: usize = 16 << 20;

/// Decoded tensors of a file, by where they begin.
#[derive(Debug)]
pub(crate) struct Decoded {
    /// The file whose layers they are.
    source: Source,
    /// Where they begin: what lies before is the file's.
    begins: u64,
    layers: BTreeMap<u64, (Module, Option<Block>)>,
    remembered: Arc<Remembered>,
    /// Which of the model's files it is.
    number: usize,
}

/// Scales of the layers of a model that were read last: by file, and where in it.
type Remembered = Mutex<VecDeque<((usize, u64), Arc<Scales>)>>;

/// The files of a model with dense tensors for quantized layers.
///
/// # Errors
/// [`CheckpointError::Command`] for layers in a layout of others; [`CheckpointError::Module`] for those that cannot be understood.
pub(crate) fn files(model: &Model) -> Result<Vec<Source>, CheckpointError> {
    let found = model.shards().iter().map(|shard| {
        modules(shard).map_err(|error| match error {
            CheckpointError::Foreign { .. } => already_quantized(&error.to_string()),
            other => other,
        })
    });
    let found = Result::<Vec<_>, _>::from_iter(found)?;
    refuse_scattered(model, &found)?;
    let remembered = Arc::new(Remembered::default());
    let files = model.shards().iter().zip(found).enumerate();
    let dense = |modules: Vec<Module>| modules.into_iter().map(|module| (module, None)).collect();
    Ok(files.map(|(number, (shard, modules))| file(shard, dense(modules), number, &remembered)).collect())
}

/// A file with dense tensors for these of its quantized layers.
pub(crate) fn dense(shard: &Source, modules: Vec<Module>) -> Source {
    file(shard, modules.into_iter().map(|module| (module, None)).collect(), 0, &Arc::default())
}

/// The files of a model with tensors of blocks for quantized layers: blocks that hold the same numbers.
///
/// # Errors
/// As those of [`files`], and for layers that no block holds.
pub(crate) fn repacked_files(model: &Model) -> Result<Vec<Source>, CheckpointError> {
    let found = Result::<Vec<_>, _>::from_iter(model.shards().iter().map(modules))?;
    refuse_scattered(model, &found)?;
    let of = |module: Module| repacked::block_of(&module).map(|block| (module, Some(block)));
    let remembered = Arc::new(Remembered::default());
    let files = model.shards().iter().zip(found).enumerate();
    let files = files.map(|(number, (shard, modules))| {
        let modules = modules.into_iter().map(of).collect::<Result<Vec<_>, _>>()?;
        Ok(file(shard, modules, number, &remembered))
    });
    files.collect()
}

fn file(shard: &Source, modules: Vec<(Module, Option<Block>)>, number: usize, remembered: &Arc<Remembered>) -> Source {
    if modules.is_empty() {
        return shard.clone();
    }
    let by_codes = BTreeMap::from_iter(modules.iter().map(|layer| (layer.0.codes.name.as_str(), layer)));
    let parts = HashSet::<&str>::from_iter(modules.iter().flat_map(|(module, _)| module.parts()));
    let mut layers = BTreeMap::new();
    let begins = if shard.is_computed() { 2 * BEHIND } else { BEHIND };
    let mut end = begins;
    let mut tensors = Vec::new();
    for tensor in shard.tensors() {
        if let Some((module, block)) = by_codes.get(tensor.name.as_str()) {
            let start = end;
            let dtype = block.map_or_else(|| dense_type(module).into(), Element::from);
            end += dtype.bytes(&module.shape).unwrap_or(0);
            layers.insert(start, (module.clone(), *block));
            tensors.push(Tensor {
                name: format!("{}.weight", module.name),
                dtype,
                shape: module.shape.clone(),
                at: start..end,
                scheme: Some(module.scheme),
            });
        } else if !parts.contains(tensor.name.as_str()) {
            tensors.push(tensor.clone());
        }
    }
    let decoded = Decoded { source: shard.clone(), begins, layers, remembered: Arc::clone(remembered), number };
    shard.with(tensors, Some(Arc::new(Computed::Decoded(decoded))))
}

/// The type that its weights had.
fn dense_type(module: &Module) -> Dtype {
    dtype_of(module.dtype_word())
}

impl Decoded {
    /// Reads some of a decoded tensor, wherever it begins and ends.
    pub(super) fn read(&self, at: &Range<u64>) -> io::Result<Bytes> {
        if at.start < self.begins {
            return self.source.read_at(at);
        }
        let found = self.layers.range(..=at.start).next_back();
        let (start, (module, block)) = found.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let (channels, _) = module.channels();
        let dtype = block.map_or_else(|| dense_type(module).into(), Element::from);
        let bytes = dtype.bytes(&module.shape).unwrap_or(0);
        let Some(channel) = bytes.checked_div(channels).filter(|channel| *channel > 0) else {
            return Ok(Bytes::new());
        };
        let wanted = at.start - start..at.end - start;
        let first = wanted.start / channel;
        let last = wanted.end.div_ceil(channel);
        let scales = self.scales(*start, module).map_err(io::Error::other)?;
        let mut dense = BytesMut::new();
        let mut at = first;
        while at < last {
            let end = end_of_part(module, at, channels).min(last);
            // Blocks of matrices that lie one behind the other are decoded together.
            let part = if is_of_matrices(module) { 0..channels } else { at..end };
            let decoded = match block {
                None => decode(&self.source, module, &scales, part.clone()),
                Some(block) => repacked::blocks(&self.source, module, *block, &scales, part.clone()),
            };
            let decoded = decoded.map_err(io::Error::other)?;
            dense.extend_from_slice(
                &decoded[((at - part.start) * channel) as usize..((end - part.start) * channel) as usize],
            );
            at = end;
        }
        let skipped = first * channel;
        Ok(dense.freeze().slice((wanted.start - skipped) as usize..(wanted.end - skipped) as usize))
    }

    fn scales(&self, start: u64, module: &Module) -> Result<Arc<Scales>, CheckpointError> {
        let key = (self.number, start);
        // Two threads that want the same read it once.
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, scales)) = remembered.iter().find(|(of, _)| *of == key) {
            return Ok(Arc::clone(scales));
        }
        let read = Arc::new(Scales::read(&self.source, module)?);
        remembered.push_back((key, Arc::clone(&read)));
        let bytes =
            |scales: &VecDeque<(_, Arc<Scales>)>| scales.iter().map(|(_, scales)| scales.bytes()).sum::<usize>();
        while remembered.len() > REMEMBERED || remembered.len() > 1 && bytes(&remembered) > REMEMBERED_BYTES {
            remembered.pop_front();
        }
        Ok(read)
    }
}

/// Where the channels end that can be decoded with the one at `at`: of a block, or all.
fn end_of_part(module: &Module, at: u64, channels: u64) -> u64 {
    match module.scheme.granularity() {
        Granularity::Block { rows, .. } if !is_of_matrices(module) => {
            (at / u64::from(rows.get()) + 1) * u64::from(rows.get())
        }
        _ => channels,
    }
}

/// Whether it is of blocks that begin anew in each of several matrices.
fn is_of_matrices(module: &Module) -> bool {
    matches!(module.scheme.granularity(), Granularity::Block { .. }) && module.scheme.channel_dims().get() > 1
}
