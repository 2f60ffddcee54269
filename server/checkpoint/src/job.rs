//! A job: a model in, a quantized one out, file by file.
//!
//! A unit is one file of the source, which becomes one of the destination under the same name; a tensor is never split over units. A
//! folder's job goes on where another was stopped, and what makes the folder a model, index and `config.json`, is written last.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::UNIX_EPOCH,
};

use futures::stream::BoxStream;
use quarrel_engine::Plan;
use quarrel_proto::{
    command,
    v1::{self, command::Verb},
};
use serde_json::{Map, Value, json};
use tokio::task::JoinHandle;

use crate::{
    config::{Decided, quantized_config},
    error::CheckpointError,
    fate::{Fate, fates},
    fused::with_shared_scales,
    make::{dense, quantized},
    model::Model,
    modules::{Module, modules},
    report::{Gate, LayerReport},
    site::{Record, Site, checksum},
    source::{Source, Tensor},
    target::{Replace, Stop, Target},
    unit::{Row, Sealed, Unit, Values},
};

/// What quantizes the layers of a job: a server, here or elsewhere.
pub trait Quantizer {
    /// What can go wrong there, or here.
    type Error: From<CheckpointError>;

    /// Rows of the layers' answers: of each layer in order, and layer after layer however it likes.
    fn quantize(&self, command: v1::Quantize, layers: Vec<Weights>) -> BoxStream<'static, Result<Row, Self::Error>>;

    /// Values of the layers, likewise, all of one type: a word of the wire.
    fn dequantize(&self, dtype: String, layers: Vec<Coded>) -> BoxStream<'static, Result<Values, Self::Error>>;
}

/// A layer to quantize: a tensor of a file.
#[derive(Debug, Clone)]
pub struct Weights {
    /// The file.
    pub source: Source,
    /// The tensor.
    pub tensor: Tensor,
    /// Its element type, in the wire's word.
    pub dtype: &'static str,
}

/// A layer to dequantize: a module of a file.
#[derive(Debug, Clone)]
pub struct Coded {
    /// The file.
    pub source: Source,
    /// The module.
    pub module: Module,
}

/// A job that is ready to run.
#[derive(Debug)]
pub struct Job {
    model: Model,
    work: Work,
    destination: Destination,
    gate: Gate,
}

/// What is done with each file.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one")]
enum Work {
    Quantize {
        command: v1::Quantize,
        effective: v1::Command,
        fates: Vec<Vec<Fate>>,
    },
    /// To one type, or to the one that each layer's weights had.
    Dequantize {
        dtype: Option<String>,
        modules: Vec<Vec<Module>>,
    },
}

#[derive(Debug)]
enum Destination {
    File(Target),
    Folder(Site),
}

/// How far a job is.
#[derive(Debug, Clone, Copy)]
pub enum Told<'a> {
    /// So many bytes of a layer are done.
    Layer {
        /// Its name.
        name: &'a str,
        /// Of the source.
        bytes: u64,
        /// Whether that is all of them.
        completes: bool,
    },
    /// A unit that was complete before: so many bytes need not be done.
    Skipped(u64),
    /// A file is being written.
    Writes,
}

/// What a job has made.
#[derive(Debug)]
pub struct Made {
    /// What became of every tensor, in the order of the source.
    pub layers: Vec<LayerReport>,
    /// Of the files of tensors.
    pub bytes: u64,
    /// How many units an earlier run had made.
    pub units_before: usize,
    pub(crate) records: Vec<Record>,
}

impl Made {
    fn add(&mut self, record: Record) {
        self.bytes += record.bytes;
        self.layers.extend(record.layers.iter().cloned());
        self.records.push(record);
    }
}

impl Job {
    /// Looks at everything before any work is done: source, destination and command fit together. It reads much of the source
    /// where fused layers must share a scale.
    ///
    /// # Errors
    /// [`CheckpointError`] of any kind.
    pub fn open(
        source: &Path,
        destination: &Path,
        command: v1::Quantize,
        (replace, gate): (Replace, Gate),
        stop: &Stop,
    ) -> Result<Job, CheckpointError> {
        let model = Model::open(source)?;
        // What is wrong with it is said before anything is written.
        fates(model.shards(), &command)?;
        let (destination, command) = match model.folder() {
            None => {
                let target = Target::new(destination, replace)?;
                (Destination::File(target), with_shared_scales(model.shards(), command, stop)?)
            }
            Some(_) => {
                stop.keep();
                let site = Site::open(destination, &identity(&model, as_json(&command)?)?, replace)?;
                let facts = site.facts::<Facts>()?.and_then(|Facts { command }| read_back(&command));
                let command = match facts {
                    Some(command) => command,
                    None => {
                        let command = with_shared_scales(model.shards(), command, stop)?;
                        site.remember_facts(&Facts { command: as_json(&command)? })?;
                        command
                    }
                };
                (Destination::Folder(site), command)
            }
        };
        let fates = fates(model.shards(), &command)?;
        let verb = Verb::Quantize(command.clone());
        let plan = Plan::new(&v1::Command { verb: Some(verb), ..Default::default() })
            .map_err(|error| CheckpointError::Command { reason: error.reason(), message: error.to_string() })?;
        Ok(Job { model, work: Work::Quantize { command, effective: plan.effective, fates }, destination, gate })
    }

    /// The same for a job that makes dense layers of quantized ones, of type `dtype` or of their own.
    ///
    /// # Errors
    /// [`CheckpointError`] of any kind.
    pub fn open_dense(
        source: &Path,
        destination: &Path,
        dtype: Option<String>,
        replace: Replace,
        stop: &Stop,
    ) -> Result<Job, CheckpointError> {
        let model = Model::open(source)?;
        let modules = Result::<Vec<_>, _>::from_iter(model.shards().iter().map(modules))?;
        if modules.iter().all(Vec::is_empty) {
            return Err(CheckpointError::NothingQuantized { path: source.to_owned() });
        }
        let destination = match model.folder() {
            None => Destination::File(Target::new(destination, replace)?),
            Some(_) => {
                stop.keep();
                let identity = identity(&model, json!({ "dequantize": { "dtype": dtype } }))?;
                Destination::Folder(Site::open(destination, &identity, replace)?)
            }
        };
        Ok(Job { model, work: Work::Dequantize { dtype, modules }, destination, gate: Gate::default() })
    }

    /// The source.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The command with all that it leaves open, if it quantizes.
    pub fn effective(&self) -> Option<&v1::Command> {
        match &self.work {
            Work::Quantize { effective, .. } => Some(effective),
            Work::Dequantize { .. } => None,
        }
    }

    /// Whether an earlier run has made a part of it.
    pub fn goes_on(&self) -> bool {
        matches!(&self.destination, Destination::Folder(site) if site.goes_on())
    }

    /// Whether a later run could go on with it.
    fn is_recorded(&self) -> bool {
        matches!(self.destination, Destination::Folder(_))
    }

    /// The tensors that travel: weights of layers that are quantized, codes of those that are dequantized.
    pub fn sent(&self) -> impl Iterator<Item = &Tensor> {
        (0..self.model.shards().len()).flat_map(|at| self.sent_of(at))
    }

    /// Those of one file.
    fn sent_of(&self, at: usize) -> Vec<&Tensor> {
        match &self.work {
            Work::Quantize { fates, .. } => {
                let tensors = self.model.shards()[at].tensors().iter().zip(&fates[at]);
                tensors.filter(|(_, fate)| matches!(fate, Fate::Sent(_))).map(|(tensor, _)| tensor).collect()
            }
            Work::Dequantize { modules, .. } => modules[at].iter().map(|module| &module.codes).collect(),
        }
    }

    /// Makes every unit that is not made yet.
    ///
    /// # Errors
    /// [`CheckpointError`], as its own or as the quantizer's.
    pub async fn run<Q: Quantizer>(
        &mut self,
        quantizer: &Q,
        stop: &Arc<Stop>,
        mut tell: impl FnMut(Told<'_>),
    ) -> Result<Made, Q::Error> {
        let mut made = Made { layers: Vec::new(), bytes: 0, units_before: 0, records: Vec::new() };
        // A file is written while the next one is computed.
        let mut writing: Option<JoinHandle<Result<Record, CheckpointError>>> = None;
        for (at, shard) in self.model.shards().to_vec().iter().enumerate() {
            let file = name(shard.path());
            let before = match &self.destination {
                Destination::Folder(site) => site.record(&file).cloned(),
                Destination::File(_) => None,
            };
            if let Some(record) = before {
                made.units_before += 1;
                tell(Told::Skipped(self.sent_of(at).into_iter().map(Tensor::bytes).sum()));
                self.written(writing.take(), &mut made).await?;
                made.add(record);
                continue;
            }
            let target = match &self.destination {
                Destination::Folder(site) => site.target(Path::new(&file))?,
                Destination::File(target) => target.clone(),
            };
            let path = target.path().to_owned();
            let unit = match &self.work {
                Work::Quantize { command, fates, .. } => {
                    quantized(quantizer, command, (shard, &fates[at]), target, &mut tell).await?
                }
                Work::Dequantize { dtype, modules } => {
                    dense(quantizer, dtype.as_deref(), (shard, &modules[at]), target, &mut tell).await?
                }
            };
            if !self.is_recorded() {
                pass(self.gate, &unit.layers())?;
            }
            self.written(writing.take(), &mut made).await?;
            tell(Told::Writes);
            writing = Some(seal(unit, file, path, self.is_recorded(), stop));
        }
        self.written(writing, &mut made).await?;
        pass(self.gate, &made.layers)?;
        Ok(made)
    }

    /// Waits until a file is written, and remembers it.
    async fn written(
        &mut self,
        writing: Option<JoinHandle<Result<Record, CheckpointError>>>,
        made: &mut Made,
    ) -> Result<(), CheckpointError> {
        let Some(writing) = writing else { return Ok(()) };
        let record = writing.await.map_err(|error| CheckpointError::Ours(error.to_string()))??;
        if let Destination::Folder(site) = &mut self.destination {
            site.complete_unit(record.clone())?;
        }
        made.add(record);
        Ok(())
    }

    /// Makes a model of the files: what else it has, and last of all its configuration.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], of kind `Interrupted` if `stop` was first.
    pub fn finish(self, made: &Made, stop: &Stop) -> Result<(), CheckpointError> {
        let (Destination::Folder(site), Some(folder)) = (self.destination, self.model.folder()) else { return Ok(()) };
        for other in &folder.others {
            site.copy(&self.model.path().join(other), other)?;
        }
        if !stop.commit() {
            let error = std::io::ErrorKind::Interrupted.into();
            return Err(CheckpointError::Io { what: "cannot write", path: self.model.path().to_owned(), error });
        }
        if let Some((name, metadata)) = &folder.index {
            site.put(Path::new(name), &text(&index(metadata, &made.records))?)?;
        }
        if let Some(config) = &folder.config {
            let mut config = config.clone();
            match self.work {
                Work::Quantize { .. } => config = quantized_config(config, &decided(&made.layers)?),
                Work::Dequantize { .. } => drop(config.remove("quantization_config")),
            }
            site.put(Path::new("config.json"), &text(&Value::Object(config))?)?;
        }
        site.done()
    }
}

/// Facts over a whole model, found once: the command with what fused layers share.
#[derive(serde::Serialize, serde::Deserialize)]
struct Facts {
    command: Value,
}

/// What tells a job from another: its source and its command.
fn identity(model: &Model, command: Value) -> Result<Value, CheckpointError> {
    let mut files = Map::new();
    for shard in model.shards() {
        let found = std::fs::metadata(shard.path()).map_err(CheckpointError::io("cannot read", shard.path()))?;
        let modified = found.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let modified = modified.map(|time| time.as_nanos().to_string());
        files.insert(name(shard.path()), json!({ "bytes": found.len(), "modified": modified }));
    }
    let config = model.folder().and_then(|folder| folder.config.clone());
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "source": files,
        "configuration": config,
        "command": command,
    }))
}

fn as_json(quantize: &v1::Quantize) -> Result<Value, CheckpointError> {
    let verb = Verb::Quantize(quantize.clone());
    let text = command::to_json(&v1::Command { verb: Some(verb), ..Default::default() });
    serde_json::from_str(&text).map_err(|error| CheckpointError::Ours(error.to_string()))
}

/// The inverse of [`as_json`].
fn read_back(command: &Value) -> Option<v1::Quantize> {
    match command::parse(command.to_string().as_bytes()).ok()?.verb? {
        Verb::Quantize(quantize) => Some(quantize),
        Verb::Dequantize(_) | Verb::Measure(_) => None,
    }
}

fn pass(gate: Gate, layers: &[LayerReport]) -> Result<(), CheckpointError> {
    match gate.missed(layers) {
        Some((layer, detail)) => Err(CheckpointError::Gate { layer: layer.name.clone(), detail }),
        None => Ok(()),
    }
}

/// Writes a unit's file, on a thread that may block. Stopped before its end, it leaves nothing behind: the runtime waits for the
/// thread.
fn seal(
    unit: Unit,
    file: String,
    path: PathBuf,
    is_recorded: bool,
    stop: &Arc<Stop>,
) -> JoinHandle<Result<Record, CheckpointError>> {
    let stop = Arc::clone(stop);
    tokio::task::spawn_blocking(move || {
        let Sealed { layers, bytes, tensors } = unit.seal(&stop)?;
        let crc32c = match is_recorded {
            true => checksum(&path).map_err(CheckpointError::io("cannot read", &path))?.1,
            false => 0,
        };
        Ok(Record { file, bytes, crc32c, tensors, layers })
    })
}

/// What became of the modules.
fn decided(layers: &[LayerReport]) -> Result<Decided, CheckpointError> {
    let mut decided = Decided::default();
    for layer in layers {
        let Some(module) = layer.name.strip_suffix(".weight") else { continue };
        match &layer.scheme {
            Some(scheme) => {
                let scheme = scheme.parse().map_err(|_| CheckpointError::Ours(format!("`{scheme}` was answered")))?;
                decided.quantized.insert(module.to_owned(), scheme);
            }
            None if layer.shape.len() >= 2 => drop(decided.kept.insert(module.to_owned())),
            None => {}
        }
    }
    Ok(decided)
}

/// Which tensor is in which file.
fn index(metadata: &Map<String, Value>, records: &[Record]) -> Value {
    let mut metadata = metadata.clone();
    let total: u64 = records.iter().flat_map(|record| record.tensors.values()).sum();
    metadata.insert("total_size".to_owned(), json!(total));
    // It counted those of the dense model.
    metadata.remove("total_parameters");
    let homes =
        records.iter().flat_map(|record| record.tensors.keys().map(|tensor| (tensor.clone(), json!(record.file))));
    let homes = BTreeMap::from_iter(homes);
    json!({ "metadata": metadata, "weight_map": homes })
}

fn text(value: &Value) -> Result<Vec<u8>, CheckpointError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| CheckpointError::Ours(error.to_string()))?;
    text.push(b'\n');
    Ok(text)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
