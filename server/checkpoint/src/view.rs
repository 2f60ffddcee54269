//! A model as its layers are quantized: what is quantized already is seen as the dense weights that it stands for, and experts in one tensor as a
//! tensor for each matrix. Whoever reads it knows nothing of that.

mod decoded;
mod experts;
mod moved;
mod repacked;
mod whole;

use std::{collections::HashMap, io, ops::Range};

use bytes::Bytes;
use quarrel_proto::v1;

use self::{decoded::Decoded, whole::Whole};
pub(crate) use self::{
    decoded::{dense, files as dense_files, repacked_files},
    moved::{From, Moved, moved},
    whole::{Compute, whole},
};
use crate::{checks::refuse_parts, error::CheckpointError, fate::plan_of, model::Model};

/// Where tensors lie that are computed where they are read: behind any file. Those that are computed of such lie behind them.
pub(crate) const BEHIND: u64 = 1 << 62;

/// Tensors of a file that are computed where they are read.
#[derive(Debug)]
pub(crate) enum Computed {
    /// Of quantized layers.
    Decoded(Decoded),
    /// Of other files' tensors: rows in another order, numbers of another type.
    Moved(Moved),
    /// Of others, one by one.
    Whole(Whole),
}

impl Computed {
    /// Whether a place is one of a computed tensor.
    pub(crate) fn holds(at: u64) -> bool {
        at >= BEHIND
    }

    /// Reads some of a computed tensor, wherever it begins and ends.
    pub(crate) fn read(&self, at: &Range<u64>) -> io::Result<Bytes> {
        match self {
            Computed::Decoded(decoded) => decoded.read(at),
            Computed::Moved(moved) => moved.read(at),
            Computed::Whole(whole) => whole.read(at),
        }
    }
}

/// The model as a command finds it. A file of safetensors alone is seen as it is: it may be quantized in part, and stays so. Blocks of GGUF have no place in
/// what it becomes, and are decoded.
///
/// # Errors
/// [`CheckpointError`] for a command that gets something wrong, and for quantized layers that cannot be understood.
pub(crate) fn view(mut model: Model, command: &v1::Quantize) -> Result<Model, CheckpointError> {
    refuse_parts(&model)?;
    let Some(folder) = model.folder() else {
        if model.shards().iter().any(|shard| shard.gguf().is_some()) {
            let shards = decoded::files(&model)?;
            model.replace_shards(shards);
        }
        return Ok(model);
    };
    let plan = plan_of(command)?;
    let config = folder.config.clone().unwrap_or_default();
    let mut shards = decoded::files(&model)?;
    shards = shards.iter().map(|shard| experts::file(shard, &plan, &config)).collect();
    // Names that come of a layer may be those of others.
    let mut homes = HashMap::new();
    for (shard, tensor) in shards.iter().flat_map(|shard| shard.tensors().iter().map(move |tensor| (shard, tensor))) {
        if let Some(other) = homes.insert(tensor.name.as_str(), shard.path()) {
            let (one, other) = (shard.path().display(), other.display());
            let detail = format!("layer `{}` is in `{one}` and, in another form, in `{other}`", tensor.name);
            return Err(CheckpointError::Model { path: model.path(), detail });
        }
    }
    model.replace_shards(shards);
    Ok(model)
}
