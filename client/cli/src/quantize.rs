//! `quarrel quantize`: a checkpoint through a server and into a file, run by run.
//!
//! Bytes are read when a run's turn comes and written when its answer is there, so memory does not grow with the file.
//! What a recipe keeps never travels. Nothing has the destination's name before all of it is written.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Instant,
};

use futures::TryStreamExt;
use quarrel_checkpoint::{
    Fate, Pieces, Scheme, Sink, Source, Stop, Tensor, checkpoint_recipe, fates, known_schemes, stored, with_schemes,
    with_shared_scales,
};
use quarrel_client::{
    Layer, Outcome, Run,
    proto::v1::{self, quantize::How},
};

use crate::{
    args::{QuantizeArgs, word},
    failure::Failure,
    place::{Place, Room},
    progress::Progress,
    recipe::recipe,
    report::{self, LayerReport, Report, Totals},
    seal::{different, seal, target},
    table,
};

pub(crate) async fn quantize(args: Box<QuantizeArgs>, stop: Arc<Stop>) -> Result<(), Failure> {
    let started = Instant::now();
    let command = command(&args)?;
    // Before any work: what cannot be written need not be computed.
    let report_path = report::path(&args);
    let recipe = args.how.recipe.as_deref();
    let paths = [Some(&*args.files.source), Some(&*args.files.destination), Some(&*report_path), recipe];
    different(&Vec::from_iter(paths.into_iter().flatten()))?;
    let source = Source::open(&args.files.source)?;
    let command = shared(source.clone(), command, Arc::clone(&stop)).await?;
    let fates = fates(&source, &command)?;
    let sink = Sink::new(target(&args.files, &args.files.destination)?)?;
    let report_target = target(&args.files, &report_path)?;
    let mut writing = Writing::new(sink, source.clone(), known_schemes(&source)?);

    let largest = source.tensors().iter().zip(&fates).filter(|(_, fate)| matches!(fate, Fate::Sent(_)));
    let room = Room::for_weights(largest.map(|(tensor, _)| (tensor.bytes(), tensor.shape.as_slice())));
    let place = Place::open(&args.place, args.output, room).await?;
    let mut layers = Vec::new();
    for (at, (tensor, fate)) in source.tensors().iter().zip(fates).enumerate() {
        match fate {
            Fate::Sent(dtype) => {
                layers.push(layer(&source, tensor, dtype)?);
                writing.waits(at);
            }
            Fate::Copied { reason, message } => writing.copy(at, "kept", reason.word().to_owned(), message)?,
        }
    }
    let mut progress = Progress::new(layers.iter().map(bytes).sum(), args.output);
    let mut runs = place.client.quantize(command, layers);
    while let Some(run) = runs.try_next().await? {
        let (name, is_last) = (run.layer.name().to_owned(), run.is_last);
        let done = if is_last { bytes(&run.layer) } else { bytes(&run.layer) / run.channels_total * run.channels.end };
        writing.take(run)?;
        progress.at(&name, done, is_last);
    }
    let effective = runs.effective_command().map(str::to_owned);
    let (layers, destination_bytes) = writing.seal(&progress, &stop).await?;
    drop(progress);

    let mut totals = Totals::of(&layers);
    totals.source_bytes = source.bytes();
    totals.destination_bytes = destination_bytes;
    let report = Report {
        source: args.files.source.display().to_string(),
        destination: args.files.destination.display().to_string(),
        server: args.place.server.clone().filter(|_| !place.is_here()),
        quarrel: env!("CARGO_PKG_VERSION"),
        contract: place.client.info().contract.clone(),
        cpu_level: place.client.info().cpu_level.clone(),
        command: effective.and_then(|command| serde_json::from_str(&command).ok()),
        seconds: started.elapsed().as_secs_f64(),
        totals,
        layers,
    };
    report::write(&report, &report_target)?;
    table::close(&report, &report_path, args.output)?;
    let failed = report.layers.iter().filter(|layer| layer.status == "failed");
    match failed.clone().next() {
        Some(first) => Err(Failure::layers(failed.count(), first.message.as_deref().unwrap_or(&first.name))),
        None => Ok(()),
    }
}

/// [`with_shared_scales`], which reads much of the file, on a thread that may block.
async fn shared(source: Source, command: v1::Quantize, stop: Arc<Stop>) -> Result<v1::Quantize, Failure> {
    let found = tokio::task::spawn_blocking(move || with_shared_scales(&source, command, &stop)).await;
    Ok(found.map_err(|error| Failure::ours(error.to_string()))??)
}

/// What the command line asks of every layer.
fn command(args: &QuantizeArgs) -> Result<v1::Quantize, Failure> {
    let how = match (&args.how.scheme, &args.how.recipe, &args.how.profile) {
        (Some(scheme), ..) => {
            let rule = v1::Rule {
                scheme: scheme.clone(),
                group_size: args.group_size.map(Into::into),
                channel_dims: args.channel_dims.map(Into::into),
                on_indivisible: args.on_indivisible.map(word),
                ..Default::default()
            };
            let standard = (!args.no_standard).then(|| "@standard".to_owned());
            let ignore = standard.into_iter().chain(args.ignore.iter().cloned());
            How::Recipe(checkpoint_recipe(rule, ignore.collect()))
        }
        (_, Some(path), _) => How::Recipe(recipe(path)?),
        (.., Some(profile)) => How::Profile(profile.clone()),
        (None, None, None) => return Err(Failure::ours("no scheme, recipe or profile came from the command line")),
    };
    Ok(v1::Quantize {
        how: Some(how),
        arith: Some(word(args.arith)),
        on_error: Some(word(args.on_error)),
        ..Default::default()
    })
}

fn layer(source: &Source, tensor: &Tensor, dtype: &str) -> Result<Layer, Failure> {
    let dtype = dtype.parse().map_err(|_| Failure::ours(format!("`{dtype}` came from the plan")))?;
    let (file, what) = (source.clone(), tensor.clone());
    Ok(Layer::lazy(&*tensor.name, dtype, &tensor.shape, move |range| file.read(&what, range)))
}

fn bytes(layer: &Layer) -> u64 {
    layer.shape().iter().product::<u64>() * layer.dtype().bytes()
}

/// The destination, and what has come for it so far.
struct Writing {
    sink: Sink,
    source: Source,
    /// By name, where in the source the layer is.
    places: HashMap<String, usize>,
    open: HashMap<String, Open>,
    reports: BTreeMap<usize, LayerReport>,
    /// Of modules, by name: those that were quantized before, and now.
    schemes: BTreeMap<String, String>,
}

/// A layer whose runs are coming.
#[derive(Default)]
struct Open {
    pieces: Pieces,
    scales: Vec<f32>,
    zero_points: Option<Vec<i32>>,
    global_scale: Option<f32>,
    scheme: Option<String>,
    /// Why it is not quantized, if a run says so.
    not: Option<(&'static str, String, String)>,
}

impl Writing {
    fn new(sink: Sink, source: Source, schemes: BTreeMap<String, String>) -> Writing {
        Writing { sink, source, places: HashMap::new(), open: HashMap::new(), reports: BTreeMap::new(), schemes }
    }

    /// The tensor at that place is sent, and answered later.
    fn waits(&mut self, at: usize) {
        self.places.insert(self.source.tensors()[at].name.clone(), at);
    }

    /// The tensor at that place stays as it is.
    fn copy(&mut self, at: usize, status: &'static str, reason: String, message: String) -> Result<(), Failure> {
        let tensor = &self.source.tensors()[at];
        self.sink.copied(&self.source, tensor)?;
        self.reports.insert(
            at,
            LayerReport {
                name: tensor.name.clone(),
                status,
                reason: Some(reason),
                message: Some(message),
                dtype: format!("{:?}", tensor.dtype),
                shape: tensor.shape.clone(),
                scheme: None,
                metrics: None,
                tensors: vec![tensor.name.clone()],
                bytes: tensor.bytes(),
            },
        );
        Ok(())
    }

    fn take(&mut self, run: Run) -> Result<(), Failure> {
        let open = self.open.entry(run.layer.name().to_owned()).or_default();
        if run.channels.start == 0 {
            // The first, or the first again because its stream broke.
            *open = Open::default();
        }
        match run.outcome {
            Outcome::Quantized(codes) => {
                self.sink.spool(&mut open.pieces, &codes.data)?;
                open.scales.extend(codes.scales);
                match (&mut open.zero_points, codes.zero_points) {
                    (Some(points), Some(more)) => points.extend(more),
                    (points, more) => *points = more,
                }
                open.global_scale = open.global_scale.or(codes.global_scale);
                open.scheme = Some(codes.scheme);
            }
            Outcome::Kept { reason, message, .. } => open.not = Some(("kept", reason, message)),
            Outcome::Failed { reason, message } => open.not = Some(("failed", reason, message)),
        }
        if run.is_last {
            self.finish(run.layer.name(), run.layer_metrics)?;
        }
        Ok(())
    }

    fn finish(&mut self, name: &str, metrics: Option<quarrel_client::Metrics>) -> Result<(), Failure> {
        let unasked = || Failure::ours(format!("layer `{name}` was answered and not sent"));
        let at = self.places.remove(name).ok_or_else(unasked)?;
        let open = self.open.remove(name).ok_or_else(unasked)?;
        if let Some((status, reason, message)) = open.not {
            return self.copy(at, status, reason, message);
        }
        let text = open.scheme.unwrap_or_default();
        let scheme: Scheme = text.parse().map_err(|error| Failure::ours(format!("layer `{name}`: {error}")))?;
        let tensor = &self.source.tensors()[at];
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let (points, global) = (open.zero_points.as_deref(), open.global_scale);
        let stored = stored(module, &scheme, (tensor.dtype, &tensor.shape), &open.scales, points, global);
        let mut tensors = vec![stored.codes.0.clone()];
        self.sink.spooled(stored.codes, open.pieces)?;
        for (name, dtype, shape, bytes) in stored.beside {
            tensors.push(name.clone());
            self.sink.here(name, dtype, shape, &bytes)?;
        }
        self.schemes.insert(module.to_owned(), text.clone());
        self.reports.insert(
            at,
            LayerReport {
                name: name.to_owned(),
                status: "quantized",
                reason: None,
                message: None,
                dtype: format!("{:?}", tensor.dtype),
                shape: tensor.shape.clone(),
                scheme: Some(text),
                metrics: metrics.map(Into::into),
                tensors,
                bytes: tensor.bytes(),
            },
        );
        Ok(())
    }

    /// Writes the file, on a thread that may block: what became of each tensor, and the file's bytes.
    async fn seal(self, progress: &Progress, stop: &Arc<Stop>) -> Result<(Vec<LayerReport>, u64), Failure> {
        let Writing { sink, source, places, reports, schemes, .. } = self;
        if let Some(name) = places.keys().next() {
            return Err(Failure::ours(format!("layer `{name}` was sent and not answered")));
        }
        let mut metadata = with_schemes(&source, &schemes);
        metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
        let bytes = seal(sink, metadata, progress, stop).await?;
        Ok((reports.into_values().collect(), bytes))
    }
}
