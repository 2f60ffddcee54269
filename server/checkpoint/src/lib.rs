//! Checkpoints on disk: which of their tensors are quantized, and how quantized layers are stored.
//!
//! For now one file of safetensors in, one out, in the layout of compressed-tensors. In the order in which a tensor meets
//! them: [`Source`] reads, [`with_shared_scales`] finds what fused layers share, [`fates`] decides what is quantized, [`stored`] names what a quantized layer becomes,
//! [`Sink`] writes. The other way, [`modules`] finds the quantized layers of a file. Nothing here computes a code.

#![forbid(unsafe_code)]

mod bits;
mod error;
mod fate;
mod fused;
mod modules;
mod sink;
mod source;
mod stored;
mod target;

pub use error::CheckpointError;
pub use fate::{Fate, checkpoint_recipe, fates};
pub use fused::with_shared_scales;
pub use modules::{Module, known_schemes, modules, with_schemes};
pub use quarrel_engine::Scheme;
pub use safetensors::Dtype;
pub use sink::{Pieces, Sink};
pub use source::{Source, Tensor};
pub use stored::{Stored, stored};
pub use target::{Replace, Stop, Target};

/// The key of a file's metadata that says which scheme each quantized module has: JSON, `{scheme: [module, ..]}`.
pub const SCHEMES_KEY: &str = "quarrel.schemes";
