//! `quarrel dequantize`: a quantized checkpoint to a dense one.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use quarrel_checkpoint::{Job, Status, Stop, Tensor, Told};
use serde::Serialize;

use crate::{
    args::{DequantizeArgs, word},
    failure::Failure,
    paths::{Ends, different},
    progress::Progress,
    quantize::finish,
    served::{Worker, blocking, replace},
    table::{clean, megabytes, place, print},
};

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Done {
    source: String,
    destination: String,
    server: Option<String>,
    seconds: f64,
    source_bytes: u64,
    destination_bytes: u64,
    /// The quantized layers: name to scheme.
    dequantized: BTreeMap<String, String>,
    /// Tensors that were copied.
    copied: usize,
}

pub(crate) async fn dequantize(args: Box<DequantizeArgs>, stop: Arc<Stop>) -> Result<(), Failure> {
    let started = Instant::now();
    let ends = Ends::of(&args.files).await?;
    different(&[&args.files.source, &args.files.destination], &ends.stores)?;
    let mut job = open(&args, &ends, &stop).await?;
    let (worker, _) = Worker::open(&args.place).await?;
    let mut progress = Progress::new(job.sent().map(Tensor::bytes).sum(), args.output);
    let made = job
        .run(&worker, &stop, |told| match told {
            Told::Layer { name, bytes, completes } => progress.at(name, bytes, completes),
            Told::Skipped(bytes) => progress.skip(bytes),
            Told::Writes => progress.say("writing the file"),
        })
        .await?;
    let coded = made.layers.iter().filter(|layer| layer.status == Status::Dequantized);
    let done = Done {
        source: args.files.source.display().to_string(),
        destination: args.files.destination.display().to_string(),
        server: args.place.server.clone(),
        seconds: started.elapsed().as_secs_f64(),
        source_bytes: job.model().stored_bytes(),
        destination_bytes: made.bytes,
        copied: made.layers.len() - coded.clone().count(),
        dequantized: coded.map(|layer| (layer.name.clone(), layer.scheme.clone().unwrap_or_default())).collect(),
    };
    finish(job, made, &progress, &stop).await?;
    drop(progress);
    tell(&done, &args)
}

async fn open(args: &DequantizeArgs, ends: &Ends, stop: &Arc<Stop>) -> Result<Job, Failure> {
    let (source, destination) = (ends.source.clone(), ends.destination.clone());
    let (dtype, replace, stop) = (args.dtype.map(word), replace(&args.files), stop.hold());
    blocking(move || Job::open_dense(&source, &destination, dtype, replace, &stop)).await
}

fn tell(done: &Done, args: &DequantizeArgs) -> Result<(), Failure> {
    if args.output.quiet {
        return Ok(());
    }
    if args.output.json {
        return print(&serde_json::to_string_pretty(done).map_err(|error| Failure::ours(error.to_string()))?);
    }
    if args.output.verbose {
        for (layer, scheme) in &done.dequantized {
            print(&format!("{}  {scheme}", clean(layer)))?;
        }
    }
    let place = place(done.server.as_deref());
    let (layers, copied) = (done.dequantized.len(), done.copied);
    let (before, after) = (megabytes(done.source_bytes), megabytes(done.destination_bytes));
    print(&format!("{layers} dequantized, {copied} copied; {before} -> {after} in {:.1} s {place}", done.seconds))?;
    print(&done.destination)
}
