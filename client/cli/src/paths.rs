//! Paths of a command line.

use std::path::{Path, PathBuf};

use quarrel_checkpoint::{CheckpointError, Location, Stores, is_uri};
use quarrel_flight::Config;

use crate::{args::FileArgs, failure::Failure, served::blocking};

/// Where a path leads. A file that is not there yet is known by its folder and its name.
fn known(path: &Path) -> PathBuf {
    if let Some(uri) = path.to_str().filter(|text| is_uri(text)) {
        let file = uri.strip_prefix("file://").map(Path::new);
        return file.map_or_else(|| PathBuf::from(uri.trim_end_matches('/')), known);
    }
    let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
    let named = || Some(folder.canonicalize().ok()?.join(path.file_name()?));
    path.canonicalize().ok().or_else(named).unwrap_or_else(|| path.to_owned())
}

/// Refuses one file in two roles.
pub(crate) fn different(paths: &[&Path]) -> Result<(), Failure> {
    let same = |a: &Path, b: &Path| known(a) == known(b);
    for (at, path) in paths.iter().enumerate() {
        if paths[at + 1..].iter().any(|other| same(path, other)) {
            let sentence = format!("`{}` is named twice on the command line, in two roles", path.display());
            return Err(Failure::usage(sentence, "Choose another name."));
        }
    }
    Ok(())
}

/// Source and destination of a job.
pub(crate) struct Ends {
    pub(crate) stores: Stores,
    pub(crate) source: Location,
    pub(crate) destination: Location,
    /// Whether the source is one; one that is not there is none.
    pub(crate) is_folder: bool,
}

impl Ends {
    pub(crate) async fn of(files: &FileArgs) -> Result<Ends, Failure> {
        let stores = stores();
        let (source, destination) = (stores.locate(&files.source)?, stores.locate(&files.destination)?);
        let is_folder = is_folder(&source).await?;
        Ok(Ends { stores, source, destination, is_folder })
    }

    /// Refuses folders of which one lies within the other, and a report within either.
    pub(crate) fn apart(&self, files: &FileArgs, report: Option<&Path>) -> Result<(), Failure> {
        if !self.is_folder {
            return Ok(());
        }
        let (source, destination) = (known(&files.source), known(&files.destination));
        let within = |inner: &Path, outer: &Path| {
            let sentence = format!("`{}` is within `{}`", inner.display(), outer.display());
            Err(Failure::usage(sentence, "Choose another name."))
        };
        match report.map(known) {
            _ if destination.starts_with(&source) => within(&files.destination, &files.source),
            _ if source.starts_with(&destination) => within(&files.source, &files.destination),
            Some(path) if path.starts_with(&source) => within(&path, &files.source),
            Some(path) if path.starts_with(&destination) => within(&path, &files.destination),
            _ => Ok(()),
        }
    }
}

/// The object stores of the environment.
pub(crate) fn stores() -> Stores {
    Stores::new(Config::variables())
}

/// Whether it is a folder; what is not there is none.
pub(crate) async fn is_folder(location: &Location) -> Result<bool, Failure> {
    let location = location.clone();
    let found = blocking(move || match location.is_folder() {
        // What else is wrong with it is said when it is opened.
        Err(CheckpointError::Io { .. }) if location.path().is_some() => Ok(false),
        found => found,
    });
    found.await
}
