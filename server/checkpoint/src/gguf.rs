//! GGUF, the files of llama.cpp: `read` their head, `metadata` is what it says beside tensors, `head` writes one again, `llama` and `tokenizer` make it of what
//! transformers saves, `types` are those of their tensors, `mix` says which
//! of them gets which.
//!
//! Source: `ggml/src/gguf.cpp` of llama.cpp as of PyPI's llama-cpp-python 0.3.36, version 3 of the format (and 2, which is the same).

mod head;
pub(crate) mod llama;
mod metadata;
mod mix;
mod read;
mod shapes;
pub(crate) mod tokenizer;
mod types;

pub(crate) use self::head::{ALIGNMENT, Head, natural};
pub(crate) use self::metadata::Metadata;
pub use self::mix::mixes;
pub(crate) use self::mix::{Facts, Mix};
pub(crate) use self::read::{ALIGNMENT_KEY, Found, MAGIC, Wrong, read};
pub(crate) use self::shapes::{Shapes, shapes};
pub use self::types::Type;
