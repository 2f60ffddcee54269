//! The types of ggml's tensors.

use quarrel_engine::Block;
use safetensors::Dtype;

use crate::element::Element;

/// A type of ggml: blocks of so many elements in so many bytes.
#[derive(Debug, PartialEq, Eq)]
pub struct Type {
    /// Its number in a file.
    pub(crate) id: u32,
    /// ggml's name.
    pub name: &'static str,
    /// Consecutive columns in one block.
    pub(crate) elements: u64,
    /// Bytes of one block.
    pub(crate) bytes: u64,
    kind: Kind,
}

#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Plain(Dtype),
    /// Read and written here.
    Block(Block),
    /// Of others: it can be looked at and copied.
    Foreign,
}

const fn plain(id: u32, name: &'static str, bytes: u64, dtype: Dtype) -> Type {
    Type { id, name, elements: 1, bytes, kind: Kind::Plain(dtype) }
}

const fn block(id: u32, block: Block) -> Type {
    let (elements, bytes) = (block.elements() as u64, block.bytes() as u64);
    Type { id, name: block.name(), elements, bytes, kind: Kind::Block(block) }
}

const fn foreign(id: u32, name: &'static str, elements: u64, bytes: u64) -> Type {
    Type { id, name, elements, bytes, kind: Kind::Foreign }
}

/// All that files may hold: `ggml_type` of `ggml.h`.
static TYPES: [Type; 35] = [
    plain(0, "F32", 4, Dtype::F32),
    plain(1, "F16", 2, Dtype::F16),
    plain(30, "BF16", 2, Dtype::BF16),
    plain(28, "F64", 8, Dtype::F64),
    plain(24, "I8", 1, Dtype::I8),
    plain(25, "I16", 2, Dtype::I16),
    plain(26, "I32", 4, Dtype::I32),
    plain(27, "I64", 8, Dtype::I64),
    block(2, Block::Q4_0),
    block(3, Block::Q4_1),
    block(6, Block::Q5_0),
    block(7, Block::Q5_1),
    block(8, Block::Q8_0),
    block(10, Block::Q2K),
    block(11, Block::Q3K),
    block(12, Block::Q4K),
    block(13, Block::Q5K),
    block(14, Block::Q6K),
    block(20, Block::Iq4Nl),
    block(39, Block::Mxfp4),
    block(40, Block::Nvfp4),
    foreign(9, "Q8_1", 32, 36),
    foreign(15, "Q8_K", 256, 292),
    foreign(16, "IQ2_XXS", 256, 66),
    foreign(17, "IQ2_XS", 256, 74),
    foreign(18, "IQ3_XXS", 256, 98),
    foreign(19, "IQ1_S", 256, 50),
    foreign(21, "IQ3_S", 256, 110),
    foreign(22, "IQ2_S", 256, 82),
    foreign(23, "IQ4_XS", 256, 136),
    foreign(29, "IQ1_M", 256, 56),
    foreign(34, "TQ1_0", 256, 54),
    foreign(35, "TQ2_0", 256, 66),
    foreign(41, "Q1_0", 128, 18),
    foreign(42, "Q2_0", 64, 18),
];

impl Type {
    /// The type of that number.
    pub(crate) fn of_id(id: u32) -> Option<&'static Type> {
        TYPES.iter().find(|found| found.id == id)
    }

    /// The type of blocks.
    pub(crate) fn of_block(block: Block) -> &'static Type {
        let at = TYPES.iter().position(|found| found.kind == Kind::Block(block));
        // Each has one: the test below.
        &TYPES[at.unwrap_or_default()]
    }

    /// The blocks that it is of, if they are read and written here.
    pub fn block(&self) -> Option<Block> {
        match self.kind {
            Kind::Block(block) => Some(block),
            Kind::Plain(_) | Kind::Foreign => None,
        }
    }

    /// What elements of it are.
    pub(crate) fn element(&'static self) -> Element {
        match self.kind {
            Kind::Plain(dtype) => Element::Plain(dtype),
            Kind::Block(_) | Kind::Foreign => Element::Blocks(self),
        }
    }

    /// The type of elements; none where ggml has none.
    pub(crate) fn of_element(element: Element) -> Option<&'static Type> {
        match element {
            Element::Blocks(of) => Some(of),
            Element::Plain(dtype) => TYPES.iter().find(|found| found.kind == Kind::Plain(dtype)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_has_its_type() {
        for block in Block::ALL {
            assert_eq!(Type::of_block(block).block(), Some(block), "{}", block.name());
        }
    }
}
