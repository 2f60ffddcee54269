//! What a job asks for, from a server: the same verbs that any client has.

use std::{
    collections::HashMap,
    io,
    num::NonZeroU64,
    sync::{Arc, Mutex, PoisonError},
};

use futures::{
    StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use quarrel_checkpoint::{
    By, CheckpointError, Coded, JOB_BYTES, Level, Local, Metrics, Nested, Outcome, Quantizer, Replace, Row, Status,
    Values, Weights,
};
use quarrel_client::{
    Client, CodedLayer, DecodedRun, Error, Layer, Run,
    proto::{Reason, VERSION, v1},
};

use crate::{
    args::{FileArgs, PlaceArgs},
    failure::Failure,
    place::{environment, server},
};

/// What is done with a destination that is there.
pub(crate) fn replace(files: &FileArgs) -> Replace {
    if files.force { Replace::AtTheEnd } else { Replace::Never }
}

/// Does what may block, on a thread that may.
pub(crate) async fn blocking<T: Send + 'static>(
    what: impl FnOnce() -> Result<T, CheckpointError> + Send + 'static,
) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(what).await;
    Ok(done.map_err(|error| Failure::ours(error.to_string()))??)
}

/// What quantizes for a job.
pub(crate) enum Worker {
    /// Threads of this process.
    Here(Local),
    /// A server.
    There(Served),
}

impl Worker {
    /// This process or a server, as the command line says.
    pub(crate) async fn open(args: &PlaceArgs) -> Result<(Worker, By), Failure> {
        if let Some(client) = server(args).await? {
            let info = client.info();
            let (contract, cpu_level) = (info.contract.clone(), info.cpu_level.clone());
            return Ok((Worker::There(Served(client)), By { server: args.server.clone(), contract, cpu_level }));
        }
        let (local, level) = here(args)?;
        let (contract, cpu_level) = (VERSION.to_owned(), level.name().to_owned());
        Ok((Worker::Here(local), By { server: None, contract, cpu_level }))
    }
}

/// Threads of this process, as the environment and the command line say.
pub(crate) fn here(args: &PlaceArgs) -> Result<(Local, Level), Failure> {
    let config = environment(args)?;
    let level = config.cpu_level.unwrap_or_else(Level::detect);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok((Local::new(config.threads.map_or(cores, usize::from), level, JOB_BYTES)?, level))
}

impl Quantizer for Worker {
    type Error = Failure;

    fn quantize(&self, command: v1::Quantize, layers: Vec<Weights>) -> BoxStream<'static, Result<Row, Failure>> {
        match self {
            Worker::Here(local) => local.quantize(command, layers).map_err(Failure::from).boxed(),
            Worker::There(served) => served.quantize(command, layers),
        }
    }

    fn dequantize(&self, dtype: String, layers: Vec<Coded>) -> BoxStream<'static, Result<Values, Failure>> {
        match self {
            Worker::Here(local) => local.dequantize(dtype, layers).map_err(Failure::from).boxed(),
            Worker::There(served) => served.dequantize(dtype, layers),
        }
    }
}

/// A server, as a job's quantizer.
pub(crate) struct Served(Client);

impl Quantizer for Served {
    type Error = Failure;

    fn quantize(&self, command: v1::Quantize, layers: Vec<Weights>) -> BoxStream<'static, Result<Row, Failure>> {
        let unread = Unread::default();
        let layers = Result::<Vec<_>, _>::from_iter(layers.into_iter().map(|weights| layer(weights, unread.clone())));
        match layers {
            Ok(layers) => {
                self.0.quantize(command, layers).map_ok(row).map_err(move |error| unread.failure(error)).boxed()
            }
            Err(failure) => stream::iter([Err(failure)]).boxed(),
        }
    }

    fn dequantize(&self, dtype: String, layers: Vec<Coded>) -> BoxStream<'static, Result<Values, Failure>> {
        let sizes = layers.iter().map(|layer| (layer.module.name.clone(), layer.module.codes.bytes()));
        let sizes = HashMap::<String, u64>::from_iter(sizes);
        // Scales are read when a layer's turn comes.
        let unread = Unread::default();
        let kept = unread.clone();
        let layers = layers.into_iter().map(move |layer| coded(&layer, &kept));
        let runs = self.0.dequantize(v1::Dequantize { dtype: Some(dtype) }, layers);
        let failure = move |error: Error| match error.reason() {
            // Nobody wrote these rows: they are a file's.
            Some(Reason::RowInconsistent) => {
                CheckpointError::Layer { reason: Reason::SourceMalformed, message: error.to_string() }.into()
            }
            _ => unread.failure(error),
        };
        runs.map_ok(move |run| values(run, &sizes)).map_err(failure).boxed()
    }
}

/// What a client could not read of a file, whose words say more than the client's.
#[derive(Clone, Default)]
struct Unread(Arc<Mutex<Option<CheckpointError>>>);

impl Unread {
    /// Keeps the first of them.
    fn keep(&self, error: CheckpointError) -> io::Error {
        let told = io::Error::other(error.to_string());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        told
    }

    fn failure(&self, error: Error) -> Failure {
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        match &error {
            Error::Source { .. } => kept().map_or_else(|| error.into(), Failure::from),
            _ => error.into(),
        }
    }
}

fn layer(Weights { source, tensor, dtype }: Weights, unread: Unread) -> Result<Layer, Failure> {
    let dtype = dtype.parse().map_err(|_| Failure::ours(format!("`{dtype}` came from the plan")))?;
    let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
    let read = move |range| source.read_of(&tensor.name, &tensor, range).map_err(|error| unread.keep(error));
    Ok(Layer::lazy(&*name, dtype, &shape, read))
}

fn row(run: Run) -> Row {
    let bytes = run.layer.shape().iter().product::<u64>() * run.layer.dtype().bytes();
    let not = |status, reason, message| Outcome::Not { status, reason, message, weights: None };
    Row {
        name: run.layer.name().to_owned(),
        begins: run.channels.start == 0,
        completes: run.is_last,
        done: if run.is_last { bytes } else { bytes / run.channels_total * run.channels.end },
        outcome: match run.outcome {
            quarrel_client::Outcome::Quantized(codes) => Outcome::Quantized {
                data: codes.data,
                scales: codes.scales,
                zero_points: codes.zero_points,
                global_scale: codes.global_scale,
                nested: codes.nested.map(nested),
                scheme: codes.scheme,
            },
            quarrel_client::Outcome::Kept { reason, message, .. } => not(Status::Kept, reason, message),
            quarrel_client::Outcome::Failed { reason, message } => not(Status::Failed, reason, message),
        },
        metrics: run.layer_metrics.map(|found| Metrics {
            elements: found.elements,
            mse: found.mse,
            sqnr_db: found.sqnr_db,
            cosine: found.cosine,
            max_abs_error: found.max_abs_error,
            amax: found.amax,
            saturated: found.saturated,
            bits_per_weight: found.bits_per_weight,
        }),
    }
}

fn nested(scales: quarrel_client::Nested) -> Nested {
    let nested_absmax = scales.nested_absmax.iter().flat_map(|distance| distance.to_le_bytes()).collect();
    Nested { absmax: scales.absmax, nested_absmax, offset: scales.offset }
}

/// A layer to be sent: its codes are read run by run.
fn coded(Coded { source, module }: &Coded, unread: &Unread) -> Result<CodedLayer, Error> {
    let broken = |detail: String| Error::Source { layer: module.name.clone(), detail };
    let unreadable = |error| broken(unread.keep(error).to_string());
    let scales = module.scales(source).map_err(unreadable)?;
    let points = module.zero_points(source).map_err(unreadable)?;
    let global = module.global_scale(source).map_err(unreadable)?;
    let span = NonZeroU64::new(module.span_channels()).unwrap_or(NonZeroU64::MIN);
    let dtype = module.dtype_word().parse().map_err(|_| broken("its type is none of the wire".to_owned()))?;
    let (file, module_name, codes, kept) = (source.clone(), module.name.clone(), module.codes.clone(), unread.clone());
    let read = move |range| file.read_of(&module_name, &codes, range).map_err(|error| kept.keep(error));
    let scheme = module.scheme.to_string();
    CodedLayer::new(&*module.name, dtype, &module.shape, scheme, module.channels(), span, scales, points, read)
        .map(|layer| layer.with_global_scale(global))
}

fn values(run: DecodedRun, sizes: &HashMap<String, u64>) -> Values {
    let module = run.name.to_string();
    let (size, total) = (sizes.get(&module).copied().unwrap_or(0), run.shape.iter().product::<u64>());
    let done = (size as f64 * run.elements.end as f64 / total as f64) as u64;
    Values {
        module,
        begins: run.elements.start == 0,
        completes: run.is_last,
        done: if run.is_last { size } else { done },
        data: run.data,
    }
}
