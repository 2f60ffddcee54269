//! The quantizer in this process: tensors are read, computed on the pool's threads and answered in order, a few runs at a time.
//!
//! It is the path of a stream without the stream: the same plan, rows, units and answers of the engine. What it holds is bounded by the runs that are
//! read and computed at once, whatever the size of the model; only scales per tensor and ladders hold a whole layer.

mod codes;
mod weights;

pub(crate) use self::codes::{Scales, decode};

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::{Schema, SchemaRef};
use bytes::Bytes;
use futures::{
    FutureExt, Stream, StreamExt,
    future::{BoxFuture, try_join_all},
    stream::{self, BoxStream},
};
use quarrel_engine::{Answer, Cancel, Cancelled, Intake, Level, Limits, Need, Output, Plan, Unit};
use quarrel_pool::{Lane, Pool};
use quarrel_proto::{
    Reason,
    v1::{self, command::Verb},
};
use quarrel_shelf::Shelf;

use crate::{
    answers::Asked,
    error::CheckpointError,
    fate::plan_of,
    quantizer::{Coded, Quantizer, Weights},
    source::Source,
    unit::{Row, Values},
};

/// Bytes of one run, where a channel is not larger: what is read at once, and fits into a core's cache or nearly so.
pub(crate) const RUN_BYTES: u64 = 2 << 20;

/// What a job in this process holds of weights and results, unless it is told otherwise.
pub const JOB_BYTES: usize = 48 << 20;

/// Threads of this process that quantize.
#[derive(Debug, Clone)]
pub struct Local {
    pool: Pool,
    level: Level,
    shelf: Shelf,
    /// Runs that are read, or computed, at once.
    ahead: usize,
    /// Of what must be in memory at once, beside those.
    span_bytes_max: usize,
}

/// Some channels of a layer: what is read at once, and becomes a row.
trait Run: Send + 'static {
    /// The columns of its row.
    fn schema() -> Schema;
    /// The file that it is read from.
    fn source(&self) -> &Source;
    /// Reads it, which may block.
    fn read(&self) -> Result<Bytes, CheckpointError>;
    /// The row.
    fn row(&self, schema: &Arc<Schema>, bytes: Bytes) -> Result<RecordBatch, CheckpointError>;
}

impl Local {
    /// So many threads at a CPU level, which may hold so many bytes of weights and results, beside layers whose scales need all
    /// of them.
    ///
    /// # Errors
    /// [`CheckpointError::Ours`] if the system gives no threads.
    pub fn new(threads: usize, level: Level, memory_bytes: usize) -> Result<Local, CheckpointError> {
        let pool = Pool::new(threads).map_err(|error| CheckpointError::Ours(error.to_string()))?;
        Ok(Local::on(pool, level, Shelf::default(), memory_bytes))
    }

    /// The same on threads, and in memory, that others use too.
    pub fn on(pool: Pool, level: Level, shelf: Shelf, memory_bytes: usize) -> Local {
        // A run is read, waits, and is computed to results that are no larger than itself.
        let ahead = (memory_bytes / (4 * RUN_BYTES as usize)).max(1);
        Local { pool, level, shelf, ahead, span_bytes_max: Limits::NONE.span_bytes_max }
    }

    /// The same, which refuses layers of which more must be in memory at once: those with scales per tensor, and ladders.
    #[must_use]
    pub fn with_spans_of(self, span_bytes_max: usize) -> Local {
        Local { span_bytes_max, ..self }
    }

    /// The answers to runs, in order. The first error is the last of them.
    fn answers<R: Run>(
        &self,
        plan: &Plan,
        runs: impl Iterator<Item = R> + Send + 'static,
    ) -> BoxStream<'static, Result<Answer, CheckpointError>> {
        let schema = Arc::new(R::schema());
        let lane = self.pool.lane();
        let of = Arc::clone(&schema);
        let read = stream::iter(runs).map(move |run| read(&lane, run)).buffered(self.ahead);
        let rows = read.map(move |read| read.and_then(|(run, bytes)| run.row(&of, bytes))).boxed();
        self.answers_to(plan, &schema, Arc::new(Output::schema(plan)), rows)
    }

    /// The answers to rows of one schema, in another, in order. The first error is the last of them.
    pub(crate) fn answers_to(
        &self,
        plan: &Plan,
        schema: &Schema,
        answered: SchemaRef,
        rows: BoxStream<'static, Result<RecordBatch, CheckpointError>>,
    ) -> BoxStream<'static, Result<Answer, CheckpointError>> {
        let mut work = match Work::new(self, plan, schema) {
            Ok(work) => work,
            Err(error) => return stream::iter([Err(error)]).boxed(),
        };
        let mut output = Output::new(plan, answered);
        // Intake is sequential, reading and computing are not; answers are in order again.
        let end = stream::once(std::future::ready(None));
        let computed = rows.map(Some).chain(end).map(move |row| {
            let started = match row {
                Some(row) => row.and_then(|row| work.start(&row)),
                None => work.end(),
            };
            async move { started?.await }
        });
        let computed = computed.buffered(self.ahead);
        let answered = computed.map(move |results| self::answered(&mut output, results)).flat_map(stream::iter);
        // What follows an error means nothing.
        let mut is_over = false;
        answered
            .take_while(move |row| {
                let goes_on = !is_over;
                is_over |= row.is_err();
                std::future::ready(goes_on)
            })
            .boxed()
    }
}

impl Quantizer for Local {
    type Error = CheckpointError;

    fn quantize(
        &self,
        command: v1::Quantize,
        layers: Vec<Weights>,
    ) -> BoxStream<'static, Result<Row, CheckpointError>> {
        let plan = match plan_of(&command) {
            Ok(plan) => plan,
            Err(error) => return stream::iter([Err(error)]).boxed(),
        };
        let mut asked = layers.clone().into_iter().flat_map(weights::runs).map(|run| run.asked());
        rows(self.answers(&plan, layers.into_iter().flat_map(weights::runs)), move |batch| {
            crate::answers::rows(batch, &mut asked)
        })
    }

    fn dequantize(&self, dtype: String, layers: Vec<Coded>) -> BoxStream<'static, Result<Values, CheckpointError>> {
        let plan = match dequantize(&dtype) {
            Ok(plan) => plan,
            Err(error) => return stream::iter([Err(error)]).boxed(),
        };
        let mut asked = codes::Expected::new(&layers);
        let answers = self.answers(&plan, layers.into_iter().flat_map(codes::runs));
        rows(answers.map(|answer| answer.map_err(of_a_file)).boxed(), move |batch| asked.values(batch))
    }
}

/// The plan that makes values of a type.
fn dequantize(dtype: &str) -> Result<Plan, CheckpointError> {
    let verb = Verb::Dequantize(v1::Dequantize { dtype: Some(dtype.to_owned()) });
    Plan::new(&v1::Command { verb: Some(verb), ..v1::Command::default() })
        .map_err(|error| CheckpointError::Ours(error.to_string()))
}

/// The answers to a row that is a whole layer, computed in this thread.
fn computed_here(plan: &Plan, row: &RecordBatch) -> Result<Vec<RecordBatch>, CheckpointError> {
    let mut intake = Intake::new(plan, Limits::NONE, &row.schema())?;
    let mut output = Output::new(plan, Arc::new(Output::schema(plan)));
    intake.begin(row)?;
    let mut batches = Vec::new();
    while let Some(need) = intake.next()? {
        let Need::Unit(unit) = need else { continue };
        let result = unit.compute(Level::detect(), &Cancel::default(), &Shelf::default());
        let result = result.map_err(|Cancelled| CheckpointError::Ours("a unit was cancelled".to_owned()));
        for answer in answered(&mut output, result.map(|result| vec![result])) {
            batches.push(answer?.batch);
        }
    }
    Ok(batches)
}

/// The rows of answers.
fn rows<T: Send + 'static>(
    answers: BoxStream<'static, Result<Answer, CheckpointError>>,
    mut rows: impl FnMut(&RecordBatch) -> Result<Vec<T>, CheckpointError> + Send + 'static,
) -> BoxStream<'static, Result<T, CheckpointError>> {
    let rows = answers.map(move |answer| match answer.and_then(|answer| rows(&answer.batch)) {
        Ok(rows) => rows.into_iter().map(Ok).collect(),
        Err(error) => vec![Err(error)],
    });
    rows.flat_map(stream::iter).boxed()
}

/// Rows to units that are computed.
struct Work {
    intake: Intake,
    lane: Arc<Lane>,
    level: Level,
    shelf: Shelf,
    cancel: StopWhenDropped,
}

/// Units that nobody waits for any more stop within a block.
#[derive(Default)]
struct StopWhenDropped(Cancel);

impl Drop for StopWhenDropped {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

type Computing = BoxFuture<'static, Result<Vec<quarrel_engine::Result>, CheckpointError>>;

impl Work {
    fn new(local: &Local, plan: &Plan, schema: &Schema) -> Result<Work, CheckpointError> {
        let limits = Limits { span_bytes_max: local.span_bytes_max, ..Limits::NONE };
        Ok(Work {
            intake: Intake::new(plan, limits, schema)?,
            lane: Arc::new(local.pool.lane()),
            level: local.level,
            shelf: local.shelf.clone(),
            cancel: StopWhenDropped::default(),
        })
    }

    /// Starts what a row makes possible.
    fn start(&mut self, row: &RecordBatch) -> Result<Computing, CheckpointError> {
        self.intake.begin(row)?;
        let mut units = Vec::new();
        while let Some(need) = self.intake.next()? {
            match need {
                Need::Unit(unit) => units.push(self.compute(unit)),
                // Room is what `ahead` leaves.
                Need::Span(_) | Need::Rest => {}
            }
        }
        Ok(try_join_all(units).boxed())
    }

    /// After the last row: whether its layer is complete.
    fn end(&self) -> Result<Computing, CheckpointError> {
        self.intake.end()?;
        Ok(std::future::ready(Ok(Vec::new())).boxed())
    }

    fn compute(&self, unit: Unit) -> BoxFuture<'static, Result<quarrel_engine::Result, CheckpointError>> {
        let (level, cancel, shelf) = (self.level, self.cancel.0.clone(), self.shelf.clone());
        let computed = self.lane.run(move || unit.compute(level, &cancel, &shelf));
        computed
            .map(|computed| match computed {
                Ok(Ok(result)) => Ok(result),
                Ok(Err(Cancelled)) => Err(CheckpointError::Ours("a unit was cancelled".to_owned())),
                Err(panicked) => Err(CheckpointError::Ours(panicked.to_string())),
            })
            .boxed()
    }
}

/// The answers that a row's results make, and the error that ends them.
fn answered(
    output: &mut Output,
    results: Result<Vec<quarrel_engine::Result>, CheckpointError>,
) -> Vec<Result<Answer, CheckpointError>> {
    let results = match results {
        Ok(results) => results,
        Err(error) => return vec![Err(error)],
    };
    let mut answers = Vec::new();
    for result in results {
        let (batches, ended) = output.take(result);
        answers.extend(batches.into_iter().map(Ok));
        if let Err(error) = ended {
            answers.push(Err(error.into()));
            break;
        }
    }
    answers
}

/// Reads a run: on the pool, whose turn it is then, or where a store is waited for on a thread that may.
fn read<R: Run>(lane: &Lane, run: R) -> BoxFuture<'static, Result<(R, Bytes), CheckpointError>> {
    let is_remote = run.source().is_remote();
    let reading = move || run.read().map(|bytes| (run, bytes));
    if is_remote {
        let reading = tokio::task::spawn_blocking(reading);
        return reading.map(|read| read.map_err(|error| CheckpointError::Ours(error.to_string()))?).boxed();
    }
    lane.run(reading).map(|read| read.map_err(|panicked| CheckpointError::Ours(panicked.to_string()))?).boxed()
}

/// Runs that are read ahead of whoever takes them.
const READ_AHEAD: usize = 2;

/// Layers as rows, read where they are taken.
pub(crate) fn rows_of_weights(
    layers: Vec<Weights>,
) -> (Arc<Schema>, impl Stream<Item = Result<RecordBatch, CheckpointError>> + Send + 'static) {
    let schema = Arc::new(weights::WeightsRun::schema());
    let of = Arc::clone(&schema);
    let rows = stream::iter(layers.into_iter().flat_map(weights::runs)).map(move |run| {
        let schema = Arc::clone(&of);
        let read = tokio::task::spawn_blocking(move || run.row(&schema, run.read()?));
        read.map(|row| row.map_err(|error| CheckpointError::Ours(error.to_string()))?)
    });
    (schema, rows.buffered(READ_AHEAD))
}

/// What a run's answer must say beside its numbers.
fn asked(name: &str, (start, end, bytes): (u64, u64, u64)) -> Asked {
    Asked { name: name.to_owned(), begins: start == 0, completes: end == bytes, done: end }
}

fn broken(error: arrow_schema::ArrowError) -> CheckpointError {
    CheckpointError::Ours(error.to_string())
}

/// Nobody sends a file's rows: what is wrong with one is wrong with the file.
fn of_a_file(error: CheckpointError) -> CheckpointError {
    match error {
        CheckpointError::Layer { reason: Reason::RowInconsistent, message } => {
            CheckpointError::Layer { reason: Reason::SourceMalformed, message }
        }
        other => other,
    }
}
