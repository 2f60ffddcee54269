//! Paths of a command line.

use std::path::Path;

use crate::failure::Failure;

/// Refuses one file in two roles.
pub(crate) fn different(paths: &[&Path]) -> Result<(), Failure> {
    // A file that is not there yet is known by its folder and its name.
    let known = |path: &Path| {
        let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
        let named = || Some(folder.canonicalize().ok()?.join(path.file_name()?));
        path.canonicalize().ok().or_else(named).unwrap_or_else(|| path.to_owned())
    };
    let same = |a: &Path, b: &Path| known(a) == known(b);
    for (at, path) in paths.iter().enumerate() {
        if paths[at + 1..].iter().any(|other| same(path, other)) {
            let sentence = format!("`{}` is named twice on the command line, in two roles", path.display());
            return Err(Failure::usage(sentence, "Choose another name."));
        }
    }
    Ok(())
}
