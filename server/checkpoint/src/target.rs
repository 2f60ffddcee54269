//! A file that is to appear: under its name when it is complete, and not before.

use std::{
    ffi::OsStr,
    fs::{self, File, Permissions},
    io,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU8, Ordering},
};

use tempfile::{Builder, NamedTempFile, tempfile_in};

use crate::error::CheckpointError;

/// Where a file is to appear.
#[derive(Debug, Clone)]
pub struct Target {
    path: PathBuf,
    /// Where it is while it is made: a folder of the same file system.
    folder: PathBuf,
    replace: Replace,
    /// Whether it is all there is to make: then it is too late to stop.
    is_all: bool,
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
    pub fn new(path: impl AsRef<Path>, replace: Replace) -> Result<Target, CheckpointError> {
        let path = path.as_ref().to_owned();
        let is_name = path.file_name().is_some() && !path.as_os_str().as_bytes().ends_with(b"/");
        // A link that leads nowhere is there too.
        if replace == Replace::Never && fs::symlink_metadata(&path).is_ok_and(|found| found.is_symlink()) {
            return Err(CheckpointError::Exists { path });
        }
        match fs::metadata(&path) {
            Ok(found) if found.is_dir() => return Err(CheckpointError::NoFile { path, what: "a folder" }),
            Ok(found) if !found.is_file() => return Err(CheckpointError::NoFile { path, what: "no regular file" }),
            Ok(_) if replace == Replace::Never => return Err(CheckpointError::Exists { path }),
            Ok(_) => {}
            Err(_) if !is_name => return Err(CheckpointError::NoFile { path, what: "no name of a file" }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(CheckpointError::Io { what: "cannot write", path, error }),
        }
        let folder = match path.parent() {
            Some(folder) if folder.as_os_str() != OsStr::new("") => folder.to_owned(),
            _ => PathBuf::from("."),
        };
        let target = Target { path, folder, replace, is_all: true };
        target.nameless()?;
        Ok(target)
    }

    /// The same as one of several, made in another folder.
    pub(crate) fn by_way_of(self, folder: &Path) -> Target {
        Target { folder: folder.to_owned(), is_all: false, ..self }
    }

    /// The file's path, as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in the same folder that has no name, and is gone when it is dropped.
    pub(crate) fn nameless(&self) -> Result<File, CheckpointError> {
        tempfile_in(&self.folder).map_err(self.writing())
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
        let mut file = Builder::new()
            // Shorter than many names, so that a long one does not become too long.
            .prefix(".quarrel.")
            .suffix(".partial")
            // As any file that is made: the umask decides.
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(&self.folder)
            .map_err(self.writing())?;
        let written = write(file.as_file_mut())?;
        file.as_file().sync_all().map_err(self.writing())?;
        let may_go_on = if self.is_all { stop.commit() } else { !stop.is_stopped() };
        if !may_go_on {
            return Err(self.writing()(io::ErrorKind::Interrupted.into()));
        }
        self.name(file)?;
        // The name too is to outlast a power cut. It is there by now: where nobody may read the folder, that must do.
        if let Some(folder) = self.path.parent() {
            let folder = if folder == Path::new("") { Path::new(".") } else { folder };
            let _ = File::open(folder).and_then(|folder| folder.sync_all());
        }
        Ok(written)
    }

    fn name(&self, file: NamedTempFile) -> Result<(), CheckpointError> {
        let named = match self.replace {
            Replace::AtTheEnd => file.persist(&self.path),
            Replace::Never => file.persist_noclobber(&self.path),
        };
        match named {
            Ok(_) => Ok(()),
            Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
                Err(CheckpointError::Exists { path: self.path.clone() })
            }
            Err(error) => Err(self.writing()(error.error)),
        }
    }

    pub(crate) fn writing(&self) -> impl Fn(io::Error) -> CheckpointError {
        move |error| CheckpointError::Io { what: "cannot write", path: self.path.clone(), error }
    }
}

/// Whether to stop, and whether it is too late for that: of the two, whoever is first.
#[derive(Debug, Default)]
pub struct Stop {
    state: AtomicU8,
    keeps: AtomicBool,
}

const GOING: u8 = 0;
const STOPPED: u8 = 1;
const COMMITTED: u8 = 2;

impl Stop {
    /// Asks to stop; false if the file has its name, or is about to.
    pub fn stop(&self) -> bool {
        self.settle(STOPPED)
    }

    /// Whether somebody asked.
    pub fn is_stopped(&self) -> bool {
        self.state.load(Ordering::Acquire) == STOPPED
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
