//! The end of a file: written on a thread that may block, and stopped with the verb.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use quarrel_checkpoint::{Replace, Sink};

use crate::{args::FileArgs, failure::Failure, progress::Progress};

/// Tells the thread that seals that nobody waits for it any more.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writes the file; its bytes. Dropped before its end, it leaves nothing behind: the runtime waits for the thread.
pub(crate) async fn seal(sink: Sink, metadata: BTreeMap<String, String>, progress: &Progress) -> Result<u64, Failure> {
    progress.say("writing the file");
    let stop = StopOnDrop(Arc::default());
    let stopped = Arc::clone(&stop.0);
    let sealed = tokio::task::spawn_blocking(move || sink.seal(&metadata, &stopped)).await;
    Ok(sealed.map_err(|error| Failure::ours(error.to_string()))??)
}

/// Whether a file that is there may be replaced.
pub(crate) fn replace(files: &FileArgs) -> Replace {
    if files.force { Replace::AtTheEnd } else { Replace::Never }
}

/// Refuses to read and write one file.
pub(crate) fn different<const N: usize>(paths: [&Path; N]) -> Result<(), Failure> {
    let same = |a: &Path, b: &Path| a == b || a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b));
    for (at, path) in paths.iter().enumerate() {
        if paths[at + 1..].iter().any(|other| same(path, other)) {
            let sentence = format!("`{}` would be two files at once", path.display());
            return Err(Failure::usage(sentence, "Choose another name."));
        }
    }
    Ok(())
}
