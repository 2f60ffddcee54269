//! What can be wrong with a checkpoint.

use std::{io, path::PathBuf};

use quarrel_proto::Reason;

/// Why a checkpoint cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The system's word.
    #[error("{what} `{}`: {error}", path.display())]
    Io {
        /// What was tried: `cannot read`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// Not a file of safetensors, or a damaged one.
    #[error("`{}` is no safetensors file: {detail}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A command that cannot be carried out on a checkpoint.
    #[error("{message}")]
    Command {
        /// The contract's word.
        reason: Reason,
        /// What is wrong, and what was expected.
        message: String,
    },
    /// A quantized module that cannot be understood.
    #[error("layer `{module}`: {detail}")]
    Module {
        /// Its name.
        module: String,
        /// What is wrong with it, and what was expected.
        detail: String,
    },
    /// Two tensors of one name would be written.
    #[error("tensor `{name}` would be written twice: it is in the source, and what a quantized layer becomes")]
    Twice {
        /// Its name.
        name: String,
    },
    /// What is no regular file.
    #[error("`{}` is {what}: expected a file, or a name where none is yet", path.display())]
    NoFile {
        /// What it is called.
        path: PathBuf,
        /// What it is: `a folder`.
        what: &'static str,
    },
    /// The destination is there.
    #[error("`{}` exists", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
}

impl CheckpointError {
    /// For `map_err` over something that was tried with a file.
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> CheckpointError {
        let path = path.into();
        move |error| CheckpointError::Io { what, path, error }
    }
}
