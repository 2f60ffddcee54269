//! What a model has beside its layers.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{
    columns::is_columns,
    error::CheckpointError,
    model::{CONFIG, REPORT, config, is_weights},
    storage::{Kind, Location},
};

/// What a model has beside its layers.
#[derive(Debug, Default)]
pub struct Beside {
    /// Of `config.json`, without the quantization.
    pub config: Map<String, Value>,
    /// Files to copy, by name: of a folder.
    pub(crate) others: Vec<(String, Location)>,
}

impl Beside {
    /// A configuration alone.
    pub fn of(config: Map<String, Value>) -> Beside {
        Beside { config, others: Vec::new() }
    }

    /// What a folder of columns has beside them that a model is to have too: its configuration, and files that hold no weights.
    ///
    /// # Errors
    /// [`CheckpointError::Io`]; [`CheckpointError::Model`] for a `config.json` that is none.
    pub(crate) fn columns(location: &Location) -> Result<Beside, CheckpointError> {
        let mut beside = Beside::default();
        if location.kind().map_err(CheckpointError::io("cannot open", location.shown()))? != Kind::Folder {
            return Ok(beside);
        }
        for name in location.names().map_err(CheckpointError::io("cannot read", location.shown()))? {
            let file = location.join(Path::new(&name));
            // Hidden as those of other tools: marks, checksums, their own metadata.
            let is_hidden = name.starts_with(['.', '_']);
            let is_of_weights = is_weights(Path::new(&name)) || name.ends_with(".index.json") || name == REPORT;
            let is_left_out = is_hidden || is_columns(&file) || is_of_weights;
            if name == CONFIG {
                beside.config = config(location)?;
            } else if !is_left_out
                && file.kind().map_err(CheckpointError::io("cannot open", file.shown()))? == Kind::File
            {
                beside.others.push((name, file));
            }
        }
        Ok(beside)
    }
}
