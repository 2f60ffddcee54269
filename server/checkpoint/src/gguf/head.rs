//! The head of a GGUF file to write.

use std::cmp::Ordering;

use super::{
    metadata::{Metadata, put_text},
    read::{DIMENSIONS_MAX, MAGIC, NAME_BYTES_MAX},
    types::Type,
};
use crate::stored::Entry;

/// Where tensors begin, unless a file says otherwise. Ours do not: llama.cpp's own tool keeps what its source says, and aligns otherwise.
pub(crate) const ALIGNMENT: u64 = 32;
const VERSION: u32 = 3;

/// What a file says beside its tensors.
#[derive(Debug, Clone)]
pub(crate) struct Head {
    pub(crate) metadata: Metadata,
}

impl Head {
    /// The bytes before the first tensor, of tensors in their order.
    ///
    /// # Errors
    /// What no such file can hold, as a sentence.
    pub(crate) fn bytes<'a>(
        &self,
        tensors: impl ExactSizeIterator<Item = (&'a Entry, u64)>,
    ) -> Result<Vec<u8>, String> {
        let mut head = Vec::from(MAGIC);
        head.extend(VERSION.to_le_bytes());
        head.extend((tensors.len() as u64).to_le_bytes());
        head.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in self.metadata.iter() {
            put_text(&mut head, key);
            head.extend(value.kind.to_le_bytes());
            head.extend(&value.bytes);
        }
        let mut offset = 0;
        for ((name, element, shape), bytes) in tensors {
            let of =
                Type::of_element(*element).ok_or_else(|| format!("tensor `{name}`: GGUF has no type {element}"))?;
            if name.len() > NAME_BYTES_MAX || shape.len() > DIMENSIONS_MAX as usize {
                return Err(format!(
                    "tensor `{name}` of shape {shape:?}: GGUF has names of at most {NAME_BYTES_MAX} bytes and {DIMENSIONS_MAX} dimensions"
                ));
            }
            if element.bytes(shape) != Some(bytes) {
                return Err(format!("tensor `{name}` of {element} {shape:?} has {bytes} bytes"));
            }
            put_text(&mut head, name);
            // The last ones that are 1 are not said, as llama.cpp has it.
            let first =
                shape.iter().take(shape.len().saturating_sub(1)).take_while(|dimension| **dimension == 1).count();
            let dimensions = &shape[first..];
            head.extend((dimensions.len().max(1) as u32).to_le_bytes());
            if dimensions.is_empty() {
                head.extend(1u64.to_le_bytes());
            }
            dimensions.iter().rev().for_each(|dimension| head.extend(dimension.to_le_bytes()));
            head.extend(of.id.to_le_bytes());
            head.extend(u64::to_le_bytes(offset));
            offset = (offset + bytes).next_multiple_of(ALIGNMENT);
        }
        head.resize(head.len().next_multiple_of(ALIGNMENT as usize), 0);
        Ok(head)
    }
}

/// The order that llama.cpp writes tensors in: those of no block, then block by block, each by name.
pub(crate) fn natural(one: &str, other: &str) -> Ordering {
    block(one).cmp(&block(other)).then_with(|| one.cmp(other))
}

/// The number of a block, as `sscanf` reads `blk.%d.`: digits behind white space, whatever follows; -1 of what is none.
fn block(name: &str) -> i64 {
    let Some(rest) = name.strip_prefix("blk.").map(str::trim_ascii_start) else { return -1 };
    let digits = rest.len() - rest.trim_start_matches(|letter: char| letter.is_ascii_digit()).len();
    rest[..digits].parse().unwrap_or(-1)
}
