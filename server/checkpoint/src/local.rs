//! The quantizer in this process: tensors are read, computed on the pool's threads and answered in order, a few runs at a time.
//!
//! It is the path of a stream without the stream: the same plan, rows, units and answers of the engine. What it holds is bounded by the runs that are
//! read and computed at once, whatever the size of the model; only scales per tensor and ladders hold a whole layer.

use std::{collections::VecDeque, sync::Arc};

use arrow_array::{ArrayRef, Int64Array, LargeBinaryArray, ListArray, RecordBatch, StringArray};
use arrow_buffer::{Buffer, OffsetBuffer};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use futures::{
    FutureExt, StreamExt,
    future::{BoxFuture, try_join_all},
    stream::{self, BoxStream},
};
use quarrel_engine::{Cancel, Cancelled, Intake, Level, Limits, Need, Output, Unit};
use quarrel_pool::{Lane, Pool};
use quarrel_proto::{column, v1};

use crate::{answers::rows, error::CheckpointError, fate::plan_of, job::Weights, unit::Row};

/// Bytes of one run, where a channel is not larger: what is read at once, and fits into a core's cache or nearly so.
const RUN_BYTES: u64 = 2 << 20;
/// So many channels are a span of blocks: runs of whole spans need not wait for each other.
const SPAN_CHANNELS: u64 = 128;
/// No layer of a file is refused for its size: there is nobody to protect.
const NO_LIMIT: usize = 1 << 48;

/// What a job in this process holds of weights and results, unless it is told otherwise.
pub const JOB_BYTES: usize = 48 << 20;

/// Threads of this process that quantize.
#[derive(Debug, Clone)]
pub struct Local {
    pool: Pool,
    level: Level,
    /// Runs that are read, or computed, at once.
    ahead: usize,
}

/// Some channels of a layer.
#[derive(Debug, Clone)]
struct Run {
    weights: Arc<Weights>,
    /// Of the tensor's bytes.
    start: u64,
    end: u64,
}

/// What a run's answer must say beside its numbers.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) name: String,
    pub(crate) begins: bool,
    pub(crate) completes: bool,
    pub(crate) done: u64,
}

impl Local {
    /// So many threads at a CPU level, which may hold so many bytes of weights and results, beside layers whose scales need all
    /// of them.
    ///
    /// # Errors
    /// [`CheckpointError::Ours`] if the system gives no threads.
    pub fn new(threads: usize, level: Level, memory_bytes: usize) -> Result<Local, CheckpointError> {
        let pool = Pool::new(threads).map_err(|error| CheckpointError::Ours(error.to_string()))?;
        // A run is read, waits, and is computed to results that are no larger than itself.
        let ahead = (memory_bytes / (4 * RUN_BYTES as usize)).max(1);
        Ok(Local { pool, level, ahead })
    }

    /// Rows of the layers' answers.
    pub fn quantize(
        &self,
        command: v1::Quantize,
        layers: Vec<Weights>,
    ) -> BoxStream<'static, Result<Row, CheckpointError>> {
        match Work::new(self, command) {
            Ok(work) => rows_of(work, self.ahead, layers),
            Err(error) => stream::iter([Err(error)]).boxed(),
        }
    }
}

/// Runs to rows.
struct Work {
    schema: SchemaRef,
    intake: Intake,
    output: Output,
    lane: Arc<Lane>,
    level: Level,
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

impl Work {
    fn new(local: &Local, command: v1::Quantize) -> Result<Work, CheckpointError> {
        let plan = plan_of(&command)?;
        let schema = Arc::new(Schema::new(vec![
            Field::new(column::LAYER_NAME, DataType::Utf8, false),
            Field::new(column::WEIGHTS, DataType::LargeBinary, false),
            Field::new(column::DTYPE, DataType::Utf8, false),
            Field::new(column::SHAPE, DataType::List(Arc::new(Field::new_list_field(DataType::Int64, true))), false),
        ]));
        let limits = Limits {
            message_bytes_max: NO_LIMIT,
            span_bytes_max: NO_LIMIT,
            batch_rows_max: NO_LIMIT,
            layers_max: NO_LIMIT,
            name_bytes_max: NO_LIMIT,
        };
        Ok(Work {
            intake: Intake::new(&plan, limits, &schema)?,
            output: Output::new(&plan, Arc::new(Output::schema(&plan))),
            schema,
            lane: Arc::new(local.pool.lane()),
            level: local.level,
            cancel: StopWhenDropped::default(),
        })
    }

    /// Starts what a run makes possible.
    fn start(
        &mut self,
        run: &Run,
        bytes: bytes::Bytes,
    ) -> Result<BoxFuture<'static, Result<Vec<quarrel_engine::Result>, CheckpointError>>, CheckpointError> {
        let batch = batch(&self.schema, run, bytes)?;
        self.intake.begin(&batch)?;
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

    fn compute(&self, unit: Unit) -> BoxFuture<'static, Result<quarrel_engine::Result, CheckpointError>> {
        let (level, cancel) = (self.level, self.cancel.0.clone());
        let computed = self.lane.run(move || unit.compute(level, &cancel));
        computed
            .map(|computed| match computed {
                Ok(Ok(result)) => Ok(result),
                Ok(Err(Cancelled)) => Err(CheckpointError::Ours("a unit was cancelled".to_owned())),
                Err(panicked) => Err(CheckpointError::Ours(panicked.to_string())),
            })
            .boxed()
    }
}

fn rows_of(work: Work, ahead: usize, layers: Vec<Weights>) -> BoxStream<'static, Result<Row, CheckpointError>> {
    let lane = Arc::clone(&work.lane);
    let runs = layers.into_iter().flat_map(runs);
    let read = stream::iter(runs).map(move |run| read(&lane, run)).buffered(ahead);
    // Intake is sequential, computing is not; answers are in order again.
    let state = State { work, asked: VecDeque::new() };
    let state = Arc::new(std::sync::Mutex::new(state));
    let (starting, answering) = (Arc::clone(&state), state);
    let computed = read
        .map(move |read| {
            let started = read.and_then(|(run, bytes)| {
                let mut state = lock(&starting);
                state.asked.push_back(asked(&run));
                state.work.start(&run, bytes)
            });
            async move {
                match started {
                    Ok(computing) => computing.await,
                    Err(error) => Err(error),
                }
            }
        })
        .buffered(ahead);
    let answered = computed.map(move |results| lock(&answering).answer(results));
    // What follows an error means nothing.
    let mut is_over = false;
    answered
        .flat_map(stream::iter)
        .take_while(move |row| {
            let goes_on = !is_over;
            is_over |= row.is_err();
            std::future::ready(goes_on)
        })
        .boxed()
}

struct State {
    work: Work,
    /// Runs that are not answered.
    asked: VecDeque<Asked>,
}

fn lock(state: &std::sync::Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    // A panic between two lines of this file leaves nothing half done.
    state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl State {
    /// The rows of a run's results, and the error that ends them.
    fn answer(
        &mut self,
        results: Result<Vec<quarrel_engine::Result>, CheckpointError>,
    ) -> Vec<Result<Row, CheckpointError>> {
        let mut answers = Vec::new();
        let results = match results {
            Ok(results) => results,
            Err(error) => return vec![Err(error)],
        };
        for result in results {
            let (batches, ended) = self.work.output.take(result);
            for answer in batches {
                match rows(&answer.batch, &mut self.asked) {
                    Ok(rows) => answers.extend(rows.into_iter().map(Ok)),
                    Err(error) => answers.push(Err(error)),
                }
            }
            if let Err(error) = ended {
                answers.push(Err(error.into()));
                break;
            }
        }
        answers
    }
}

fn read(lane: &Lane, run: Run) -> BoxFuture<'static, Result<(Run, bytes::Bytes), CheckpointError>> {
    let reading = lane.run(move || {
        let Weights { source, tensor, .. } = &*run.weights;
        match source.read(tensor, run.start..run.end) {
            Ok(bytes) => Ok((run, bytes)),
            Err(error) => {
                let (layer, path) = (tensor.name.clone(), source.path().to_owned());
                Err(CheckpointError::Read { layer, path, error })
            }
        }
    });
    reading.map(|read| read.map_err(|panicked| CheckpointError::Ours(panicked.to_string()))?).boxed()
}

/// A layer's runs: whole channels, and at least one.
fn runs(weights: Weights) -> impl Iterator<Item = Run> {
    let bytes = weights.tensor.bytes();
    let channels = weights.tensor.shape.first().copied().unwrap_or(1).max(1);
    let channel = bytes / channels;
    let step = RUN_BYTES.checked_div(channel).unwrap_or(channels).clamp(1, channels);
    let step = if step > SPAN_CHANNELS { step - step % SPAN_CHANNELS } else { step };
    let weights = Arc::new(weights);
    (0..channels.div_ceil(step)).map(move |at| {
        let (start, end) = (at * step * channel, ((at + 1) * step).min(channels) * channel);
        Run { weights: Arc::clone(&weights), start, end }
    })
}

fn asked(run: &Run) -> Asked {
    let tensor = &run.weights.tensor;
    Asked { name: tensor.name.clone(), begins: run.start == 0, completes: run.end == tensor.bytes(), done: run.end }
}

/// A run as a row.
fn batch(schema: &SchemaRef, run: &Run, bytes: bytes::Bytes) -> Result<RecordBatch, CheckpointError> {
    let Weights { tensor, dtype, .. } = &*run.weights;
    let shape = Int64Array::from_iter_values(tensor.shape.iter().map(|dimension| *dimension as i64));
    let item = Arc::new(Field::new_list_field(DataType::Int64, true));
    let offsets = OffsetBuffer::from_lengths([bytes.len()]);
    let broken = |error: arrow_schema::ArrowError| CheckpointError::Ours(error.to_string());
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from(vec![tensor.name.as_str()])),
        Arc::new(LargeBinaryArray::try_new(offsets, Buffer::from(bytes), None).map_err(broken)?),
        Arc::new(StringArray::from(vec![*dtype])),
        Arc::new(
            ListArray::try_new(item, OffsetBuffer::from_lengths([shape.len()]), Arc::new(shape), None)
                .map_err(broken)?,
        ),
    ];
    RecordBatch::try_new(Arc::clone(schema), columns).map_err(broken)
}
