//! A layer as its rows come, and the tensors that it becomes in a file.

use quarrel_engine::Scheme;
use safetensors::Dtype;

use crate::{
    error::CheckpointError,
    report::Status,
    sink::{Pieces, Sink},
    stored::{codes_part, stored},
    unit::Outcome,
};

/// A layer whose rows are coming.
#[derive(Debug, Default)]
pub(crate) struct Coming {
    pub(crate) pieces: Pieces,
    scales: Vec<f32>,
    zero_points: Option<Vec<i32>>,
    pub(crate) global_scale: Option<f32>,
    scheme: Option<String>,
    /// Why it is not quantized, if a row says so.
    pub(crate) not: Option<(Status, String, String)>,
}

impl Coming {
    /// What became of the next row of the layer.
    pub(crate) fn take(&mut self, sink: &mut Sink, name: &str, outcome: Outcome) -> Result<(), CheckpointError> {
        match outcome {
            Outcome::Quantized { data, scales, zero_points, global_scale, scheme } => {
                if self.scheme.is_none() {
                    let part = codes_part(&parsed(name, &scheme)?);
                    self.pieces = sink.begin(&format!("{}.{part}", module_of(name)));
                }
                sink.spool(&mut self.pieces, &data)?;
                self.scales.extend(scales);
                match (&mut self.zero_points, zero_points) {
                    (Some(points), Some(more)) => points.extend(more),
                    (points, more) => *points = more,
                }
                self.global_scale = self.global_scale.or(global_scale);
                self.scheme = Some(scheme);
            }
            Outcome::Not { status, reason, message, weights } => {
                if let Some(weights) = weights {
                    sink.spool(&mut self.pieces, &weights)?;
                }
                self.not = Some((status, reason, message));
            }
        }
        Ok(())
    }

    /// Bytes that it takes in a file, or nearly so.
    pub(crate) fn bytes(&self) -> u64 {
        self.pieces.bytes() + 4 * self.scales.len() as u64
    }

    /// Puts the tensors of a quantized layer into a file; its scheme and their names.
    pub(crate) fn store(
        self,
        sink: &mut Sink,
        name: &str,
        weights: (Dtype, &[u64]),
    ) -> Result<(String, Vec<String>), CheckpointError> {
        let text = self.scheme.unwrap_or_default();
        let scheme = parsed(name, &text)?;
        let points = self.zero_points.as_deref();
        let stored = stored(module_of(name), &scheme, weights, &self.scales, points, self.global_scale);
        let mut tensors = vec![stored.codes.0.clone()];
        sink.spooled(stored.codes, self.pieces)?;
        for (entry, bytes) in stored.beside {
            tensors.push(entry.0.clone());
            sink.here(entry, &bytes)?;
        }
        Ok((text, tensors))
    }
}

/// A scheme that was answered.
fn parsed(layer: &str, scheme: &str) -> Result<Scheme, CheckpointError> {
    scheme.parse().map_err(|error| CheckpointError::Ours(format!("layer `{layer}`: {error}")))
}

/// The module of a layer.
pub(crate) fn module_of(layer: &str) -> &str {
    layer.strip_suffix(".weight").unwrap_or(layer)
}
