//! Totals of a stream, and the list of schemes that the service offers.

use std::collections::BTreeMap;

use quarrel_kernels::{Codes, Metrics, Packing, Scaling};
use quarrel_proto::{column::status, v1};

use crate::{
    presets::PRESETS,
    recipe::profile,
    rows::Row,
    scheme::{Granularity, Scheme},
};

/// Totals of a stream.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    rows: u64,
    layers: BTreeMap<&'static str, u64>,
    elements: u64,
    bits: f64,
    bytes_in: u64,
    bytes_out: u64,
    worst: Option<(f64, String)>,
    /// A row of the layer under way has failed.
    failed: bool,
}

impl Tally {
    pub(crate) fn add(&mut self, row: &Row, word: &'static str, layer: Option<&(Metrics, Option<f64>)>, out: u64) {
        self.rows += 1;
        self.bytes_in += row.bytes as u64;
        self.bytes_out += out;
        self.failed |= word == status::FAILED;
        if row.completes {
            let word = if std::mem::take(&mut self.failed) { status::FAILED } else { word };
            *self.layers.entry(word).or_default() += 1;
        }
        if let Some((metrics, bits)) = layer {
            self.elements += metrics.elements;
            self.bits += bits.unwrap_or(0.0) * metrics.elements as f64;
            if let Some(db) = metrics.sqnr_db.filter(|db| self.worst.as_ref().is_none_or(|(worst, _)| db < worst)) {
                self.worst = Some((db, row.layer.name.clone()));
            }
        }
    }

    /// Counts a row of `dequantize`.
    pub(crate) fn add_decoded(&mut self, word: &'static str, completes: bool, bytes_in: usize, bytes_out: usize) {
        self.rows += 1;
        self.bytes_in += bytes_in as u64;
        self.bytes_out += bytes_out as u64;
        *self.layers.entry(word).or_default() += u64::from(completes);
    }

    /// How far the stream is.
    pub fn progress(&self) -> v1::Progress {
        v1::Progress {
            rows: self.rows,
            layers: self.layers.values().sum(),
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
        }
    }

    /// What the stream was, without its times.
    pub fn summary(&self) -> v1::Summary {
        let layers = |word| self.layers.get(word).copied().unwrap_or(0);
        v1::Summary {
            rows: self.rows,
            layers_quantized: layers(status::QUANTIZED),
            layers_kept: layers(status::KEPT),
            layers_failed: layers(status::FAILED),
            elements: self.elements,
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            bits_per_weight: (self.elements > 0).then(|| self.bits / self.elements as f64),
            worst_layer: self.worst.as_ref().map(|(_, name)| name.clone()),
            worst_sqnr_db: self.worst.as_ref().map(|(db, _)| *db),
            ..Default::default()
        }
    }
}

/// Every scheme that has a name of its own, and one of each family that takes numbers.
pub fn listing() -> v1::Schemes {
    let integers = (2..=8).flat_map(|bits| [format!("int{bits}"), format!("int{bits}-asym")]);
    let fp8 = ["fp8/tensor", "fp8/channel", "fp8/b128x128"].map(str::to_owned);
    let names = PRESETS.iter().map(|preset| preset.name.to_owned()).chain(integers).chain(fp8);
    let schemes = names.filter_map(|name| name.parse().ok()).map(|scheme| describe(&scheme)).collect();
    v1::Schemes { schemes }
}

fn describe(scheme: &Scheme) -> v1::Scheme {
    let (granularity, group_size, block) = match scheme.granularity() {
        Granularity::Group(size) if scheme.format().scaling == Scaling::InBlocks => {
            ("block", None, vec![1, size.get()])
        }
        Granularity::Tensor => ("tensor", None, vec![]),
        Granularity::Channel => ("channel", None, vec![]),
        Granularity::Group(size) => ("group", Some(size.get()), vec![]),
        Granularity::Block { rows, columns } => ("block", None, vec![rows.get(), columns.get()]),
    };
    let (element, packing) = match scheme.codes() {
        Codes::Int { bits, packing: Packing::Dense, .. } => (format!("int{bits}"), "dense-int32"),
        Codes::Int { bits, packing: Packing::Plain, .. } => (format!("int{bits}"), "int8"),
        Codes::Fp8E4m3 => ("fp8_e4m3".to_owned(), "fp8"),
        Codes::Fp6E2m3 => ("fp6_e2m3".to_owned(), "dense-uint8"),
        Codes::Fp4E2m1 => ("fp4_e2m1".to_owned(), "dense-uint8"),
        Codes::Codebook(book) => (book.name().to_owned(), "nibbles-uint8"),
        Codes::Rowwise => ("int8".to_owned(), "int8"),
        Codes::Block(block) => (block.name().to_ascii_lowercase(), "ggml"),
    };
    let uses = |name: &str| {
        let recipe = profile(name).ok();
        let rules = recipe.into_iter().flat_map(|recipe| recipe.rules);
        let mut texts = rules.flat_map(|rule| {
            let ladder = rule.fallback.map(|ladder| ladder.schemes).unwrap_or_default();
            std::iter::once(rule.scheme).chain(ladder)
        });
        texts.any(|text| {
            text.parse::<Scheme>()
                .is_ok_and(|used| used.format() == scheme.format() && used.preset() == scheme.preset())
        })
    };
    v1::Scheme {
        name: scheme.to_string(),
        element,
        bit_width: scheme.codes().bits().into(),
        symmetric: scheme.codes().symmetric(),
        granularity: granularity.to_owned(),
        group_size,
        block,
        packing: packing.to_owned(),
        checkpoint_format: Some(scheme.checkpoint_format().to_owned()),
        needs_calibration: scheme.preset().is_some_and(|preset| preset.needs_calibration),
        profiles: ["edge", "local", "cloud"].into_iter().filter(|name| uses(name)).map(str::to_owned).collect(),
    }
}
