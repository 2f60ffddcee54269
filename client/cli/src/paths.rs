//! Paths of a command line.

use std::path::{Path, PathBuf};

use crate::{args::FileArgs, failure::Failure};

/// Where a path leads. A file that is not there yet is known by its folder and its name.
fn known(path: &Path) -> PathBuf {
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

/// Refuses folders of which one lies within the other, and a report within either.
pub(crate) fn apart(files: &FileArgs, report: Option<&Path>) -> Result<(), Failure> {
    if !files.source.is_dir() {
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
