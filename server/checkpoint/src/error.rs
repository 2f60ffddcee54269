//! What can be wrong with a checkpoint.

use std::{io, path::PathBuf};

use quarrel_engine::{LayerError, Note};
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
    /// The same of a tensor.
    #[error("layer `{layer}` cannot be read from `{}`: {error}", path.display())]
    Read {
        /// The tensor.
        layer: String,
        /// The file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// What is no URI of a store that we know, or cannot be one.
    #[error("`{uri}`: {detail}")]
    Uri {
        /// The URI, without secrets.
        uri: String,
        /// What is wrong with it, and what was expected.
        detail: String,
    },
    /// The destination is the source, or one lies within the other.
    #[error("`{}` and `{}` are one place, or one is within the other", source_at.display(), destination.display())]
    Overlap {
        /// Path or URI.
        source_at: PathBuf,
        /// Path or URI.
        destination: PathBuf,
    },
    /// What the operator of a server does not allow.
    #[error("`{uri}` is not under a prefix of `{flag}`")]
    NotAllowed {
        /// The URI.
        uri: String,
        /// Where prefixes are named.
        flag: &'static str,
    },
    /// Not a file of safetensors, or a damaged one.
    #[error("`{}` is no safetensors file: {detail}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// Not a GGUF file that can be read, or a damaged one.
    #[error("`{}` is no GGUF file that can be read: {detail}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// Not a file of columns, or a damaged one.
    #[error("`{}` is no {format} that can be read: {detail}", path.display())]
    Columns {
        /// The file.
        path: PathBuf,
        /// What was expected.
        format: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// No model, or a damaged one.
    #[error("`{}`: {detail}", path.display())]
    Model {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and what was expected.
        detail: String,
    },
    /// What a model of several files is written to is no folder.
    #[error("`{}` is a file: expected a folder, as the source is one", path.display())]
    NoFolder {
        /// What it is called.
        path: PathBuf,
    },
    /// The folder holds a part of another job.
    #[error("`{}` was begun by another job: {what} differs", path.display())]
    JobChanged {
        /// The folder.
        path: PathBuf,
        /// What is not the same.
        what: String,
    },
    /// Another process writes to the folder.
    #[error("`{}` is being written by another process", path.display())]
    JobRuns {
        /// The folder.
        path: PathBuf,
    },
    /// A layer is worse than what was asked for.
    #[error("layer `{layer}` has {detail}")]
    Gate {
        /// The worst layer.
        layer: String,
        /// Its quality, and what was expected.
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
    /// A layer that cannot be quantized.
    #[error("{message}")]
    Layer {
        /// The contract's word.
        reason: Reason,
        /// The layer, the value, and what was expected.
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
    /// A layer that is quantized in a layout of others.
    #[error(
        "layer `{module}`: it is quantized in a layout that this version does not read (`{mark}`){}",
        foreign(mark)
    )]
    Foreign {
        /// Its name.
        module: String,
        /// The tensor that tells it.
        mark: &'static str,
    },
    /// A bug.
    #[error("{0}")]
    Ours(String),
    /// There is nothing to dequantize.
    #[error("`{}` has no quantized layers", path.display())]
    NothingQuantized {
        /// The file or folder.
        path: PathBuf,
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

/// What is wrong with a module, or that it cannot be read.
#[derive(Debug)]
pub(crate) enum Wrong {
    Said(String),
    Unread(CheckpointError),
}

impl Wrong {
    /// Of a module.
    pub(crate) fn of(self, module: &str) -> CheckpointError {
        match self {
            Wrong::Said(detail) => CheckpointError::Module { module: module.to_owned(), detail },
            Wrong::Unread(error) => error,
        }
    }
}

impl From<&str> for Wrong {
    fn from(detail: &str) -> Wrong {
        Wrong::Said(detail.to_owned())
    }
}

impl From<String> for Wrong {
    fn from(detail: String) -> Wrong {
        Wrong::Said(detail)
    }
}

impl From<CheckpointError> for Wrong {
    fn from(error: CheckpointError) -> Wrong {
        Wrong::Unread(error)
    }
}

impl From<LayerError> for CheckpointError {
    fn from(LayerError(Note { reason, message }): LayerError) -> CheckpointError {
        CheckpointError::Layer { reason, message }
    }
}

/// What is read of such layouts.
fn foreign(mark: &str) -> &'static str {
    match mark {
        mark if mark.starts_with(char::is_uppercase) => ": of GGUF's types those that `quarrel schemes` lists",
        _ => "; of GPTQ and AWQ it reads folders whose config.json says so",
    }
}

impl CheckpointError {
    /// Somebody asked to stop.
    pub fn stopped() -> CheckpointError {
        CheckpointError::Io { what: "stopped", path: PathBuf::new(), error: io::ErrorKind::Interrupted.into() }
    }

    /// For `map_err` over something that was tried with a file. What is read may be computed on the way: then the fault is its source's.
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> CheckpointError {
        let path = path.into();
        move |error| error.downcast().unwrap_or_else(|error| CheckpointError::Io { what, path, error })
    }
}
