//! What a file's own metadata says of its quantized modules.

use std::collections::BTreeMap;

use quarrel_engine::{Scheme, SchemeError};

use crate::{SCHEMES_KEY, error::CheckpointError, source::Source};

/// A file's metadata with the schemes of its modules, by name: those that were quantized before and now.
pub(crate) fn with_schemes(
    mut metadata: BTreeMap<String, String>,
    modules: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let mut schemes = BTreeMap::<&str, Vec<&str>>::new();
    for (module, scheme) in modules {
        schemes.entry(scheme).or_default().push(module);
    }
    if !schemes.is_empty() {
        metadata.insert(SCHEMES_KEY.to_owned(), serde_json::json!(schemes).to_string());
    }
    metadata
}

/// The schemes of modules that were quantized before, by name.
///
/// # Errors
/// [`CheckpointError::Malformed`] if the file's metadata on them cannot be read.
pub(crate) fn known_schemes(source: &Source) -> Result<BTreeMap<String, String>, CheckpointError> {
    Ok(said(source)?.into_iter().map(|(module, scheme)| (module, scheme.to_string())).collect())
}

/// What the file's own metadata says of its modules.
pub(crate) fn said(source: &Source) -> Result<BTreeMap<String, Scheme>, CheckpointError> {
    let text = source.metadata().get(SCHEMES_KEY).filter(|_| source.gguf().is_none());
    let Some(text) = text else { return Ok(BTreeMap::new()) };
    let found: BTreeMap<String, Vec<String>> =
        serde_json::from_str(text).map_err(|error| metadata_error(source, &error.to_string()))?;
    let mut schemes = BTreeMap::new();
    for (scheme, modules) in found {
        let scheme: Scheme = scheme.parse().map_err(|error: SchemeError| metadata_error(source, &error.to_string()))?;
        schemes.extend(modules.into_iter().map(|module| (module, scheme)));
    }
    Ok(schemes)
}

fn metadata_error(source: &Source, detail: &str) -> CheckpointError {
    let detail = format!("its metadata `{SCHEMES_KEY}` cannot be read: {detail}");
    CheckpointError::Malformed { path: source.path().to_owned(), detail }
}
