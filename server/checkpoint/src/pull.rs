//! A stored checkpoint as the rows of a stream, to be quantized on the way to whoever pulls it.

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use futures::{StreamExt, stream::BoxStream};
use quarrel_proto::{
    Reason,
    v1::{self, command::Verb, quantize::How},
};

use crate::{
    error::CheckpointError,
    fate::{Fate, fates, float_word, of_checkpoint},
    fused::{fused, with_shared_scales},
    job::Weights,
    local::rows_of_weights,
    model::Model,
    storage::Location,
    target::Stop,
    view::view,
};

/// What a stream is given instead of a client's messages.
#[derive(Debug)]
pub struct Pull {
    /// The command that its rows are for: of a stream, without URIs.
    pub command: v1::Command,
    layers: Vec<Weights>,
}

impl Pull {
    /// Bytes of its rows' weights.
    pub(crate) fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.tensor.bytes()).sum()
    }
}

impl Pull {
    /// Opens a checkpoint. It reads much of it where fused layers must share a scale, and may block.
    ///
    /// Every tensor of floats becomes a layer: what the command keeps comes back with its weights. Others cannot be sent.
    ///
    /// # Errors
    /// [`CheckpointError`] of any kind.
    pub fn open(source: &Location, command: v1::Quantize, stop: &Stop) -> Result<Pull, CheckpointError> {
        let model = Model::open(source)?;
        let command = of_checkpoint(command, model.folder().is_some());
        let model = view(model, &command)?;
        let fates = fates(model.shards(), &command)?;
        let mut layers = Vec::new();
        let mut others = Vec::new();
        for ((source, tensor), fate) in model.tensors().zip(fates.iter().flatten()) {
            match fate {
                Fate::Copied { reason: Reason::AlreadyQuantized, message } => {
                    let message = format!("{message}: expected a dense checkpoint");
                    return Err(CheckpointError::Command { reason: Reason::AlreadyQuantized, message });
                }
                Fate::Copied { reason: Reason::NotAWeight, .. } => others.push(tensor.name.clone()),
                Fate::Copied { .. } | Fate::Sent(_) => {}
            }
            if let Some(dtype) = float_word(tensor.dtype) {
                layers.push(Weights { source: source.clone(), tensor: tensor.clone(), dtype });
            }
        }
        let mut command = with_shared_scales(&command, &fused(model.shards(), &command, stop)?, |_| true);
        if let Some(How::Recipe(recipe)) = &mut command.how {
            recipe.ignore.extend(others);
        }
        command.return_kept = Some(true);
        Ok(Pull { command: v1::Command { verb: Some(Verb::Quantize(command)), ..v1::Command::default() }, layers })
    }

    /// The rows, in the order of the files, each a run of at most 2 MiB or a channel. Within a runtime.
    pub fn rows(self) -> (SchemaRef, BoxStream<'static, Result<RecordBatch, CheckpointError>>) {
        let (schema, rows) = rows_of_weights(self.layers);
        (schema, rows.boxed())
    }
}
