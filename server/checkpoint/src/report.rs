//! What became of every tensor, measured: kept in the records of a job, and told in its report.

use serde::{Deserialize, Serialize};

/// What became of a tensor of the source. Field names are those of the contract where it has them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerReport {
    /// The tensor.
    pub name: String,
    /// What became of it.
    pub status: Status,
    /// The contract's word, unless it was quantized.
    pub reason: Option<String>,
    /// The same as a sentence.
    pub message: Option<String>,
    /// Its element type, as safetensors says it.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// The canonical scheme, if it was quantized.
    pub scheme: Option<String>,
    /// Quality of the layer; none unless quantized.
    pub metrics: Option<Metrics>,
    /// The tensors of the destination.
    pub tensors: Vec<String>,
    /// Bytes in the source.
    pub bytes: u64,
}

/// What became of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It was quantized.
    Quantized,
    /// It was left as it is.
    Kept,
    /// It could not be quantized, and was left as it is.
    Failed,
    /// It was quantized, and is dense now.
    Dequantized,
}

impl Status {
    /// The contract's word.
    pub fn word(self) -> &'static str {
        match self {
            Status::Quantized => "quantized",
            Status::Kept => "kept",
            Status::Failed => "failed",
            Status::Dequantized => "dequantized",
        }
    }
}

/// What codes lose. SPEC.md, section "Output", has the formulas.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the contract's own fields")]
pub struct Metrics {
    pub elements: u64,
    pub mse: Option<f64>,
    pub sqnr_db: Option<f64>,
    pub cosine: Option<f64>,
    pub max_abs_error: Option<f64>,
    pub amax: Option<f64>,
    pub saturated: u64,
    pub bits_per_weight: Option<f64>,
}

/// The least quality that every quantized layer must have.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Gate {
    /// In dB.
    pub sqnr_db_min: Option<f64>,
    /// Of the angle between weights and decoded weights.
    pub cosine_min: Option<f64>,
}

impl Gate {
    /// The layer that misses it by most, and how. An exact layer, whose SQNR is undefined, passes.
    pub fn missed<'a>(&self, layers: &'a [LayerReport]) -> Option<(&'a LayerReport, String)> {
        let worst = |of: fn(&Metrics) -> Option<f64>| {
            let rated = layers.iter().filter_map(move |layer| Some((layer, of(layer.metrics.as_ref()?)?)));
            rated.min_by(|a, b| a.1.total_cmp(&b.1))
        };
        let misses = |found: Option<(&'a LayerReport, f64)>, least: Option<f64>| {
            found.zip(least).filter(|((_, value), least)| value < least)
        };
        let sqnr = misses(worst(|metrics| metrics.sqnr_db), self.sqnr_db_min)
            .map(|((layer, value), least)| (layer, format!("an SQNR of {value:.2} dB: expected at least {least} dB")));
        let cosine = || {
            misses(worst(|metrics| metrics.cosine), self.cosine_min)
                .map(|((layer, value), least)| (layer, format!("a cosine of {value:.6}: expected at least {least}")))
        };
        sqnr.or_else(cosine)
    }
}
