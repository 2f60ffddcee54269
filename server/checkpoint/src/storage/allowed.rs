//! What a server may touch: locations under prefixes that its operator names.

use std::path::{Path, PathBuf};

use object_store::path::Path as Key;

use super::{
    Disk, Location, Stores,
    uri::{Uri, What, is_uri, shortened},
};
use crate::error::CheckpointError;

/// Prefixes of URIs. Without any, nothing is allowed.
#[derive(Debug, Clone, Default)]
pub struct Allowed {
    prefixes: Vec<Prefix>,
    /// The flag that names more.
    flag: &'static str,
}

#[derive(Debug, Clone)]
enum Prefix {
    Disk(PathBuf),
    Object(String, Key),
}

impl Allowed {
    /// URIs, or absolute paths of this machine, as `flag` names them. Nothing is connected to.
    ///
    /// # Errors
    /// [`CheckpointError::Uri`] for what is neither; [`CheckpointError::Io`] for a path that is not there.
    pub fn new(prefixes: &[String], flag: &'static str) -> Result<Allowed, CheckpointError> {
        // A variable that is set to nothing is not set.
        let prefixes = prefixes.iter().filter(|prefix| !prefix.is_empty()).map(|prefix| {
            let path = match is_uri(prefix) {
                true => match Uri::parse(prefix)?.what {
                    What::Object { root, key, .. } => return Ok(Prefix::Object(root, key)),
                    What::Disk(path) => path,
                },
                false => PathBuf::from(prefix),
            };
            if !path.is_absolute() {
                let detail = format!("expected a URI or an absolute path after `{flag}`");
                return Err(CheckpointError::Uri { uri: prefix.clone(), detail });
            }
            // Links in the operator's own path are the operator's.
            Ok(Prefix::Disk(path.canonicalize().map_err(CheckpointError::io("cannot allow", &path))?))
        });
        Ok(Allowed { prefixes: prefixes.collect::<Result<_, CheckpointError>>()?, flag })
    }

    /// The URI's location, if it is under a prefix: its name, and where it leads.
    ///
    /// # Errors
    /// [`CheckpointError::Uri`] for what is no URI; [`CheckpointError::NotAllowed`].
    pub fn locate(&self, uri: &str, stores: &Stores) -> Result<Location, CheckpointError> {
        let parsed = Uri::parse(uri)?;
        let not_allowed = || CheckpointError::NotAllowed { uri: shortened(uri), flag: self.flag };
        match &parsed.what {
            What::Disk(path) => {
                let found = self.prefixes.iter().find_map(|prefix| within(path, prefix));
                found.ok_or_else(not_allowed)
            }
            What::Object { root, key, .. } => {
                let is_under = |prefix: &Prefix| matches!(prefix, Prefix::Object(of, prefix) if of == root && key.prefix_matches(prefix));
                // Only now is anything made of it.
                if self.prefixes.iter().any(is_under) { stores.open(parsed) } else { Err(not_allowed()) }
            }
        }
    }
}

/// The path bound to a prefix that it is under.
fn within(path: &Path, prefix: &Prefix) -> Option<Location> {
    let Prefix::Disk(prefix) = prefix else { return None };
    let bound = Disk { path: path.to_owned(), within: Some(prefix.clone().into()) };
    bound.check().is_ok().then_some(Location::Disk(bound))
}
