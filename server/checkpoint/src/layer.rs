//! A layer as its rows come, and the tensors that it becomes in a file.

use bytes::Bytes;
use quarrel_engine::{Scaling, Scheme};
use safetensors::Dtype;

use crate::{
    bitsandbytes,
    error::CheckpointError,
    report::Status,
    sink::{Pieces, Sink},
    stored::{Part, codes_part, layout, narrowed, scales_part, stored_points, stored_type},
    unit::{Nested, Outcome},
};

/// Of so many bytes scales are written; in between lie codes.
const SCALES_BYTES: usize = 256 << 10;

/// A layer whose rows are coming.
#[derive(Debug, Default)]
pub(crate) struct Coming {
    pub(crate) pieces: Pieces,
    /// As they are stored; the last of them are still here.
    scales: Pieces,
    last_scales: Vec<u8>,
    /// Of at most 8 bits; packed when all are there.
    zero_points: Option<Vec<i8>>,
    pub(crate) global_scale: Option<f32>,
    /// Of scales that are quantized too: what they are under, and their mean.
    nested: Option<(Bytes, f32)>,
    /// As text too: what was answered.
    scheme: Option<(Scheme, String)>,
    /// Why it is not quantized, if a row says so.
    pub(crate) not: Option<(Status, String, String)>,
}

impl Coming {
    /// What became of the next row of the layer, whose weights are of that type.
    pub(crate) fn take(
        &mut self,
        sink: &mut Sink,
        (name, dtype): (&str, Dtype),
        outcome: Outcome,
    ) -> Result<(), CheckpointError> {
        match outcome {
            Outcome::Quantized { data, scales, zero_points, global_scale, nested, scheme } => {
                let (scheme, _) = match &self.scheme {
                    Some(known) => known,
                    None => {
                        let parsed = parsed(name, &scheme)?;
                        self.pieces = sink.begin(&format!("{}.{}", module_of(name), codes_part(&parsed)));
                        self.scales = sink.begin(&format!("{}.{}", module_of(name), scales_part(&parsed)));
                        self.scheme.insert((parsed, scheme))
                    }
                };
                sink.spool(&mut self.pieces, &data)?;
                match (scheme.format().scaling, nested) {
                    (Scaling::Nested, None) => {}
                    (_, None) => self.last_scales.extend(narrowed(&scales, stored_type(scheme, dtype))),
                    (_, Some(Nested { absmax, nested_absmax, offset })) => {
                        self.last_scales.extend(absmax);
                        self.nested = Some((nested_absmax, offset));
                    }
                }
                if self.last_scales.len() >= SCALES_BYTES {
                    sink.spool(&mut self.scales, &std::mem::take(&mut self.last_scales))?;
                }
                if let Some(more) = zero_points {
                    self.zero_points.get_or_insert_default().extend(more.into_iter().map(|point| point as i8));
                }
                self.global_scale = self.global_scale.or(global_scale);
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
        self.pieces.bytes() + self.scales.bytes() + self.held() as u64
    }

    /// Bytes that it takes in memory.
    pub(crate) fn held(&self) -> usize {
        let nested = self.nested.as_ref().map_or(0, |(absmax, _)| absmax.len());
        self.zero_points.as_ref().map_or(0, Vec::len) + self.last_scales.len() + nested
    }

    /// What of it lies in one file lies in another.
    pub(crate) fn hand_over(&mut self, from: &mut Sink, to: &mut Sink) -> Result<(), CheckpointError> {
        self.pieces = from.hand_over(&self.pieces, to)?;
        self.scales = from.hand_over(&self.scales, to)?;
        Ok(())
    }

    /// Puts the tensors of a quantized layer into a file; its scheme and their names.
    pub(crate) fn store(
        mut self,
        sink: &mut Sink,
        name: &str,
        (dtype, shape): (Dtype, &[u64]),
    ) -> Result<(String, Vec<String>), CheckpointError> {
        let unanswered = || CheckpointError::Ours(format!("layer `{name}` was answered without a scheme"));
        let (scheme, text) = self.scheme.ok_or_else(unanswered)?;
        sink.spool(&mut self.scales, &self.last_scales)?;
        let (mut codes, mut scales) = (Some(self.pieces), Some(self.scales));
        let mut tensors = Vec::new();
        for (part, entry) in layout(module_of(name), &scheme, (dtype, shape)) {
            tensors.push(entry.0.clone());
            match part {
                Part::Codes => sink.spooled(entry, codes.take().unwrap_or_default())?,
                Part::Scales => sink.spooled(entry, scales.take().unwrap_or_default())?,
                Part::Shape => {
                    let bytes = shape.iter().flat_map(|dimension| (*dimension as i64).to_le_bytes());
                    sink.here(entry, &Vec::from_iter(bytes))?;
                }
                Part::Said => {
                    let offset = self.nested.as_ref().map(|(_, offset)| *offset);
                    let bytes = bitsandbytes::constant(&entry.0, &scheme, (dtype, shape), offset);
                    sink.here(entry, &bytes)?;
                }
                Part::Nested => {
                    let bytes = self.nested.as_ref().map(|(absmax, _)| absmax.as_ref()).unwrap_or_default();
                    sink.here(entry, bytes)?;
                }
                // What lacks does not fit its shape, and is an error when the file is put together.
                Part::Global => {
                    let bytes = self.global_scale.map(|global| global.to_le_bytes().to_vec()).unwrap_or_default();
                    sink.here(entry, &bytes)?;
                }
                Part::ZeroPoints => {
                    let points = self.zero_points.as_deref().unwrap_or_default();
                    sink.here(entry, &stored_points(&scheme, shape, points))?;
                }
            }
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
