//! What a tensor's elements are in a file: numbers, or blocks of ggml.

use std::fmt;

use quarrel_engine::Block;
use safetensors::Dtype;

use crate::gguf::Type;

/// What a tensor's elements are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// A number each, of a type that safetensors has.
    Plain(Dtype),
    /// So many consecutive columns a block, of a type of ggml.
    Blocks(&'static Type),
}

impl Element {
    /// The type of numbers that are no blocks.
    pub fn plain(self) -> Option<Dtype> {
        match self {
            Element::Plain(dtype) => Some(dtype),
            Element::Blocks(_) => None,
        }
    }

    /// The type of its values: F32 of blocks.
    pub(crate) fn of_values(self) -> Dtype {
        self.plain().unwrap_or(Dtype::F32)
    }

    /// Bytes of a tensor of that shape; none if its columns are no whole blocks, or there is no such number.
    pub(crate) fn bytes(self, shape: &[u64]) -> Option<u64> {
        let elements = shape.iter().try_fold(1u64, |all, dimension| all.checked_mul(*dimension))?;
        match self {
            Element::Plain(dtype) => {
                let bits = elements.checked_mul(dtype.bitsize() as u64)?;
                bits.is_multiple_of(8).then_some(bits / 8)
            }
            Element::Blocks(of) => {
                let columns = shape.last().copied().unwrap_or(1);
                columns.is_multiple_of(of.elements).then(|| (elements / of.elements).checked_mul(of.bytes))?
            }
        }
    }
}

impl From<Dtype> for Element {
    fn from(dtype: Dtype) -> Element {
        Element::Plain(dtype)
    }
}

impl From<Block> for Element {
    fn from(block: Block) -> Element {
        Element::Blocks(Type::of_block(block))
    }
}

/// The name that the file's own ecosystem has for it: `BF16`, `Q4_K`.
impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Element::Plain(dtype) => write!(f, "{dtype:?}"),
            Element::Blocks(of) => f.write_str(of.name),
        }
    }
}
