//! The end of a file: written on a thread that may block, and stopped with the verb.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use quarrel_checkpoint::{Replace, Sink, Stop, Target};

use crate::{args::FileArgs, failure::Failure, progress::Progress};

/// Writes the file; its bytes. Stopped before its end, it leaves nothing behind: the runtime waits for the thread.
pub(crate) async fn seal(
    sink: Sink,
    metadata: BTreeMap<String, String>,
    progress: &Progress,
    stop: &Arc<Stop>,
) -> Result<u64, Failure> {
    progress.say("writing the file");
    let stop = Arc::clone(stop);
    let sealed = tokio::task::spawn_blocking(move || sink.seal(&metadata, &stop)).await;
    Ok(sealed.map_err(|error| Failure::ours(error.to_string()))??)
}

/// The file to write.
pub(crate) fn target(files: &FileArgs, path: &Path) -> Result<Target, Failure> {
    let replace = if files.force { Replace::AtTheEnd } else { Replace::Never };
    Ok(Target::new(path, replace)?)
}

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
