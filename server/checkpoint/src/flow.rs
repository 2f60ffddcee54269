//! Layers in columns, from a file or to one: the way of a stream, whose rows are read from a file and whose answers are written.
//!
//! Its rows have no end that is known before, so nothing is gone on with: a run that was stopped leaves nothing, and is begun anew.

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Instant};

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use futures::{
    Stream, StreamExt,
    stream::{self, BoxStream},
};
use quarrel_engine::{Limits, Output};
use quarrel_proto::{
    VERSION,
    command::to_json,
    metadata,
    v1::{self, command::Verb},
};
use serde_json::Map;
use tokio::task::{JoinHandle, spawn_blocking};

use crate::{
    checks::{refuse_calibrated, refuse_overlap},
    columns::{Columns, ColumnsFile, is_columns},
    error::CheckpointError,
    fate::{of_checkpoint, plan_of},
    job::{Told, pass},
    local::Local,
    pull::Pull,
    put::{Closed, Put, Written},
    report::{By, Gate, Layers, Report, Totals},
    storage::Location,
    target::{Replace, Stop, Target},
};

/// Layers from one place to another, of which one is a file of columns.
pub struct Flow {
    source: PathBuf,
    /// Of the source.
    bytes: u64,
    command: v1::Command,
    schema: SchemaRef,
    rows: BoxStream<'static, Result<RecordBatch, CheckpointError>>,
    into: Into,
    gate: Gate,
    began: Instant,
}

/// What a flow may take.
#[derive(Debug, Clone, Copy)]
pub struct FlowLimits {
    /// Of what is read.
    pub layers: Limits,
    /// Of a model's file.
    pub shard_bytes_max: u64,
}

/// Where a flow goes.
enum Into {
    Model(Box<Put>),
    /// The file is begun with the first answer's schema.
    File(Target),
}

impl Flow {
    /// Whether layers go so from the one to the other, and not as a job.
    pub fn is_for(source: &Location, destination: &Location) -> bool {
        is_columns(source) || is_columns(destination)
    }

    /// Whether a model comes of it, whose loaders look for codes in `Linear` layers.
    pub fn makes_model(destination: &Location) -> bool {
        !is_columns(destination)
    }

    /// Looks at everything before any work is done. It may block. Within a runtime.
    ///
    /// # Errors
    /// [`CheckpointError`] of any kind.
    pub fn open(
        (source, destination): (&Location, &Location),
        command: v1::Quantize,
        (replace, gate): (Replace, Gate),
        limits: FlowLimits,
        stop: &Stop,
    ) -> Result<Flow, CheckpointError> {
        let began = Instant::now();
        refuse_overlap(source, destination)?;
        let command = of_checkpoint(command, Flow::makes_model(destination));
        refuse_calibrated(&plan_of(&command)?)?;
        let (command, schema, rows, bytes) = match is_columns(source) {
            true => {
                let columns = Columns::open(source, limits.layers)?;
                let (schema, bytes) = (Arc::clone(columns.schema()), columns.bytes());
                (kept(command), schema, batches(columns).boxed(), bytes)
            }
            false => {
                let pull = Pull::open(source, command, stop)?;
                let (command, bytes) = (pull.command.clone(), pull.bytes());
                let (schema, rows) = pull.rows();
                (command, schema, rows, bytes)
            }
        };
        let into = match Flow::makes_model(destination) {
            true => {
                let Some(Verb::Quantize(quantize)) = command.verb.clone() else {
                    return Err(CheckpointError::Ours("a flow of another verb".to_owned()));
                };
                Into::Model(Box::new(Put::open(destination, quantize, limits.shard_bytes_max, replace, stop)?))
            }
            false => Into::File(Target::new(destination, replace)?),
        };
        Ok(Flow { source: source.shown(), bytes, command, schema, rows, into, gate, began })
    }

    /// Bytes of the source.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The command that every row is for.
    pub fn command(&self) -> &v1::Command {
        &self.command
    }

    /// Does it, and says what became of every layer.
    ///
    /// # Errors
    /// [`CheckpointError`] of any kind: nothing is left then.
    pub async fn run(
        self,
        local: &Local,
        by: By,
        stop: &Arc<Stop>,
        mut tell: impl FnMut(Told<'_>),
    ) -> Result<Report, CheckpointError> {
        let Flow { source, command, schema, rows, into, gate, began, .. } = self;
        let Some(Verb::Quantize(quantize)) = &command.verb else {
            return Err(CheckpointError::Ours("a flow of another verb".to_owned()));
        };
        let plan = plan_of(quantize)?;
        let entries = [
            (metadata::COMMAND, to_json(&plan.effective)),
            (metadata::VERSION, VERSION.to_owned()),
            (metadata::LEVEL, by.cpu_level.clone()),
        ];
        let said: HashMap<String, String> = entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let answered = Arc::new(Output::schema(&plan).with_metadata(said));
        let mut answers = local.answers_to(&plan, &schema, Arc::clone(&answered), rows);
        let mut sink = match into {
            Into::Model(put) => Sink::Model { put, writing: None },
            Into::File(target) => {
                let path = target.path();
                Sink::File { file: Box::new(ColumnsFile::new(target, &answered)?), layers: Layers::default(), path }
            }
        };
        let took = async {
            while let Some(answer) = answers.next().await {
                let answer = answer?;
                stop.check()?;
                sink.take(&answer.batch, stop).await?;
                let name = sink.last_layer().unwrap_or_default().to_owned();
                tell(Told::Layer { name: &name, bytes: answer.progress.bytes_in, completes: false });
            }
            tell(Told::Writes);
            sink.end(gate, stop).await
        };
        match took.await {
            Ok(()) => sink.finish((source, command), by, began, stop),
            Err(error) => {
                sink.abandon().await;
                Err(error)
            }
        }
    }
}

/// The command of rows whose kept layers are written too.
fn kept(mut command: v1::Quantize) -> v1::Command {
    command.return_kept = Some(true);
    v1::Command { verb: Some(Verb::Quantize(command)), ..v1::Command::default() }
}

/// The batches of a file, each read on a thread that may block when the one before is taken.
fn batches(columns: Columns) -> impl Stream<Item = Result<RecordBatch, CheckpointError>> + Send + 'static {
    stream::unfold(Some(columns), |columns| async {
        let mut columns = columns?;
        let read = spawn_blocking(move || {
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

type Writing = JoinHandle<Result<Written, CheckpointError>>;

/// What takes the answers.
enum Sink {
    Model { put: Box<Put>, writing: Option<Writing> },
    File { file: Box<ColumnsFile>, layers: Layers, path: PathBuf },
}

impl Sink {
    async fn take(&mut self, batch: &RecordBatch, stop: &Arc<Stop>) -> Result<(), CheckpointError> {
        match self {
            Sink::Model { put, writing } => {
                let closed = put.take(batch)?;
                write(put, writing, closed, stop).await
            }
            Sink::File { file, layers, .. } => {
                layers.take(batch)?;
                file.write(batch)
            }
        }
    }

    fn last_layer(&self) -> Option<&str> {
        match self {
            Sink::Model { put, .. } => put.last_layer(),
            Sink::File { layers, .. } => layers.last_layer(),
        }
    }

    /// All rows have come; nothing is kept of a model that is not good enough.
    async fn end(&mut self, gate: Gate, stop: &Arc<Stop>) -> Result<(), CheckpointError> {
        match self {
            Sink::Model { put, writing } => {
                let closed = put.end(None)?;
                pass(gate, put.layers())?;
                write(put, writing, closed, stop).await?;
                written(put, writing).await
            }
            Sink::File { layers, .. } => pass(gate, layers.all()),
        }
    }

    fn finish(
        self,
        (source, command): (PathBuf, v1::Command),
        by: By,
        began: Instant,
        stop: &Stop,
    ) -> Result<Report, CheckpointError> {
        match self {
            Sink::Model { mut put, .. } => match put.finish(source.display().to_string(), Map::new(), by, stop) {
                Ok(report) => Ok(report),
                Err(error) => {
                    put.abandon();
                    Err(error)
                }
            },
            Sink::File { file, layers, path } => {
                let bytes = file.seal(stop)?;
                let layers = layers.into_all();
                let totals = Totals::of(&layers, layers.iter().map(|layer| layer.bytes).sum(), bytes);
                let ends = (source.display().to_string(), path.display().to_string());
                Ok(Report::of_stream(ends, &command, (totals, layers), by, began))
            }
        }
    }

    async fn abandon(self) {
        let Sink::Model { put, writing } = self else { return };
        if let Some(writing) = writing {
            let _: Result<_, _> = writing.await;
        }
        let _: Result<_, _> = spawn_blocking(move || put.abandon()).await;
    }
}

/// Has files written that are full, one after the other, while more is computed.
async fn write(
    put: &mut Put,
    writing: &mut Option<Writing>,
    closed: Vec<Closed>,
    stop: &Arc<Stop>,
) -> Result<(), CheckpointError> {
    for closed in closed {
        written(put, writing).await?;
        let stop = stop.hold();
        *writing = Some(spawn_blocking(move || closed.write(&stop)));
    }
    Ok(())
}

/// Waits for the file that is being written.
async fn written(put: &mut Put, writing: &mut Option<Writing>) -> Result<(), CheckpointError> {
    let Some(file) = writing.take() else { return Ok(()) };
    put.add(file.await.map_err(|error| CheckpointError::Ours(error.to_string()))??);
    Ok(())
}
