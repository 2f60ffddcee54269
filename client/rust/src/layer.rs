//! Layers to send: a name, a shape, an element type, and bytes that are there or can be read.

use std::{fmt, io, ops::Range, str::FromStr, sync::Arc};

use bytes::Bytes;

/// An element type, by the contract's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE binary64; rounded once to f32 on arrival.
    F64,
    /// `float8_e4m3fn`.
    F8E4m3,
    /// `float8_e5m2`.
    F8E5m2,
}

/// A word that names no element type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no element type: expected f32, f16, bf16, f64, f8_e4m3 or f8_e5m2")]
pub struct DtypeError(String);

impl Dtype {
    /// The contract's word.
    pub const fn word(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
            Dtype::F64 => "f64",
            Dtype::F8E4m3 => "f8_e4m3",
            Dtype::F8E5m2 => "f8_e5m2",
        }
    }

    /// Bytes of an element.
    pub const fn bytes(self) -> u64 {
        match self {
            Dtype::F8E4m3 | Dtype::F8E5m2 => 1,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::F32 => 4,
            Dtype::F64 => 8,
        }
    }
}

impl FromStr for Dtype {
    type Err = DtypeError;

    fn from_str(word: &str) -> Result<Dtype, DtypeError> {
        let all = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::F64, Dtype::F8E4m3, Dtype::F8E5m2];
        all.into_iter().find(|dtype| dtype.word() == word).ok_or_else(|| DtypeError(word.to_owned()))
    }
}

/// Reads a range of a layer's bytes. It may block: it is called on a thread for that.
pub(crate) type Read = Arc<dyn Fn(Range<u64>) -> io::Result<Bytes> + Send + Sync>;

#[derive(Clone)]
pub(crate) enum Source {
    Here(Bytes),
    There(Read),
}

/// One weight tensor: row-major, little-endian.
#[derive(Debug, Clone)]
pub struct Layer {
    pub(crate) name: Arc<str>,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Arc<[u64]>,
    pub(crate) source: Source,
}

impl Layer {
    /// A layer whose bytes are in memory; they are not copied when they come as `Bytes`.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl AsRef<[u64]>, bytes: impl Into<Bytes>) -> Layer {
        Layer { name: name.into().into(), dtype, shape: shape.as_ref().into(), source: Source::Here(bytes.into()) }
    }

    /// A layer whose bytes are read run by run when their turn comes, and again if they must be sent again. `read` is
    /// given a range of the layer's bytes and returns exactly those.
    pub fn lazy(
        name: impl Into<String>,
        dtype: Dtype,
        shape: impl AsRef<[u64]>,
        read: impl Fn(Range<u64>) -> io::Result<Bytes> + Send + Sync + 'static,
    ) -> Layer {
        Layer { name: name.into().into(), dtype, shape: shape.as_ref().into(), source: Source::There(Arc::new(read)) }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Its shape.
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }
}

impl Source {
    /// The bytes of `range`, if they can be had without blocking.
    pub(crate) fn here(&self, range: Range<u64>) -> Option<Bytes> {
        match self {
            Source::Here(bytes) => Some(bytes.slice(range.start as usize..range.end as usize)),
            Source::There(_) => None,
        }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Here(bytes) => write!(f, "{} bytes", bytes.len()),
            Source::There(_) => f.write_str("a reader"),
        }
    }
}
