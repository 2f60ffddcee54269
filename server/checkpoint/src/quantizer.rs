//! What a job asks for, and what it tells of its way.

use futures::stream::BoxStream;
use quarrel_proto::v1;

use crate::{
    error::CheckpointError,
    modules::Module,
    source::{Source, Tensor},
    unit::{Row, Values},
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
