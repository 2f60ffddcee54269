//! What a server may touch: locations under prefixes that its operator names.

use std::path::{Path, PathBuf};

use super::{Disk, Location, Object, Stores};
use crate::error::CheckpointError;

/// Prefixes of URIs. Without any, nothing is allowed.
#[derive(Debug, Clone, Default)]
pub struct Allowed {
    prefixes: Vec<Location>,
    /// The flag that names more.
    flag: &'static str,
}

impl Allowed {
    /// URIs, or absolute paths of this machine, as `flag` names them.
    ///
    /// # Errors
    /// [`CheckpointError::Uri`] for what is neither; [`CheckpointError::Io`] for a path that is not there.
    pub fn new(prefixes: &[String], flag: &'static str, stores: &Stores) -> Result<Allowed, CheckpointError> {
        let prefixes = prefixes.iter().map(|prefix| {
            let location = stores.locate(Path::new(prefix))?;
            match location {
                Location::Disk(disk) => {
                    // Links in the operator's own path are the operator's.
                    let real = disk.path.canonicalize().map_err(CheckpointError::io("cannot allow", &disk.path))?;
                    Ok(Location::Disk(Disk { path: real, within: None }))
                }
                object @ Location::Object(_) => Ok(object),
            }
        });
        Ok(Allowed { prefixes: prefixes.collect::<Result<_, CheckpointError>>()?, flag })
    }

    /// The URI's location, if it is under a prefix: its name, and where it leads.
    ///
    /// # Errors
    /// [`CheckpointError::Uri`] for what is no URI; [`CheckpointError::NotAllowed`].
    pub fn locate(&self, uri: &str, stores: &Stores) -> Result<Location, CheckpointError> {
        let location = stores.uri(uri)?;
        let found = self.prefixes.iter().find_map(|prefix| within(&location, prefix));
        found.ok_or_else(|| CheckpointError::NotAllowed { uri: uri.to_owned(), flag: self.flag })
    }
}

/// The location bound to a prefix that it is under.
fn within(location: &Location, prefix: &Location) -> Option<Location> {
    match (location, prefix) {
        (Location::Disk(disk), Location::Disk(prefix)) => {
            let bound = Disk { path: disk.path.clone(), within: Some(PathBuf::clone(&prefix.path).into()) };
            bound.check().is_ok().then_some(Location::Disk(bound))
        }
        (Location::Object(object), Location::Object(prefix)) => {
            let is_under = object.root == prefix.root && object.key.prefix_matches(&prefix.key);
            is_under.then(|| Location::Object(Object::clone(object)))
        }
        _ => None,
    }
}
