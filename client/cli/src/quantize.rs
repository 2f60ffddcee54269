//! `quarrel quantize`: a checkpoint into another, row by row, and a report on every layer.
//!
//! What becomes of a checkpoint is the crate `checkpoint`'s business: its job asks for the layers of one file after the other, and `served` has them
//! quantized, in this process or by a server. What a recipe keeps never travels. Nothing has the destination's name before all of it is written.

use std::{sync::Arc, time::Instant};

use quarrel_checkpoint::{
    By, COPY, Ends as JobEnds, Flow, FlowLimits, Gate, Job, LayerReport, Limits, Made, Report, Status, Stop, Target,
    Tensor, Told, checkpoint_recipe, is_gguf,
};
use quarrel_client::proto::{
    VERSION,
    v1::{self, quantize::How},
};

use crate::{
    args::{QuantizeArgs, WhatArgs, word},
    failure::Failure,
    paths::{Ends, different},
    place::environment,
    progress::Progress,
    recipe::recipe,
    report,
    served::{Worker, blocking, here, replace},
    table,
};

pub(crate) async fn quantize(args: Box<QuantizeArgs>, stop: Arc<Stop>) -> Result<(), Failure> {
    let started = Instant::now();
    let ends = Ends::of(&args.files).await?;
    let (source, destination) = (ends.source.clone(), ends.destination.clone());
    if blocking(move || Ok(Flow::is_for(&source, &destination))).await? {
        return flow(args, ends, stop).await;
    }
    let what = if is_gguf(&ends.destination) { Becomes::Gguf } else { Becomes::of(ends.is_folder) };
    let command = command(&args.what, what)?;
    // Before any work: what cannot be written need not be computed.
    let report_path = report::path(&args, what == Becomes::Model);
    let recipe = args.what.how.recipe.as_deref();
    let paths = [Some(&*args.files.source), Some(&*args.files.destination), Some(&*report_path), recipe];
    different(&Vec::from_iter(paths.into_iter().flatten()), &ends.stores)?;
    let report_at = ends.stores.locate(&report_path)?;
    if args.report.is_some() {
        ends.apart_from(&report_at)?;
    }
    // Of a folder, opening the job begins to write.
    let is_early = args.report.is_some() && what == Becomes::Model;
    let report_target = || Target::new(&report_at, replace(&args.files));
    let early = is_early.then(report_target).transpose()?;
    let (worker, by) = Worker::open(&args.place).await?;
    let mut job = open(&args, &ends, command, &stop).await?;
    let report_target = match (early, job.report()?) {
        (Some(target), _) | (None, Some(target)) => target,
        (None, None) => report_target()?,
    };

    let mut progress = Progress::new(job.sent().map(Tensor::bytes).sum(), args.output);
    let made = job
        .run(&worker, &stop, |told| match told {
            Told::Layer { name, bytes, completes } => progress.at(name, bytes, completes),
            Told::Skipped(bytes) => progress.skip(bytes),
            Told::Writes => progress.say("writing the file"),
        })
        .await?;

    let report = Report::of(&job, &made, by, started.elapsed().as_secs_f64());
    report.write(&report_target)?;
    finish(job, made, &progress, &stop).await?;
    drop(progress);
    table::close(&report, &report_path, args.output)?;
    failed(&report.layers)
}

/// Layers in columns, from a file or to one.
async fn flow(args: Box<QuantizeArgs>, ends: Ends, stop: Arc<Stop>) -> Result<(), Failure> {
    if args.place.server.is_some() {
        let advice = "Leave out `--server`, or submit a job to the server, which reads and writes such files too.";
        return Err(Failure::usage("files of columns are quantized in this process".to_owned(), advice));
    }
    if args.metadata.is_some() {
        let sentence = "`--metadata` has no effect on layers in columns".to_owned();
        return Err(Failure::usage(sentence, "Leave it out: it is for a GGUF file made of what is none."));
    }
    let is_model = Flow::makes_model(&ends.destination);
    let command = command(&args.what, Becomes::of(is_model))?;
    let report_path = report::path(&args, is_model);
    let recipe = args.what.how.recipe.as_deref();
    let paths = [Some(&*args.files.source), Some(&*args.files.destination), Some(&*report_path), recipe];
    different(&Vec::from_iter(paths.into_iter().flatten()), &ends.stores)?;
    let report_at = ends.stores.locate(&report_path)?;
    // A model's own is written with it.
    let is_apart = !is_model || args.report.is_some();
    let report_target = is_apart.then(|| Target::new(&report_at, replace(&args.files))).transpose()?;
    let (local, level) = here(&args.place)?;
    let config = environment(&args.place)?;
    let limits = FlowLimits { layers: Limits::NONE, shard_bytes_max: config.shard_bytes_max };
    let (source, destination) = (ends.source.clone(), ends.destination.clone());
    let asked = (replace(&args.files), Gate { sqnr_db_min: args.sqnr_db_min, cosine_min: args.cosine_min });
    let stopped = Arc::clone(&stop);
    let flow = blocking(move || Flow::open((&source, &destination), command, asked, limits, &stopped)).await?;
    let mut progress = Progress::new(flow.bytes(), args.output);
    let by = By { server: None, contract: VERSION.to_owned(), cpu_level: level.name().to_owned() };
    let report = flow
        .run(&local, by, &stop, |told| match told {
            Told::Layer { name, bytes, completes } => progress.at(name, bytes, completes),
            Told::Skipped(bytes) => progress.skip(bytes),
            Told::Writes => progress.say("writing the file"),
        })
        .await?;
    if let Some(target) = report_target {
        report.write(&target)?;
    }
    drop(progress);
    table::close(&report, &report_path, args.output)?;
    failed(&report.layers)
}

/// Opens the job, which may read much of the model, on a thread that may block.
async fn open(args: &QuantizeArgs, ends: &Ends, command: v1::Quantize, stop: &Arc<Stop>) -> Result<Job, Failure> {
    let (source, destination) = (ends.source.clone(), ends.destination.clone());
    let metadata = args.metadata.as_ref().map(|path| ends.stores.locate(path)).transpose()?;
    let replace = replace(&args.files);
    let gate = Gate { sqnr_db_min: args.sqnr_db_min, cosine_min: args.cosine_min };
    let stop = stop.hold();
    let opening = move || {
        let ends = JobEnds { source: &source, destination: &destination, metadata: metadata.as_ref() };
        Job::open(ends, command, (replace, gate), &stop)
    };
    blocking(opening).await
}

pub(crate) async fn finish(job: Job, made: Made, progress: &Progress, stop: &Arc<Stop>) -> Result<(), Failure> {
    progress.say("completing the model");
    let stop = stop.hold();
    blocking(move || job.finish(&made, &stop)).await
}

fn failed(layers: &[LayerReport]) -> Result<(), Failure> {
    let failed = layers.iter().filter(|layer| layer.status == Status::Failed);
    match failed.clone().next() {
        Some(first) => Err(Failure::layers(failed.count(), first.message.as_deref().unwrap_or(&first.name))),
        None => Ok(()),
    }
}

/// What a checkpoint becomes, which says what a scheme stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Becomes {
    /// One file of tensors.
    File,
    /// A folder that loaders take for a model.
    Model,
    /// A GGUF file, where a scheme is what `llama-quantize` calls so.
    Gguf,
}

impl Becomes {
    pub(crate) fn of(is_model: bool) -> Becomes {
        if is_model { Becomes::Model } else { Becomes::File }
    }
}

/// What the command line asks of every layer.
pub(crate) fn command(args: &WhatArgs, what: Becomes) -> Result<v1::Quantize, Failure> {
    let how = match (&args.how.scheme, &args.how.recipe, &args.how.profile) {
        (Some(scheme), ..) if what == Becomes::Gguf || scheme == COPY => {
            if !args.ignore.is_empty() || args.no_standard {
                let sentence = "a scheme of a GGUF file, and `COPY`, say what becomes of every tensor: `--ignore` and `--no-standard` have no effect on it";
                return Err(Failure::usage(sentence.to_owned(), "Leave them out, or write a recipe."));
            }
            return Ok(v1::Quantize {
                how: Some(How::Scheme(scheme.clone())),
                group_size: args.group_size.map(Into::into),
                channel_dims: args.channel_dims.map(Into::into),
                on_indivisible: args.on_indivisible.map(word),
                arith: Some(word(args.arith)),
                on_error: Some(word(args.on_error)),
                ..Default::default()
            });
        }
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
            How::Recipe(checkpoint_recipe(rule, ignore.collect(), what == Becomes::Model))
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
