//! A job: a model in, a quantized one out, file by file. `open` looks at everything before.
//!
//! A unit is one file of the source, which becomes one of the destination under the same name; a tensor is never split over units. A
//! folder's job goes on where another was stopped, and what makes the folder a model, index and `config.json`, is written last.

mod open;

pub(crate) use open::copied_model;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use quarrel_proto::v1;
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::{
    checks::{identity, name},
    config::{Decided, decided, dense_config, index, quantized_config, says_compressed_tensors, text},
    error::CheckpointError,
    fate::Fate,
    fused::{Fused, with_shared_scales},
    gguf::Head,
    make::{copied, dense, quantized},
    model::{CONFIG, Model, REPORT},
    modules::Module,
    quantizer::{Quantizer, Told},
    report::{Gate, LayerReport, pass},
    site::{Record, Site},
    source::Tensor,
    storage::Location,
    target::{Stop, Target},
    unit::{Sealed, Unit},
};

/// Where a job reads and writes.
#[derive(Debug, Clone, Copy)]
pub struct Ends<'a> {
    /// A file or a model's folder.
    pub source: &'a Location,
    /// The same, or a GGUF file.
    pub destination: &'a Location,
    /// A GGUF file of the same model, whose metadata a GGUF file is to have.
    pub metadata: Option<&'a Location>,
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
        fused: Vec<Fused>,
        /// What a GGUF file says, if it is to be one.
        head: Option<Head>,
    },
    /// Nothing: what is quantized is stored as it is seen.
    Copy { effective: v1::Command, modules: Vec<Vec<Module>> },
    /// To one type, or to the one that each layer's weights had.
    Dequantize { dtype: Option<String>, modules: Vec<Vec<Module>> },
}

#[derive(Debug)]
enum Destination {
    File(Target),
    Folder(Site),
}

/// What a job has made.
#[derive(Debug)]
pub struct Made {
    /// What became of every tensor, in the order of the source.
    pub layers: Vec<LayerReport>,
    /// Of the files of tensors.
    pub bytes: u64,
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
    /// The source.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Where it is written to: a path or a URI.
    pub fn destination(&self) -> PathBuf {
        match &self.destination {
            Destination::File(target) => target.path(),
            Destination::Folder(site) => site.path(),
        }
    }

    /// The command with all that it leaves open, if it quantizes.
    pub fn effective(&self) -> Option<&v1::Command> {
        match &self.work {
            Work::Quantize { effective, .. } | Work::Copy { effective, .. } => Some(effective),
            Work::Dequantize { .. } => None,
        }
    }

    /// Where a report is to appear that belongs to the model: in its folder, as the file [`REPORT`].
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn report(&self) -> Result<Option<Target>, CheckpointError> {
        match &self.destination {
            Destination::Folder(site) => site.target(Path::new(REPORT)).map(Some),
            Destination::File(_) => Ok(None),
        }
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
            Work::Copy { .. } => Vec::new(),
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
        let mut made = Made { layers: Vec::new(), bytes: 0, records: Vec::new() };
        // A file is written while the next one is computed.
        let mut writing: Option<JoinHandle<Result<Record, CheckpointError>>> = None;
        for (at, shard) in self.model.shards().to_vec().iter().enumerate() {
            let file = name(shard.path());
            let before = match &self.destination {
                Destination::Folder(site) => site.record(&file).cloned(),
                Destination::File(_) => None,
            };
            if let Some(record) = before {
                tell(Told::Skipped(self.sent_of(at).into_iter().map(Tensor::bytes).sum()));
                self.written(writing.take(), &mut made).await?;
                made.add(record);
                continue;
            }
            let target = match &self.destination {
                Destination::Folder(site) => site.target(Path::new(&file))?,
                Destination::File(target) => target.clone(),
            };
            let unit = match &self.work {
                Work::Quantize { command, fates, fused, head, .. } => {
                    let command = with_shared_scales(command, fused, |layer| shard.tensor(layer).is_some());
                    quantized(quantizer, command, (shard, &fates[at]), (target.clone(), head.as_ref()), &mut tell)
                        .await?
                }
                Work::Copy { modules, .. } => copied(shard, &modules[at], target.clone())?,
                Work::Dequantize { dtype, modules } => {
                    dense(quantizer, dtype.as_deref(), (shard, &modules[at]), target.clone(), &mut tell).await?
                }
            };
            if !self.is_recorded() {
                pass(self.gate, &unit.layers())?;
            }
            self.written(writing.take(), &mut made).await?;
            tell(Told::Writes);
            writing = Some(seal(unit, file, target, self.is_recorded(), stop));
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
        let before = |name: &&String| made.records.iter().any(|record| record.tensors.contains_key(*name));
        if let Some(name) = record.tensors.keys().find(before) {
            return Err(CheckpointError::Twice { name: name.clone() });
        }
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
            site.copy(&self.model.location().join(other), other, stop)?;
        }
        site.still(&identity(&self.model, Value::Null)?)?;
        site.is_ours()?;
        if !stop.commit() {
            let error = std::io::ErrorKind::Interrupted.into();
            return Err(CheckpointError::Io { what: "cannot write", path: self.model.path(), error });
        }
        if let Some((name, metadata)) = &folder.index {
            site.put(Path::new(name), &text(&index(metadata, &made.records))?)?;
        }
        if let Some(config) = &folder.config {
            let mut config = config.clone();
            let is_decoded = self.model.tensors().any(|(_, tensor)| tensor.scheme.is_some());
            if is_decoded || matches!(self.work, Work::Dequantize { .. }) {
                config = dense_config(config);
            }
            match &self.work {
                Work::Quantize { .. } => config = quantized_config(config, &decided(&made.layers)?),
                // What is in the layout already says of itself what no tensor does.
                Work::Copy { .. } if says_compressed_tensors(&config) => {}
                Work::Copy { modules, .. } => {
                    config = quantized_config(dense_config(config), &Decided::of(&self.model, modules));
                }
                Work::Dequantize { .. } => {}
            }
            site.put(Path::new(CONFIG), &text(&Value::Object(config))?)?;
        }
        site.done()
    }
}

/// Writes a unit's file, on a thread that may block. Stopped before its end, it leaves nothing behind: the runtime waits for the
/// thread.
fn seal(
    unit: Unit,
    file: String,
    target: Target,
    is_recorded: bool,
    stop: &Arc<Stop>,
) -> JoinHandle<Result<Record, CheckpointError>> {
    let stop = stop.hold();
    tokio::task::spawn_blocking(move || {
        let Sealed { layers, bytes, crc32c, tensors } = unit.seal(is_recorded, &stop)?;
        let is_sent = is_recorded && target.location().path().is_none();
        let stored = is_sent.then(|| target.identity()).transpose()?;
        Ok(Record { file, bytes, crc32c: crc32c.unwrap_or_default(), stored, tensors, layers })
    })
}
