//! Two checkpoints of one model, layer by layer: how far the second is from the first. Either may be quantized.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Buf, Bytes};
use futures::{
    StreamExt, TryStreamExt,
    stream::{self, BoxStream},
};
use quarrel_engine::{Compared, Level, to_f32};
use serde::Serialize;

use crate::{
    error::CheckpointError,
    fate::float_word,
    local::{Local, RUN_BYTES},
    model::Model,
    modules::modules,
    quantizer::{Coded, Quantizer, Weights},
    report::{Gate, Metrics},
};

/// What was found.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// Layers that both have in one shape, in the order of the first.
    pub layers: Vec<Measured>,
    /// Layers of the first that the second has not, or in another shape; and the other way.
    pub only_in_first: Vec<String>,
    /// Those of the second.
    pub only_in_second: Vec<String>,
}

/// A layer of both.
#[derive(Debug, Serialize)]
pub struct Measured {
    /// Its name: of the tensor where it is dense.
    pub name: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// What it is in the first: an element type or a scheme.
    pub first: String,
    /// What it is in the second.
    pub second: String,
    /// Of the first, the quality of the second.
    pub metrics: Metrics,
}

/// A layer's values in a checkpoint.
#[derive(Debug, Clone)]
enum Layer {
    Dense(Weights),
    Coded(Box<Coded>),
}

impl Measured {
    /// Whether there are numbers in it, and no quality: some are not finite, of the first or of the second.
    pub fn is_undefined(&self) -> bool {
        self.metrics.elements > 0 && self.metrics.mse.is_none()
    }
}

impl Comparison {
    /// Compares two models.
    ///
    /// # Errors
    /// [`CheckpointError`] for what cannot be read.
    pub async fn of(
        (first, second): (&Model, &Model),
        local: &Local,
        level: Level,
    ) -> Result<Comparison, CheckpointError> {
        let (order, first) = layers(first)?;
        let (others, second) = layers(second)?;
        let fits = |name: &String| second.get(name).is_some_and(|other| other.shape() == first[name].shape());
        let (both, only_in_first): (Vec<_>, Vec<_>) = order.into_iter().partition(fits);
        let known = BTreeSet::from_iter(&both);
        let only_in_second = others.into_iter().filter(|name| !known.contains(name)).collect();
        let mut measured = Vec::new();
        for name in both {
            let (one, other) = (&first[&name], &second[&name]);
            let metrics = compared(one.values(local, level), other.values(local, level), &name).await?;
            let shape = one.shape().to_vec();
            measured.push(Measured { name, shape, first: one.what(), second: other.what(), metrics });
        }
        Ok(Comparison { layers: measured, only_in_first, only_in_second })
    }

    /// The worst layer that misses a gate, and how.
    pub fn missed(&self, gate: Gate) -> Option<(String, String)> {
        let is_asked = gate.sqnr_db_min.is_some() || gate.cosine_min.is_some();
        if let Some(layer) = self.layers.iter().find(|layer| layer.is_undefined()).filter(|_| is_asked) {
            return Some((
                layer.name.clone(),
                "a quality that is undefined, of numbers that are not finite: expected finite ones".to_owned(),
            ));
        }
        let measured = self.layers.iter().map(|layer| (layer.name.as_str(), &layer.metrics));
        gate.missed(measured).map(|(layer, detail)| (layer.to_owned(), detail))
    }
}

/// The layers of a model, in order and by name: a module's is that of its weight.
fn layers(model: &Model) -> Result<(Vec<String>, BTreeMap<String, Layer>), CheckpointError> {
    let (mut order, mut found) = (Vec::new(), BTreeMap::new());
    for source in model.shards() {
        let modules = modules(source)?;
        let mut coded = BTreeMap::from_iter(modules.iter().map(|module| (module.codes.name.as_str(), module)));
        let parts = BTreeSet::from_iter(modules.iter().flat_map(|module| module.parts()));
        for tensor in source.tensors() {
            let (name, layer) = match (coded.remove(tensor.name.as_str()), float_word(tensor.dtype)) {
                (Some(module), _) => {
                    let coded = Coded { source: source.clone(), module: module.clone() };
                    (format!("{}.weight", module.name), Layer::Coded(Box::new(coded)))
                }
                (None, Some(dtype)) if !parts.contains(tensor.name.as_str()) => {
                    let weights = Weights { source: source.clone(), tensor: tensor.clone(), dtype };
                    (tensor.name.clone(), Layer::Dense(weights))
                }
                (None, _) => continue,
            };
            order.push(name.clone());
            found.insert(name, layer);
        }
    }
    Ok((order, found))
}

impl Layer {
    fn shape(&self) -> &[u64] {
        match self {
            Layer::Dense(weights) => &weights.tensor.shape,
            Layer::Coded(coded) => &coded.module.shape,
        }
    }

    fn what(&self) -> String {
        match self {
            Layer::Dense(weights) => weights.tensor.dtype.to_string(),
            Layer::Coded(coded) => coded.module.scheme.to_string(),
        }
    }

    /// Its values as f32, piece by piece, in order.
    fn values(&self, local: &Local, level: Level) -> BoxStream<'static, Result<Bytes, CheckpointError>> {
        match self.clone() {
            // Nothing to be answered.
            layer if layer.shape().contains(&0) => stream::empty().boxed(),
            Layer::Coded(coded) => {
                local.dequantize("f32".to_owned(), vec![*coded]).map_ok(|values| values.data).boxed()
            }
            Layer::Dense(Weights { source, tensor, dtype }) => {
                let bytes = tensor.bytes();
                let ranges = (0..bytes).step_by(RUN_BYTES as usize).map(move |at| at..bytes.min(at + RUN_BYTES));
                let read = stream::iter(ranges).map(move |range| {
                    let (source, tensor) = (source.clone(), tensor.clone());
                    tokio::task::spawn_blocking(move || {
                        let read =
                            source.read(&tensor, range).map_err(CheckpointError::io("cannot read", source.path()))?;
                        let values = to_f32(level, dtype, &read);
                        values.map(Bytes::from).ok_or_else(|| CheckpointError::Ours(format!("no such type: {dtype}")))
                    })
                });
                read.buffered(2).map(|read| read.map_err(|error| CheckpointError::Ours(error.to_string()))?).boxed()
            }
        }
    }
}

/// Both streams to their end, which they have together.
async fn compared(
    mut first: BoxStream<'static, Result<Bytes, CheckpointError>>,
    mut second: BoxStream<'static, Result<Bytes, CheckpointError>>,
    name: &str,
) -> Result<Metrics, CheckpointError> {
    let (mut one, mut other) = (Bytes::new(), Bytes::new());
    let mut sums = Compared::default();
    loop {
        if one.is_empty() {
            one = first.try_next().await?.unwrap_or_default();
        }
        if other.is_empty() {
            other = second.try_next().await?.unwrap_or_default();
        }
        let bytes = one.len().min(other.len());
        if bytes == 0 {
            break;
        }
        sums.add(&one[..bytes], &other[..bytes]);
        one.advance(bytes);
        other.advance(bytes);
    }
    if one.len() + other.len() > 0 {
        return Err(CheckpointError::Ours(format!("layer `{name}` has more values in one than in the other")));
    }
    let found = sums.metrics();
    Ok(Metrics {
        elements: found.elements,
        mse: found.mse,
        sqnr_db: found.sqnr_db,
        cosine: found.cosine,
        // Of finite numbers alone, it would say that nothing is lost.
        max_abs_error: (found.mse.is_some() || found.elements == 0).then_some(found.max_abs_error),
        amax: Some(found.amax),
        saturated: 0,
        bits_per_weight: None,
    })
}
