//! Checkpoints on disk: which of their tensors are quantized, and how quantized layers are stored.
//!
//! Safetensors or GGUF in, a file or the folder of a model, and the same out: in the layout of compressed-tensors, or as llama.cpp has it. START at [`Job`]: in the order in which a tensor
//! meets them, [`Model`] and [`Source`] read, `fused` finds what fused layers share, `fate` decides what is quantized, a [`Quantizer`] does it, `unit` puts
//! a file together, for which `stored` names what a layer becomes and `sink` writes; `site` remembers what is complete, `config` says it to whoever loads the model.
//! The other way, [`modules`] finds the quantized layers of a file. Nothing here computes a code.

#![forbid(unsafe_code)]

mod answers;
mod becoming;
mod beside;
mod bits;
mod bitsandbytes;
mod checks;
mod columns;
mod config;
mod element;
mod error;
mod estimate;
mod fate;
mod filling;
mod flow;
mod form;
mod fused;
mod gguf;
mod header;
mod job;
mod layer;
mod legacy;
mod local;
mod make;
mod measure;
mod model;
mod modules;
mod pull;
mod put;
mod quantizer;
mod report;
mod returned;
mod said;
mod sink;
mod site;
mod source;
mod storage;
mod stored;
mod target;
mod unit;
mod view;

pub use becoming::{COPY, check_for_gguf, is_copy, is_gguf};
pub use beside::Beside;
pub use columns::{Columns, holds_columns, is_columns};
pub use element::Element;
pub use error::CheckpointError;
pub use estimate::{Estimate, Estimated, estimate};
pub use fate::{checkpoint_recipe, of_checkpoint};
pub use filling::Filling;
pub use flow::{Flow, FlowLimits};
pub use gguf::mixes;
pub use job::{Ends, Job, Made};
pub use local::{JOB_BYTES, Local};
pub use measure::{Comparison, Measured};
pub use model::{Model, REPORT};
pub use modules::{Module, modules};
pub use pull::Pull;
pub use put::Put;
pub use quantizer::{Coded, Quantizer, Told, Weights};
pub use quarrel_engine::{Level, Limits, Scheme, listing};
pub use report::{By, Gate, LayerReport, Metrics, Report, Status, Totals};
pub use safetensors::Dtype;
pub use source::{Source, Tensor};
pub use storage::{Allowed, Location, Outside, Stores, is_uri};
pub use target::{Held, Replace, Stop, Target};
pub use unit::{Nested, Outcome, Row, Values};

/// The key of a file's metadata that says which scheme each quantized module has: JSON, `{scheme: [module, ..]}`.
pub const SCHEMES_KEY: &str = "quarrel.schemes";
