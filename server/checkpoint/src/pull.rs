//! A stored source as the rows of a stream, to be quantized on the way to whoever pulls it: a checkpoint, or layers in columns.

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use futures::{
    Stream, StreamExt,
    stream::{self, BoxStream},
};
use quarrel_engine::Limits;
use quarrel_proto::{
    Reason,
    v1::{self, command::Verb, quantize::How},
};
use tokio::{sync::Semaphore, task::spawn_blocking};

use crate::{
    columns::{Columns, holds_columns},
    error::CheckpointError,
    fate::{Fate, fates, float_word, of_checkpoint},
    fused::{fused, with_shared_scales},
    local::rows_of_weights,
    model::Model,
    quantizer::Weights,
    storage::Location,
    target::Stop,
    view::view,
};

/// What a stream is given instead of a client's messages.
#[derive(Debug)]
pub struct Pull {
    /// The command that its rows are for: of a stream, without URIs.
    pub command: v1::Command,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Model(Vec<Weights>),
    Columns(Columns),
}

impl Pull {
    /// Opens a source. It reads much of a checkpoint where fused layers must share a scale, and may block.
    ///
    /// Every tensor of floats of a checkpoint becomes a layer: what the command keeps comes back with its weights. Others cannot be sent.
    /// Batches of columns are within the limits.
    ///
    /// # Errors
    /// [`CheckpointError`] of any kind.
    pub fn open(
        source: &Location,
        command: v1::Quantize,
        limits: Limits,
        stop: &Stop,
    ) -> Result<Pull, CheckpointError> {
        let (mut command, source) = match holds_columns(source) {
            true => (of_checkpoint(command, false), Source::Columns(Columns::open(source, limits)?)),
            false => {
                let (command, layers) = of_model(source, command, stop)?;
                (command, Source::Model(layers))
            }
        };
        command.return_kept = Some(true);
        let command = v1::Command { verb: Some(Verb::Quantize(command)), ..v1::Command::default() };
        Ok(Pull { command, source })
    }

    /// Whether it is of layers in columns.
    pub(crate) fn is_of_columns(&self) -> bool {
        matches!(self.source, Source::Columns(_))
    }

    /// Bytes of its rows' weights, or of the files that they are in.
    pub(crate) fn bytes(&self) -> u64 {
        match &self.source {
            Source::Model(layers) => layers.iter().map(|layer| layer.tensor.bytes()).sum(),
            Source::Columns(columns) => columns.bytes(),
        }
    }

    /// The rows, in the order of the files: those of columns, or of each tensor in runs of at most 2 MiB or a channel. Within a runtime.
    pub fn rows(self) -> (SchemaRef, BoxStream<'static, Result<RecordBatch, CheckpointError>>) {
        match self.source {
            Source::Model(layers) => {
                let (schema, rows) = rows_of_weights(layers);
                (schema, rows.boxed())
            }
            Source::Columns(columns) => (SchemaRef::clone(columns.schema()), batches(columns).boxed()),
        }
    }
}

/// A checkpoint's layers, and the command for them.
fn of_model(
    source: &Location,
    command: v1::Quantize,
    stop: &Stop,
) -> Result<(v1::Quantize, Vec<Weights>), CheckpointError> {
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
    Ok((command, layers))
}

/// Batches of columns that are being read at a time, by whoever: one may take several times its size meanwhile.
const READING_MAX: usize = 2;
static READING: Semaphore = Semaphore::const_new(READING_MAX);

/// The batches of a file, each read on a thread that may block when the one before is taken.
fn batches(columns: Columns) -> impl Stream<Item = Result<RecordBatch, CheckpointError>> + Send + 'static {
    stream::unfold(Some(columns), |columns| async {
        let mut columns = columns?;
        let permit = READING.acquire().await;
        let read = spawn_blocking(move || {
            let _permit = permit;
            let next = columns.next_batch();
            (columns, next)
        });
        match read.await {
            Ok((columns, Ok(Some(batch)))) => Some((Ok(batch), Some(columns))),
            Ok((_, Ok(None))) => None,
            Ok((_, Err(error))) => Some((Err(error), None)),
            Err(error) => Some((Err(CheckpointError::Ours(error.to_string())), None)),
        }
    })
}
