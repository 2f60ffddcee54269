//! A file that is to appear: under its name when it is complete, and not before.

use std::{
    ffi::OsStr,
    fs::{self, File, Permissions},
    io,
    ops::Deref,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::Duration,
};

use serde_json::Value;
use tempfile::{Builder, NamedTempFile, env::temp_dir, tempfile, tempfile_in};
use tokio::{sync::watch, time::timeout};

use crate::{
    error::CheckpointError,
    storage::{Kind, Location},
};

/// Where a file is to appear.
#[derive(Debug, Clone)]
pub struct Target {
    location: Location,
    /// Where it is while it is made: a folder of the same file system. None for what is made elsewhere and sent.
    folder: Option<PathBuf>,
    replace: Replace,
    /// Whether it is all there is to make: then it is too late to stop.
    is_all: bool,
}

/// A file that is being written.
#[derive(Debug)]
pub(crate) enum Making {
    /// In its folder, and gone when this is dropped.
    Named(NamedTempFile),
    /// Anywhere on this machine: what is sent, or copied to where it belongs.
    Nameless(File),
}

impl Making {
    /// To write to.
    pub(crate) fn file(&mut self) -> &mut File {
        match self {
            Making::Named(file) => file.as_file_mut(),
            Making::Nameless(file) => file,
        }
    }
}

/// What to do with a file that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replace {
    /// It stays, and that is an error.
    Never,
    /// It is replaced, at the end, at once; a symbolic link is replaced, not followed.
    AtTheEnd,
}

impl Target {
    /// Looks whether a file can appear there: before any work is done for it.
    ///
    /// # Errors
    /// [`CheckpointError::Exists`]; [`CheckpointError::NoFile`] for a folder, a device or a pipe;
    /// [`CheckpointError::Io`] if its folder cannot be written to.
    pub fn new(location: &Location, replace: Replace) -> Result<Target, CheckpointError> {
        location.may_write()?;
        let path = location.shown();
        let is_name = path.file_name().is_some() && !location.says_folder();
        // A link that leads nowhere is there too.
        let is_link = |path: &Path| fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink());
        if replace == Replace::Never && location.path().is_some_and(is_link) {
            return Err(CheckpointError::Exists { path });
        }
        match location.kind() {
            Ok(Kind::Folder) => return Err(CheckpointError::NoFile { path, what: "a folder" }),
            Ok(Kind::Other) => return Err(CheckpointError::NoFile { path, what: "no regular file" }),
            Ok(Kind::File) if replace == Replace::Never => return Err(CheckpointError::Exists { path }),
            Ok(Kind::File) => {}
            Err(_) if !is_name => return Err(CheckpointError::NoFile { path, what: "no name of a file" }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(CheckpointError::Io { what: "cannot write", path, error }),
        }
        let target =
            Target { location: location.clone(), folder: location.path().map(folder_of), replace, is_all: true };
        target.nameless()?;
        Ok(target)
    }

    /// One of several files that are replaced if they are there. It is made in another folder, where that may be.
    pub(crate) fn one_of(location: &Location, made_in: &Location) -> Target {
        let folder = made_in.path().map(Path::to_owned);
        Target { location: location.clone(), folder, replace: Replace::AtTheEnd, is_all: false }
    }

    /// The file's path or URI, as it was given.
    pub fn path(&self) -> PathBuf {
        self.location.shown()
    }

    /// What tells the file that is there from any other.
    pub(crate) fn identity(&self) -> Result<Value, CheckpointError> {
        self.location.identity().map_err(self.writing())
    }

    /// The file itself, to read.
    pub(crate) fn location(&self) -> &Location {
        &self.location
    }

    /// Whether its folder is where it may be.
    fn check(&self) -> Result<(), CheckpointError> {
        self.location.check().map_err(self.writing())
    }

    /// A file that has no name, and is gone when it is dropped: in the same folder, or where this machine has its temporary ones.
    pub(crate) fn nameless(&self) -> Result<File, CheckpointError> {
        self.check()?;
        match &self.folder {
            Some(folder) => tempfile_in(folder).map_err(self.writing()),
            None => tempfile().map_err(CheckpointError::io("cannot make a temporary file in", temp_dir())),
        }
    }

    /// A file to write: dropped before it is [`complete`](Target::complete), it leaves nothing.
    pub(crate) fn begin(&self) -> Result<Making, CheckpointError> {
        let Some(folder) = &self.folder else { return self.nameless().map(Making::Nameless) };
        self.check()?;
        let file = Builder::new()
            // Shorter than many names, so that a long one does not become too long.
            .prefix(".quarrel.")
            .suffix(".partial")
            // As any file that is made: the umask decides.
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)
            .map_err(self.writing())?;
        Ok(Making::Named(file))
    }

    /// Gives a file its name that is written.
    pub(crate) fn complete(&self, making: Making, stop: &Stop) -> Result<(), CheckpointError> {
        let file = match making {
            Making::Nameless(file) => return self.send(&file, stop),
            Making::Named(file) => file,
        };
        file.as_file().sync_all().map_err(self.writing())?;
        if !self.may_go_on(stop) {
            return Err(self.writing()(io::ErrorKind::Interrupted.into()));
        }
        let path = self.path();
        self.check()?;
        self.name(file, &path)?;
        // The name too is to outlast a power cut. It is there by now: where nobody may read the folder, that must do.
        let _ = File::open(folder_of(&path)).and_then(|folder| folder.sync_all());
        Ok(())
    }

    /// Has `write` write the file, and gives it its name. Dropped or failed before that, it leaves nothing.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], `Interrupted` if `stop` was first; [`CheckpointError::Exists`] for a file that has
    /// appeared meanwhile; what `write` returns.
    pub fn write<T>(
        &self,
        stop: &Stop,
        write: impl FnOnce(&mut File) -> Result<T, CheckpointError>,
    ) -> Result<T, CheckpointError> {
        let mut making = self.begin()?;
        let written = write(making.file())?;
        self.complete(making, stop)?;
        Ok(written)
    }

    /// Sends a file to where another machine keeps it.
    fn send(&self, file: &File, stop: &Stop) -> Result<(), CheckpointError> {
        let sent = self.location.write(file, self.replace, stop, || self.may_go_on(stop));
        sent.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => CheckpointError::Exists { path: self.path() },
            _ => self.writing()(error),
        })
    }

    fn may_go_on(&self, stop: &Stop) -> bool {
        if self.is_all { stop.commit() } else { !stop.is_stopped() }
    }

    fn name(&self, file: NamedTempFile, path: &Path) -> Result<(), CheckpointError> {
        let named = match self.replace {
            Replace::AtTheEnd => file.persist(path),
            Replace::Never => file.persist_noclobber(path),
        };
        match named {
            Ok(_) => Ok(()),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
                Err(CheckpointError::Exists { path: path.to_owned() })
            }
            Err(error) => Err(self.writing()(error.error)),
        }
    }

    pub(crate) fn writing(&self) -> impl Fn(io::Error) -> CheckpointError {
        move |error| CheckpointError::io("cannot write", self.path())(error)
    }
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if folder.as_os_str() != OsStr::new("") => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Whether to stop, and whether it is too late for that: of the two, whoever is first.
#[derive(Debug, Default)]
pub struct Stop {
    state: AtomicU8,
    keeps: AtomicBool,
    /// Threads that may still be writing.
    held: watch::Sender<usize>,
}

/// A thread's own hold on a [`Stop`]: until it is dropped, something may be half-written.
#[derive(Debug)]
pub struct Held(Arc<Stop>);

impl Deref for Held {
    type Target = Stop;

    fn deref(&self) -> &Stop {
        &self.0
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.held.send_modify(|threads| *threads -= 1);
    }
}

/// Until those who were asked to stop have left nothing half-written.
const PATIENCE: Duration = Duration::from_secs(10);

const GOING: u8 = 0;
const STOPPED: u8 = 1;
const COMMITTED: u8 = 2;

impl Stop {
    /// Asks to stop; false if the file has its name, or is about to.
    pub fn stop(&self) -> bool {
        self.settle(STOPPED)
    }

    /// For a thread that writes: whoever stops it can wait until it is gone.
    #[must_use]
    pub fn hold(self: &Arc<Stop>) -> Held {
        self.held.send_modify(|threads| *threads += 1);
        Held(Arc::clone(self))
    }

    /// Waits until no thread holds it, but not for one that does not come back.
    pub async fn released(&self) {
        let mut held = self.held.subscribe();
        let _ = timeout(PATIENCE, held.wait_for(|threads| *threads == 0)).await;
    }

    /// Whether somebody asked.
    pub fn is_stopped(&self) -> bool {
        self.state.load(Ordering::Acquire) == STOPPED
    }

    /// An error once somebody asked.
    pub(crate) fn check(&self) -> Result<(), CheckpointError> {
        if self.is_stopped() { Err(CheckpointError::stopped()) } else { Ok(()) }
    }

    /// What is done by now stays, for another run to go on from.
    pub(crate) fn keep(&self) {
        self.keeps.store(true, Ordering::Release);
    }

    /// Whether it is so.
    pub fn keeps(&self) -> bool {
        self.keeps.load(Ordering::Acquire)
    }

    /// From here on it is too late; false if somebody asked before.
    pub(crate) fn commit(&self) -> bool {
        self.settle(COMMITTED)
    }

    fn settle(&self, to: u8) -> bool {
        match self.state.compare_exchange(GOING, to, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(now) => now == to,
        }
    }
}
