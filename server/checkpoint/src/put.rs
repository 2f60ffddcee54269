//! Layers that a stream brings, to a model's folder: its files are closed as they are full, and what makes it a model comes last.
//!
//! Nobody goes on with half of it: whoever sends the layers sends all of them again. So a [`Put`] that is dropped before it is a model takes back what there is.
//! Its steps may block; [`Filling`](crate::Filling) does them where that may be.

use std::{
    collections::{BTreeMap, HashSet},
    hash::{BuildHasher, RandomState},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use arrow_array::RecordBatch;
use quarrel_proto::{
    Reason, column,
    v1::{self, command::Verb},
};
use safetensors::Dtype;
use serde_json::{Map, Value, json};
use tokio::runtime::Handle;

use crate::{
    answers::{self, Asked},
    beside::Beside,
    checks::{as_json, refuse_for_models, refuse_transposed},
    config::{decided, index, quantized_config, text},
    error::CheckpointError,
    fate::{of_checkpoint, plan_of},
    form::Form,
    fused::Shared,
    layer::{Coming, module_of},
    model::{CONFIG, INDEX, REPORT},
    report::{By, LayerReport, Report, Totals},
    said::with_schemes,
    sink::Sink,
    site::{Record, STREAM, Site},
    storage::Location,
    target::{Held, Replace, Stop},
};

/// What is remembered of layers until the end: names, shapes and numbers.
const REMEMBERED_BYTES_MAX: usize = 256 << 20;
/// Of each, beside its names.
const LAYER_BYTES: usize = 4 << 10;
/// How often names are there, of what a layer becomes and its own: in entries, indices and reports.
const NAMES: usize = 40;
/// Of one layer while it comes.
const HELD_BYTES_MAX: usize = 64 << 20;

/// A model in the making. Dropped before it is finished, it leaves nothing.
#[derive(Debug)]
pub struct Put {
    site: Arc<Site>,
    writers: Arc<Writers>,
    /// Until it is a model, or is taken back; none after that.
    held: Option<Held>,
    /// What its layers are quantized with: of a stream, without URIs.
    pub command: v1::Command,
    shard_bytes_max: u64,
    began: Instant,
    /// None before the first layer.
    file: Option<Shard>,
    files: usize,
    /// The layer whose rows are coming.
    open: Option<Layer>,
    shared: Shared,
    remembered: usize,
    /// The names of all tensors that are stored.
    tensors: HashSet<String>,
    layers: Vec<LayerReport>,
    records: Vec<Record>,
    /// Names of files that were written beside those of the model.
    copied: Vec<String>,
}

/// Who writes files: one at a time, and nobody once the model is given up.
#[derive(Debug, Default)]
struct Writers(Mutex<bool>);

impl Writers {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A file that is being filled.
#[derive(Debug)]
struct Shard {
    name: String,
    sink: Sink,
    schemes: BTreeMap<String, String>,
}

/// A file that is full.
#[derive(Debug)]
pub(crate) struct Closed {
    shard: Shard,
    writers: Arc<Writers>,
}

/// A file that is written.
#[derive(Debug)]
pub(crate) struct Written(Record);

#[derive(Debug)]
struct Layer {
    name: String,
    dtype: Dtype,
    report: LayerReport,
    coming: Coming,
}

impl Put {
    /// Begins a model in a folder that is not there or is empty, or holds what another stream began. It may block.
    ///
    /// # Errors
    /// [`CheckpointError`] for a folder that holds something else, or a command that cannot be carried out.
    pub fn open(
        sink: &Location,
        command: v1::Quantize,
        shard_bytes_max: u64,
        replace: Replace,
        stop: &Arc<Stop>,
    ) -> Result<Put, CheckpointError> {
        if sink.shown().extension().is_some_and(|extension| extension == "safetensors" || extension == "gguf") {
            let detail = "a stream of layers becomes a model's folder: expected one".to_owned();
            return Err(CheckpointError::Uri { uri: sink.shown().display().to_string(), detail });
        }
        if command.on_error.as_deref().is_some_and(|word| word != "fail") {
            let message = "`on_error` can be `fail` alone where layers in columns become a model: the weights of one that \
                           failed are gone, and a model without it would be none";
            return Err(CheckpointError::Command { reason: Reason::OptionConflict, message: message.to_owned() });
        }
        let mut command = of_checkpoint(command, true);
        refuse_for_models(&plan_of(&command)?)?;
        let stream = format!("{:016x}", RandomState::new().hash_one(0u8));
        let job = json!({ "version": env!("CARGO_PKG_VERSION"), STREAM: stream, "command": as_json(&command)? });
        let site = Site::open(sink, job, replace, stop)?;
        command.return_kept = Some(true);
        let command = v1::Command { verb: Some(Verb::Quantize(command)), ..v1::Command::default() };
        Ok(Put {
            file: None,
            files: 0,
            site: Arc::new(site),
            writers: Arc::default(),
            held: Some(stop.hold()),
            command,
            shard_bytes_max,
            began: Instant::now(),
            open: None,
            shared: Shared::default(),
            remembered: 0,
            tensors: HashSet::new(),
            layers: Vec::new(),
            records: Vec::new(),
            copied: Vec::new(),
        })
    }

    /// Takes the next answers to the stream's rows; files that are full with them. It may block.
    ///
    /// # Errors
    /// [`CheckpointError`] for a layer that cannot be stored, and for a disk that cannot be written to.
    pub(crate) fn take(&mut self, batch: &RecordBatch) -> Result<Vec<Closed>, CheckpointError> {
        let mut closed = Vec::new();
        for row in 0..batch.num_rows() {
            let name = answers::text(batch, column::LAYER_NAME, row)?;
            let begins = self.open.as_ref().is_none_or(|open| open.name != name);
            if begins {
                closed.extend(self.finish_layer()?);
                self.begin_layer(batch, row, name.clone())?;
            }
            let asked = Asked { name, begins, completes: false, done: 0 };
            let answered = answers::one(batch, row, &mut [asked].into_iter())?;
            if let (Some(open), Some(file)) = (&mut self.open, &mut self.file) {
                open.coming.take(&mut file.sink, (&open.name, open.dtype), answered.outcome)?;
                if open.coming.held() > HELD_BYTES_MAX {
                    let message = format!(
                        "layer `{}` has more than {HELD_BYTES_MAX} zero points, which are packed together: use larger groups, or a \
                         symmetric scheme",
                        open.name
                    );
                    return Err(CheckpointError::Layer { reason: Reason::SpanTooLarge, message });
                }
                open.report.metrics = answered.metrics.or(open.report.metrics);
            }
        }
        Ok(closed)
    }

    fn begin_layer(&mut self, batch: &RecordBatch, row: usize, name: String) -> Result<(), CheckpointError> {
        self.remembered += LAYER_BYTES + NAMES * name.len();
        if self.remembered > REMEMBERED_BYTES_MAX {
            let message = format!(
                "layer `{name}` is the {}th: what is remembered of them takes more than {REMEMBERED_BYTES_MAX} bytes",
                self.layers.len() + 1
            );
            return Err(CheckpointError::Layer { reason: Reason::LayersExceeded, message });
        }
        if name == "__metadata__" {
            let message = format!("layer `{name}` cannot be stored: safetensors keeps that name for itself");
            return Err(CheckpointError::Layer { reason: Reason::NotAWeight, message });
        }
        let (dtype, report) = (answers::dtype(batch, row)?, LayerReport::of_row(batch, row)?);
        if self.file.is_none() {
            self.file = Some(self.next()?);
        }
        self.open = Some(Layer { name, dtype, report, coming: Coming::default() });
        Ok(())
    }

    fn closed(&self, shard: Shard) -> Closed {
        Closed { shard, writers: Arc::clone(&self.writers) }
    }

    /// The next file.
    fn next(&mut self) -> Result<Shard, CheckpointError> {
        self.files += 1;
        let name = format!("model-{:05}.safetensors", self.files);
        let sink = Sink::new(self.site.target(Path::new(&name))?)?;
        Ok(Shard { name, sink, schemes: BTreeMap::new() })
    }

    /// Puts the layer whose rows have all come into a file; the one before if it was full.
    fn finish_layer(&mut self) -> Result<Option<Closed>, CheckpointError> {
        let Some(Layer { name, dtype, mut report, mut coming }) = self.open.take() else { return Ok(None) };
        let shape = report.shape.clone();
        let is_quantized = coming.not.is_none();
        if is_quantized {
            let wrong =
                |reason, what: &str| Err(CheckpointError::Layer { reason, message: format!("layer `{name}` {what}") });
            if !name.ends_with(".weight") {
                let what = "would be quantized, but its name does not end in `.weight`, where loaders look for codes: \
                            name it so, or put it into `ignore`";
                return wrong(Reason::NotAWeight, what);
            }
            if shape.len() < 2 {
                let what = "would be quantized as one channel: give its `shape` of two dimensions or more, or put it into `ignore`";
                return wrong(Reason::RankUnsupported, what);
            }
            if let Some(scale) = coming.global_scale {
                self.shared.check(&name, scale)?;
            }
        }
        let would_be = |file: &Shard| file.sink.bytes() + coming.bytes();
        let is_full = |file: &&mut Shard| file.sink.bytes() > 0 && would_be(file) > self.shard_bytes_max;
        let mut closed = match self.file.as_mut().filter(is_full) {
            Some(_) => {
                let next = self.next()?;
                self.file.replace(next)
            }
            None => None,
        };
        let Some(file) = &mut self.file else { return Ok(None) };
        if let Some(full) = &mut closed {
            coming.hand_over(&mut full.sink, &mut file.sink)?;
        }
        match coming.not.take() {
            Some((status, reason, message)) => {
                (report.status, report.reason, report.message) = (status, Some(reason), Some(message));
                report.tensors = vec![report.name.clone()];
                let pieces = std::mem::take(&mut coming.pieces);
                file.sink.spooled((report.name.clone(), dtype.into(), shape), pieces).map_err(repeated(&report))?;
            }
            None => {
                let stored = coming.store(&mut file.sink, &report.name, (dtype, &shape));
                let (scheme, tensors) = stored.map_err(repeated(&report))?;
                file.schemes.insert(module_of(&report.name).to_owned(), scheme.clone());
                (report.scheme, report.tensors) = (Some(scheme), tensors);
            }
        }
        if let Some(name) = report.tensors.iter().find(|tensor| !self.tensors.insert((*tensor).clone())).cloned() {
            return Err(repeated(&report)(CheckpointError::Twice { name }));
        }
        self.layers.push(report);
        Ok(closed.map(|shard| self.closed(shard)))
    }

    /// The layer that came last.
    pub(crate) fn last_layer(&self) -> Option<&str> {
        self.open.as_ref().map(|layer| layer.name.as_str())
    }

    /// What became of the layers that are complete.
    pub(crate) fn layers(&self) -> &[LayerReport] {
        &self.layers
    }

    /// The stream has come to its end, after so many layers if it says so: the files that are left. It may block.
    ///
    /// # Errors
    /// [`CheckpointError::Command`] if not as many have come.
    pub(crate) fn end(&mut self, layers: Option<u64>) -> Result<Vec<Closed>, CheckpointError> {
        let mut closed = Vec::from_iter(self.finish_layer()?);
        let came = self.layers.len();
        let said = layers.unwrap_or(came as u64);
        if came as u64 != said || came == 0 {
            let message = format!("the end says {said} layers, and {came} came: expected as many, and one at least");
            return Err(CheckpointError::Command { reason: Reason::EndInvalid, message });
        }
        let last = self.file.take();
        closed.extend(last.map(|shard| self.closed(shard)));
        Ok(closed)
    }

    /// Remembers a file that is written.
    pub(crate) fn add(&mut self, written: Written) {
        self.records.push(written.0);
    }

    /// Makes a model of its files: the report, what it has `beside` them, the index, and last of all the configuration. It may block.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], of kind `Interrupted` if `stop` was first; [`CheckpointError`] for a configuration that no loader could use.
    pub(crate) fn finish(
        &mut self,
        source: String,
        Beside { config, others }: Beside,
        by: By,
        stop: &Stop,
    ) -> Result<Report, CheckpointError> {
        refuse_transposed(&config, self.site.path())?;
        let source_bytes = self.layers.iter().map(|layer| layer.bytes).sum();
        let bytes = self.records.iter().map(|record| record.bytes).sum();
        let totals = Totals::of(&self.layers, source_bytes, bytes);
        let destination = self.site.path().display().to_string();
        let layers = std::mem::take(&mut self.layers);
        let report = Report::of_stream((source, destination), &self.command, (totals, layers), by, self.began);
        report.write(&self.site.target(Path::new(REPORT))?)?;
        self.copied.push(REPORT.to_owned());
        for (name, from) in others {
            self.site.copy(&from, Path::new(&name), stop)?;
            self.copied.push(name);
        }
        self.site.are_as_written(&self.records)?;
        self.site.is_ours()?;
        if !stop.commit() {
            return Err(CheckpointError::stopped());
        }
        self.records.sort_by(|a, b| a.file.cmp(&b.file));
        self.site.put(Path::new(INDEX), &text(&index(&Map::new(), &self.records))?)?;
        let config = quantized_config(config, &decided(&report.layers)?);
        self.site.put(Path::new(CONFIG), &text(&Value::Object(config))?)?;
        self.site.done()?;
        self.held = None;
        Ok(report)
    }
}

impl Drop for Put {
    fn drop(&mut self) {
        let Some(held) = self.held.take() else { return };
        // What is open goes first.
        (self.file, self.open) = (None, None);
        let (site, writers) = (Arc::clone(&self.site), Arc::clone(&self.writers));
        let copied = std::mem::take(&mut self.copied);
        let take_back = move || {
            *writers.lock() = true;
            site.abandon(&copied);
            drop(held);
        };
        // It may block, and whoever drops it may not.
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(take_back)),
            Err(_) => take_back(),
        }
    }
}

/// The error of a layer that would be stored under a name that is there, whatever else is passed on.
fn repeated(layer: &LayerReport) -> impl Fn(CheckpointError) -> CheckpointError {
    move |error| match error {
        CheckpointError::Twice { name } => {
            let message = format!("layer `{}` would be stored as `{name}`, which is there already", layer.name);
            CheckpointError::Layer { reason: Reason::LayerRepeated, message }
        }
        other => other,
    }
}

impl Closed {
    /// Writes the file, which may take as long as a store likes. Stopped before its end, it leaves nothing behind.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub(crate) fn write(self, stop: &Stop) -> Result<Written, CheckpointError> {
        let given_up = self.writers.lock();
        if *given_up {
            return Err(CheckpointError::stopped());
        }
        let Shard { name, sink, schemes } = self.shard;
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let (tensors, target) = (sink.tensors(), sink.target().clone());
        let (bytes, _) = sink.seal(&Form::Safetensors(with_schemes(metadata, &schemes)), false, stop)?;
        // In a store another server may write to the same place.
        let stored = target.location().path().is_none().then(|| target.identity()).transpose()?;
        Ok(Written(Record { file: name, bytes, crc32c: 0, stored, tensors, layers: Vec::new() }))
    }
}
