//! This machine's disk.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::UNIX_EPOCH,
};

use bytes::Bytes;
use serde_json::{Value, json};

use crate::{
    storage::{Kind, Opened},
    target::Stop,
};

/// Bytes that are copied between two looks at whether to stop.
const STEP_BYTES: u64 = 64 << 20;

/// A path.
#[derive(Debug, Clone)]
pub struct Disk {
    pub(super) path: PathBuf,
    /// The folder, without links, that nothing may lead out of.
    pub(super) within: Option<Arc<PathBuf>>,
}

impl Disk {
    pub(super) fn join(&self, name: &Path) -> Disk {
        Disk { path: self.path.join(name), within: self.within.clone() }
    }

    /// Whether the path, links followed, stays where it must.
    pub(super) fn check(&self) -> io::Result<()> {
        let Some(within) = &self.within else { return Ok(()) };
        // Of what is not there yet, the folder that is; a link that leads nowhere is there.
        let there = self.path.ancestors().find(|path| path.symlink_metadata().is_ok()).unwrap_or(Path::new("/"));
        let rest = self.path.strip_prefix(there).unwrap_or(Path::new(""));
        let is_plain = rest.components().all(|part| matches!(part, Component::Normal(_)));
        match there.canonicalize() {
            Ok(real) if is_plain && real.join(rest).starts_with(&**within) => Ok(()),
            Ok(_) => Err(outside()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(outside()),
            Err(error) => Err(error),
        }
    }

    /// The path without links, as far as it is there.
    pub(super) fn real(&self) -> PathBuf {
        let path = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        let found = path.ancestors().find_map(|there| Some((there, there.canonicalize().ok()?)));
        let rest = |there: &Path| path.strip_prefix(there).map(Path::to_owned).unwrap_or_default();
        found.map_or_else(|| path.clone(), |(there, real)| real.join(rest(there)))
    }

    pub(super) fn make_folder(&self) -> io::Result<()> {
        self.check()?;
        fs::create_dir_all(&self.path)
    }

    pub(super) fn remove(&self) -> io::Result<()> {
        self.check()?;
        fs::remove_file(&self.path)
    }

    pub(super) fn kind(&self) -> io::Result<Kind> {
        self.check()?;
        let found = fs::metadata(&self.path)?;
        Ok(match () {
            () if found.is_dir() => Kind::Folder,
            () if found.is_file() => Kind::File,
            () => Kind::Other,
        })
    }

    pub(super) fn names(&self) -> io::Result<Vec<String>> {
        self.check()?;
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name().into_string();
            names.push(name.map_err(|name| io::Error::other(format!("the name {name:?} is no UTF-8")))?);
        }
        names.sort();
        Ok(names)
    }

    pub(super) fn below(&self, is_other: impl Fn(&str) -> bool + Copy) -> io::Result<Vec<PathBuf>> {
        self.check()?;
        let mut found = Vec::new();
        gather(&self.path, Path::new(""), is_other, &mut found)?;
        Ok(found)
    }

    pub(super) fn open(&self) -> io::Result<Opened> {
        // Before it is opened: opening a pipe waits for whoever writes into it.
        if self.kind()? != Kind::File {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
        }
        let file = File::open(&self.path)?;
        // What was opened, whoever has moved a link meanwhile.
        if let Some(within) = &self.within
            && !fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?.starts_with(&**within)
        {
            return Err(outside());
        }
        let bytes = file.metadata()?.len();
        Ok(Opened::Disk { file, bytes })
    }

    pub(super) fn identity(&self) -> io::Result<Value> {
        self.check()?;
        let found = fs::metadata(&self.path)?;
        let modified = found.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Ok(json!({ "bytes": found.len(), "modified": modified.map(|time| time.as_nanos().to_string()) }))
    }
}

/// Why a path is not followed.
#[derive(Debug, thiserror::Error)]
#[error("it leads out of what the operator allows")]
pub struct Outside;

fn outside() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, Outside)
}

fn gather(
    root: &Path,
    below: &Path,
    is_other: impl Fn(&str) -> bool + Copy,
    found: &mut Vec<PathBuf>,
) -> io::Result<()> {
    for name in { Disk { path: root.join(below), within: None } }.names()? {
        let path = below.join(&name);
        let full = root.join(&path);
        let kind = fs::metadata(&full)?;
        let is_link = fs::symlink_metadata(&full).is_ok_and(|found| found.is_symlink());
        // A link to a folder may lead in a circle.
        if kind.is_dir() && !is_link && !is_other(&name) {
            gather(root, &path, is_other, found)?;
        }
        if kind.is_file() {
            found.push(path);
        }
    }
    Ok(())
}

pub(super) fn read(file: &File, range: Range<u64>) -> io::Result<Bytes> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    file.read_exact_at(&mut bytes, range.start)?;
    Ok(bytes.into())
}

/// Copies a range of a file to the end of another; the kernel does it where it can. Stopped, it is `Interrupted`.
pub(crate) fn copy(mut from: &File, range: &Range<u64>, to: &mut File, stop: &Stop) -> io::Result<u64> {
    from.seek(SeekFrom::Start(range.start))?;
    let mut left = range.end - range.start;
    while left > 0 {
        if stop.is_stopped() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        match io::copy(&mut from.take(left.min(STEP_BYTES)), to)? {
            // The source was cut short under us.
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            copied => left -= copied,
        }
    }
    Ok(range.end - range.start)
}
