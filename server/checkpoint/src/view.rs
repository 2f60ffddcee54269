//! A model as its layers are quantized: what is quantized already is seen as the dense weights that it stands for, and experts in one tensor as a
//! tensor for each matrix. Whoever reads it knows nothing of that.

mod decoded;
mod experts;

use std::collections::HashMap;

use quarrel_proto::v1;

pub(crate) use self::decoded::Decoded;
use crate::{error::CheckpointError, fate::plan_of, model::Model};

/// The model as a command finds it. A file alone is seen as it is: it may be quantized in part, and stays so.
///
/// # Errors
/// [`CheckpointError`] for a command that gets something wrong, and for quantized layers that cannot be understood.
pub(crate) fn view(mut model: Model, command: &v1::Quantize) -> Result<Model, CheckpointError> {
    let Some(folder) = model.folder() else { return Ok(model) };
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
