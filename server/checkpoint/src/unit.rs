//! One file of a model: rows of quantized layers as they come, and tensors that are copied, to one file of the destination.

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::Bytes;
use safetensors::Dtype;

use crate::{
    SCHEMES_KEY,
    error::CheckpointError,
    form::Form,
    gguf::Head,
    layer::{Coming, module_of},
    modules::Module,
    report::{LayerReport, Metrics, Status},
    said::{known_schemes, with_schemes},
    sink::Sink,
    source::{Source, Tensor},
    stored::Entry,
    target::{Stop, Target},
};

/// A row of a quantized layer, as whoever quantizes answers it.
#[derive(Debug)]
pub struct Row {
    /// The layer.
    pub name: String,
    /// Whether it is the layer's first: what came of it before is void.
    pub begins: bool,
    /// Whether it completes the layer.
    pub completes: bool,
    /// Bytes of the layer that are done with it.
    pub done: u64,
    /// What became of the row.
    pub outcome: Outcome,
    /// Quality of the layer, with the row that completes it.
    pub metrics: Option<Metrics>,
}

/// What became of a row.
#[derive(Debug)]
pub enum Outcome {
    /// It was quantized.
    Quantized {
        /// Packed codes.
        data: Bytes,
        /// Of the spans that begin in this row.
        scales: Vec<f32>,
        /// One for each scale; none if symmetric.
        zero_points: Option<Vec<i32>>,
        /// What the scales are divided by, on the layer's first row.
        global_scale: Option<f32>,
        /// The scales as they are stored where they are quantized too, on the layer's first row.
        nested: Option<Nested>,
        /// The canonical scheme.
        scheme: String,
    },
    /// It was not.
    Not {
        /// Why: kept or failed.
        status: Status,
        /// The contract's word.
        reason: String,
        /// A sentence.
        message: String,
        /// What it stays, if that was asked for.
        weights: Option<Bytes>,
    },
}

/// A layer's scales, quantized too.
#[derive(Debug, Clone)]
pub struct Nested {
    /// One a scale.
    pub absmax: Bytes,
    /// Greatest distances from the mean, of 256 scales each: f32.
    pub nested_absmax: Bytes,
    /// The mean.
    pub offset: f32,
}

/// Values of a quantized layer, as whoever dequantizes answers them.
#[derive(Debug)]
pub struct Values {
    /// The module.
    pub module: String,
    /// Whether they are the layer's first: what came of it before is void.
    pub begins: bool,
    /// Whether they complete the layer.
    pub completes: bool,
    /// Bytes of the layer's codes that are done with them.
    pub done: u64,
    /// Row-major, little-endian.
    pub data: Bytes,
}

/// The file in the making, and what has come for it so far.
#[derive(Debug)]
pub(crate) struct Unit {
    sink: Sink,
    source: Source,
    /// By name, where in the source the layer is.
    waiting: HashMap<String, usize>,
    open: HashMap<String, Coming>,
    reports: BTreeMap<usize, LayerReport>,
    /// Of modules, by name: those that were quantized before, and now.
    schemes: BTreeMap<String, String>,
    /// Layers that are dequantized, by module: their place, and the type and shape of their values.
    coded: HashMap<String, (usize, Dtype, Module)>,
    is_dense: bool,
    /// What the file says, if it is to be GGUF.
    head: Option<Head>,
}

/// What a file is to become, as far as it is known before.
#[derive(Debug, Default)]
pub(crate) struct Foretold {
    /// Its tensors.
    pub(crate) entries: Vec<Entry>,
    /// Of modules that are to be quantized.
    pub(crate) schemes: BTreeMap<String, String>,
}

/// What a unit has become.
#[derive(Debug)]
pub(crate) struct Sealed {
    /// In the order of the source.
    pub(crate) layers: Vec<LayerReport>,
    /// Of the file.
    pub(crate) bytes: u64,
    /// Of those, if they were to be summed.
    pub(crate) crc32c: Option<u32>,
    /// Tensors of the destination, and their bytes.
    pub(crate) tensors: BTreeMap<String, u64>,
}

impl Unit {
    /// Of a file of the source; what it is to become, where that is known.
    pub(crate) fn new(
        target: Target,
        source: Source,
        foretold: Option<Foretold>,
        head: Option<Head>,
    ) -> Result<Unit, CheckpointError> {
        let schemes = known_schemes(&source)?;
        let sink = match foretold {
            Some(Foretold { entries, schemes: more }) => {
                let all = schemes.clone().into_iter().chain(more).collect();
                Sink::expecting(target, entries, &form(&source, &all, false, head.as_ref()))?
            }
            None => Sink::new(target)?,
        };
        Ok(Unit { head, ..Unit::of(sink, source, schemes, false) })
    }

    fn of(sink: Sink, source: Source, schemes: BTreeMap<String, String>, is_dense: bool) -> Unit {
        Unit {
            sink,
            source,
            waiting: HashMap::new(),
            open: HashMap::new(),
            reports: BTreeMap::new(),
            schemes,
            coded: HashMap::new(),
            is_dense,
            head: None,
        }
    }

    /// The file with the tensors of another, which has layers of these schemes.
    pub(crate) fn copied(
        target: Target,
        source: Source,
        schemes: BTreeMap<String, String>,
    ) -> Result<Unit, CheckpointError> {
        let entries = source.tensors().iter().map(Tensor::entry).collect();
        let sink = Sink::expecting(target, entries, &form(&source, &schemes, false, None))?;
        let mut unit = Unit::of(sink, source, schemes, false);
        for at in 0..unit.source.tensors().len() {
            unit.keep(at)?;
        }
        Ok(unit)
    }

    /// The file of dense tensors that a file of quantized ones becomes.
    pub(crate) fn dense(target: Target, source: Source, modules: &[(&Module, Dtype)]) -> Result<Unit, CheckpointError> {
        let parts = HashSet::<&str>::from_iter(modules.iter().flat_map(|(module, _)| module.parts()));
        let is_kept = |tensor: &Tensor| !parts.contains(tensor.name.as_str());
        let kept = source.tensors().iter().filter(|tensor| is_kept(tensor)).map(Tensor::entry);
        let dense = modules.iter().map(|(module, dtype)| (weight_of(module), (*dtype).into(), module.shape.clone()));
        let form = form(&source, &BTreeMap::new(), true, None);
        let sink = Sink::expecting(target, kept.chain(dense).collect(), &form)?;
        let mut unit = Unit::of(sink, source.clone(), BTreeMap::new(), true);
        for (at, tensor) in source.tensors().iter().enumerate().filter(|(_, tensor)| is_kept(tensor)) {
            unit.keep(at)?;
            // Decoded as it was opened.
            if let (Some(scheme), Some(report)) = (tensor.scheme, unit.reports.get_mut(&at)) {
                (report.status, report.scheme) = (Status::Dequantized, Some(scheme.to_string()));
            }
        }
        Ok(unit)
    }

    /// The module is sent, and answered later; or it has no elements, and nobody need answer.
    pub(crate) fn waits_dense(&mut self, module: &Module, dtype: Dtype) -> Result<bool, CheckpointError> {
        let at = self.source.place(&module.codes.name).unwrap_or(0);
        self.coded.insert(module.name.clone(), (at, dtype, module.clone()));
        if !module.shape.contains(&0) {
            return Ok(true);
        }
        self.finish_dense(&module.name)?;
        Ok(false)
    }

    pub(crate) fn take_values(&mut self, values: Values) -> Result<(), CheckpointError> {
        let open = self.open.entry(values.module.clone()).or_default();
        if values.begins {
            *open = Coming::default();
            open.pieces = self.sink.begin(&format!("{}.weight", values.module));
        }
        self.sink.spool(&mut open.pieces, &values.data)?;
        if values.completes {
            self.finish_dense(&values.module)?;
        }
        Ok(())
    }

    fn finish_dense(&mut self, name: &str) -> Result<(), CheckpointError> {
        let unasked = || CheckpointError::Ours(format!("layer `{name}` was answered and not sent"));
        let (at, dtype, module) = self.coded.remove(name).ok_or_else(unasked)?;
        let pieces = self.open.remove(name).unwrap_or_default().pieces;
        let tensor = weight_of(&module);
        self.sink.spooled((tensor.clone(), dtype.into(), module.shape.clone()), pieces)?;
        let report = report(&self.source.tensors()[at], Status::Dequantized, vec![tensor.clone()]);
        let shape = module.shape.clone();
        let scheme = Some(module.scheme.to_string());
        self.reports.insert(at, LayerReport { name: tensor, shape, scheme, ..report });
        Ok(())
    }

    /// The tensor at that place is sent, and answered later.
    pub(crate) fn waits(&mut self, at: usize) {
        self.waiting.insert(self.source.tensors()[at].name.clone(), at);
    }

    /// The tensor at that place stays as it is.
    pub(crate) fn copy(
        &mut self,
        at: usize,
        status: Status,
        reason: String,
        message: String,
    ) -> Result<(), CheckpointError> {
        let tensor = &self.source.tensors()[at];
        self.sink.copied(&self.source, tensor)?;
        let tensors = vec![tensor.name.clone()];
        let report = report(tensor, status, tensors);
        self.reports.insert(at, LayerReport { reason: Some(reason), message: Some(message), ..report });
        Ok(())
    }

    /// The tensor at that place stays as it is, and nobody asks why.
    fn keep(&mut self, at: usize) -> Result<(), CheckpointError> {
        let tensor = &self.source.tensors()[at];
        self.sink.copied(&self.source, tensor)?;
        self.reports.insert(at, report(tensor, Status::Kept, vec![tensor.name.clone()]));
        Ok(())
    }

    pub(crate) fn take(&mut self, row: Row) -> Result<(), CheckpointError> {
        let open = self.open.entry(row.name.clone()).or_default();
        if row.begins {
            // The first, or the first again because its stream broke.
            *open = Coming::default();
        }
        // What nobody asked for is told when it is complete.
        let dtype = self.waiting.get(&row.name).map_or(Dtype::F32, |at| self.source.tensors()[*at].dtype.of_values());
        open.take(&mut self.sink, (&row.name, dtype), row.outcome)?;
        if row.completes {
            self.finish(&row.name, row.metrics)?;
        }
        Ok(())
    }

    fn finish(&mut self, name: &str, metrics: Option<Metrics>) -> Result<(), CheckpointError> {
        let unasked = || CheckpointError::Ours(format!("layer `{name}` was answered and not sent"));
        let at = self.waiting.remove(name).ok_or_else(unasked)?;
        let open = self.open.remove(name).ok_or_else(unasked)?;
        if let Some((status, reason, message)) = open.not {
            return self.copy(at, status, reason, message);
        }
        let tensor = &self.source.tensors()[at];
        let (scheme, tensors) = open.store(&mut self.sink, name, (tensor.dtype.of_values(), &tensor.shape))?;
        self.schemes.insert(module_of(name).to_owned(), scheme.clone());
        let report = report(tensor, Status::Quantized, tensors);
        self.reports.insert(at, LayerReport { scheme: Some(scheme), metrics, ..report });
        Ok(())
    }

    /// What became of the tensors so far, in the order of the source.
    pub(crate) fn layers(&self) -> Vec<LayerReport> {
        self.reports.values().cloned().collect()
    }

    /// Writes the file.
    pub(crate) fn seal(self, summed: bool, stop: &Stop) -> Result<Sealed, CheckpointError> {
        let Unit { sink, source, waiting, reports, schemes, coded, is_dense, head, .. } = self;
        if let Some(name) = waiting.keys().chain(coded.keys()).next() {
            return Err(CheckpointError::Ours(format!("layer `{name}` was sent and not answered")));
        }
        let form = form(&source, &schemes, is_dense, head.as_ref());
        let tensors = sink.tensors();
        let (bytes, crc32c) = sink.seal(&form, summed, stop)?;
        Ok(Sealed { layers: reports.into_values().collect(), bytes, crc32c, tensors })
    }
}

/// The tensor that a module becomes which is dense again.
fn weight_of(module: &Module) -> String {
    format!("{}.weight", module.name)
}

/// What the file is, and what its header says beside tensors.
fn form(source: &Source, schemes: &BTreeMap<String, String>, is_dense: bool, head: Option<&Head>) -> Form {
    if let Some(head) = head {
        return Form::Gguf(head.clone());
    }
    // What a GGUF file says is of no use to who reads safetensors.
    let before = if source.gguf().is_some() { BTreeMap::new() } else { source.metadata().clone() };
    let mut metadata = with_schemes(before, schemes);
    match is_dense {
        true => drop(metadata.remove(SCHEMES_KEY)),
        false => drop(metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned())),
    }
    Form::Safetensors(metadata)
}

fn report(tensor: &Tensor, status: Status, tensors: Vec<String>) -> LayerReport {
    LayerReport {
        name: tensor.name.clone(),
        status,
        reason: None,
        message: None,
        dtype: tensor.dtype.to_string(),
        shape: tensor.shape.clone(),
        scheme: None,
        from: tensor.scheme.map(|scheme| scheme.to_string()),
        metrics: None,
        tensors,
        bytes: tensor.bytes(),
    }
}
