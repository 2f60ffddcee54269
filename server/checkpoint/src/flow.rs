//! Layers in columns, from a file or to one: the way of a stream, whose rows are read from a file and whose answers are written.
//!
//! Its rows have no end that is known before, so nothing is gone on with: a run that was stopped leaves nothing, and is begun anew.

use std::{path::PathBuf, sync::Arc, time::Instant};

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use futures::{StreamExt, stream::BoxStream};
use quarrel_engine::{Limits, Output};
use quarrel_proto::v1::{self, command::Verb};
use tokio::task::spawn_blocking;

use crate::{
    beside::Beside,
    checks::{refuse_calibrated, refuse_overlap},
    columns::{ColumnsFile, holds_columns, is_columns},
    error::CheckpointError,
    fate::{of_checkpoint, plan_of},
    filling::Filling,
    local::Local,
    pull::Pull,
    put::Put,
    quantizer::Told,
    report::{By, Gate, Layers, Report, Totals, pass},
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
    Model(Box<Put>, Beside),
    /// The file is begun with the first answer's schema.
    File(Target),
}

impl Flow {
    /// Whether layers go so from the one to the other, and not as a job. It may block.
    pub fn is_for(source: &Location, destination: &Location) -> bool {
        is_columns(destination) || holds_columns(source)
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
        stop: &Arc<Stop>,
    ) -> Result<Flow, CheckpointError> {
        let began = Instant::now();
        refuse_overlap(source, destination)?;
        let command = of_checkpoint(command, Flow::makes_model(destination));
        refuse_calibrated(&plan_of(&command)?)?;
        let pull = Pull::open(source, command, limits.layers, stop)?;
        let (command, bytes, of_columns) = (pull.command.clone(), pull.bytes(), pull.is_of_columns());
        let (schema, rows) = pull.rows();
        let into = match Flow::makes_model(destination) {
            true => {
                let Some(Verb::Quantize(quantize)) = command.verb.clone() else {
                    return Err(CheckpointError::Ours("a flow of another verb".to_owned()));
                };
                let beside = if of_columns { Beside::columns(source)? } else { Beside::default() };
                let put = Put::open(destination, quantize, limits.shard_bytes_max, replace, stop)?;
                Into::Model(Box::new(put), beside)
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
    /// [`CheckpointError`] of any kind. Then nothing is left; nor is it if this is dropped, once `stop` is released.
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
        let answered = Arc::new(Output::reply_schema(&plan, &by.cpu_level));
        let mut answers = local.answers_to(&plan, &schema, Arc::clone(&answered), rows);
        let mut sink = match into {
            Into::Model(put, beside) => Sink::Model(Box::new(Filling::new(*put, Arc::clone(stop))), beside),
            Into::File(target) => {
                let path = target.path();
                Sink::File { file: Box::new(ColumnsFile::new(target, &answered)?), layers: Layers::default(), path }
            }
        };
        let took = async {
            while let Some(answer) = answers.next().await {
                let answer = answer?;
                stop.check()?;
                sink.take(answer.batch).await?;
                let name = sink.last_layer().unwrap_or_default().to_owned();
                tell(Told::Layer { name: &name, bytes: answer.progress.bytes_in, completes: false });
            }
            tell(Told::Writes);
            sink.end((source, command), (by, gate), began, stop).await
        };
        let report = took.await;
        if report.is_err() {
            // What there is of it is being taken back.
            stop.released().await;
        }
        report
    }
}

/// What takes the answers.
enum Sink {
    Model(Box<Filling>, Beside),
    File { file: Box<ColumnsFile>, layers: Layers, path: PathBuf },
}

impl Sink {
    async fn take(&mut self, batch: RecordBatch) -> Result<(), CheckpointError> {
        match self {
            Sink::Model(filling, _) => filling.take(batch).await,
            Sink::File { file, layers, .. } => {
                layers.take(&batch)?;
                file.write(&batch)
            }
        }
    }

    fn last_layer(&self) -> Option<&str> {
        match self {
            Sink::Model(filling, _) => filling.last_layer(),
            Sink::File { layers, .. } => layers.last_layer(),
        }
    }

    /// All rows have come; nothing is kept of what is not good enough.
    async fn end(
        self,
        (source, command): (PathBuf, v1::Command),
        (by, gate): (By, Gate),
        began: Instant,
        stop: &Arc<Stop>,
    ) -> Result<Report, CheckpointError> {
        let source = source.display().to_string();
        match self {
            Sink::Model(mut filling, beside) => {
                filling.end(None, gate).await?;
                filling.finish(source, beside, by).await
            }
            Sink::File { file, layers, path } => {
                pass(gate, layers.all())?;
                let stop = stop.hold();
                let sealing = spawn_blocking(move || file.seal(&stop));
                let bytes = sealing.await.map_err(|error| CheckpointError::Ours(error.to_string()))??;
                let layers = layers.into_all();
                let totals = Totals::of(&layers, layers.iter().map(|layer| layer.bytes).sum(), bytes);
                let ends = (source, path.display().to_string());
                Ok(Report::of_stream(ends, &command, (totals, layers), by, began))
            }
        }
    }
}
