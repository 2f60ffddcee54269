//! What one job does, to its end.

use std::sync::Arc;

use quarrel_checkpoint::{
    By, CheckpointError, Ends, Flow, FlowLimits, Gate, JOB_BYTES, Job, Local, Location, Replace, Report, Tensor,
    is_copy, is_gguf, of_checkpoint,
};
use quarrel_proto::{
    Reason, VERSION,
    v1::{self, command::Verb},
};
use tokio::{runtime::Handle, sync::OwnedSemaphorePermit};

use super::Entry;
use crate::{shared::Shared, status::Fault};

/// What a job is to do.
pub(super) struct Work {
    pub(super) shared: Arc<Shared>,
    pub(super) entry: Arc<Entry>,
    pub(super) request: v1::JobRequest,
    pub(super) ends: (Location, Location),
    /// What a GGUF file is to say.
    pub(super) metadata: Option<Location>,
}

impl Work {
    /// To its end, whatever that is.
    pub(super) async fn run(self, name: String, place: OwnedSemaphorePermit) {
        let entry = Arc::clone(&self.entry);
        // It reads and writes files: on a thread that may block.
        let runtime = Handle::current();
        let worked = tokio::task::spawn_blocking(move || runtime.block_on(self.until_cancelled()));
        let ended = worked.await.unwrap_or_else(|error| match error.try_into_panic() {
            Ok(panic) => {
                // The hook has logged it; a panic ends its job only.
                drop(panic);
                Err(Fault::ours())
            }
            Err(_) => Err(Fault::new(Reason::Stopping, "the server is stopping")),
        });
        entry.end(&ended);
        drop(place);
        let seconds = entry.began.elapsed().as_secs_f64();
        match &ended {
            Ok(_) => tracing::info!(job = name, seconds, "job done"),
            Err(_) if entry.stop.is_stopped() => tracing::info!(job = name, seconds, "job cancelled"),
            Err(fault) if fault.is_ours() => {
                tracing::error!(job = name, seconds, fault = ?fault.to_string(), "job failed")
            }
            Err(fault) => tracing::info!(job = name, seconds, fault = ?fault.to_string(), "job failed"),
        }
    }

    async fn until_cancelled(self) -> Result<v1::Summary, Fault> {
        let (stop, cancelled) = (Arc::clone(&self.entry.stop), self.entry.cancelled.clone());
        let done = tokio::select! {
            done = self.done() => done,
            () = cancelled.cancelled() => Err(CheckpointError::stopped()),
        };
        if stop.is_stopped() {
            // What is being written is taken back.
            stop.released().await;
        }
        Ok(done?)
    }

    /// Layers in columns, from a file or to one.
    async fn flow(self, command: v1::Quantize) -> Result<v1::Summary, CheckpointError> {
        let Work { shared, entry, request, ends: (source, sink), .. } = self;
        let asked = (request.replacing(), request.gate());
        let layers = shared.config.layer_limits();
        let limits = FlowLimits { layers, shard_bytes_max: shared.config.shard_bytes_max };
        let stop = Arc::clone(&entry.stop);
        let opening = move || Flow::open((&source, &sink), command, asked, limits, &stop);
        let opened = tokio::task::spawn_blocking(opening).await;
        let flow = opened.map_err(|error| CheckpointError::Ours(error.to_string()))??;
        entry.begins(flow.bytes(), Some(flow.command()));
        let local = Local::on(shared.pool.clone(), shared.level, shared.shelf.clone(), JOB_BYTES)
            .with_spans_of(layers.span_bytes_max);
        Ok(summary(&flow.run(&local, by(&shared), &entry.stop, |told| entry.told(told)).await?))
    }

    async fn done(self) -> Result<v1::Summary, CheckpointError> {
        if let Some(Verb::Quantize(command)) = self.request.command.as_ref().and_then(|command| command.verb.clone()) {
            let (source, sink) = self.ends.clone();
            let looked = tokio::task::spawn_blocking(move || Flow::is_for(&source, &sink)).await;
            if looked.map_err(|error| CheckpointError::Ours(error.to_string()))? {
                return self.flow(command).await;
            }
        }
        let Work { shared, entry, request, ends: (source, sink), metadata } = self;
        let (replace, gate) = (request.replacing(), request.gate());
        let stop = &entry.stop;
        // On a thread of its own: a store may be silent, and whoever cancels the job does not wait for it.
        let stopped = stop.hold();
        let opened = tokio::task::spawn_blocking(move || match request.command.and_then(|command| command.verb) {
            Some(Verb::Quantize(command)) => {
                let command = if is_gguf(&sink) || is_copy(&command) {
                    command
                } else {
                    of_checkpoint(command, source.is_folder()?)
                };
                let ends = Ends { source: &source, destination: &sink, metadata: metadata.as_ref() };
                Job::open(ends, command, (replace, gate), &stopped)
            }
            Some(Verb::Dequantize(command)) => Job::open_dense(&source, &sink, command.dtype, replace, &stopped),
            Some(Verb::Measure(_)) | None => Err(CheckpointError::Ours("a job of no verb".to_owned())),
        });
        let mut job = opened.await.map_err(|error| CheckpointError::Ours(error.to_string()))??;
        entry.begins(job.sent().map(Tensor::bytes).sum(), job.effective());
        let span_bytes_max = shared.config.layer_limits().span_bytes_max;
        let local =
            Local::on(shared.pool.clone(), shared.level, shared.shelf.clone(), JOB_BYTES).with_spans_of(span_bytes_max);
        let made = job.run(&local, stop, |told| entry.told(told)).await?;
        let report = Report::of(&job, &made, by(&shared), entry.began.elapsed().as_secs_f64());
        if let Some(target) = job.report()? {
            report.write(&target)?;
        }
        job.finish(&made, stop)?;
        Ok(summary(&report))
    }
}

/// What a request says beside its command.
trait Asked {
    fn replacing(&self) -> Replace;
    fn gate(&self) -> Gate;
}

impl Asked for v1::JobRequest {
    fn replacing(&self) -> Replace {
        if self.replace.unwrap_or_default() { Replace::AtTheEnd } else { Replace::Never }
    }

    fn gate(&self) -> Gate {
        Gate { sqnr_db_min: self.sqnr_db_min, cosine_min: self.cosine_min }
    }
}

/// Who does the work, for a report.
pub(crate) fn by(shared: &Shared) -> By {
    By { server: None, contract: VERSION.to_owned(), cpu_level: shared.level.name().to_owned() }
}

fn summary(report: &Report) -> v1::Summary {
    let totals = &report.totals;
    v1::Summary {
        rows: report.layers.len() as u64,
        layers_quantized: totals.quantized as u64,
        layers_kept: totals.kept as u64,
        layers_failed: totals.failed as u64,
        elements: totals.elements,
        bytes_in: totals.source_bytes,
        bytes_out: totals.destination_bytes,
        bits_per_weight: totals.bits_per_weight,
        worst_layer: totals.worst_layer.clone(),
        worst_sqnr_db: totals.worst_sqnr_db,
        total_seconds: report.seconds,
        ..v1::Summary::default()
    }
}
