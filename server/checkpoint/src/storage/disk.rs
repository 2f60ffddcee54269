//! This machine's disk.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
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
}

impl Disk {
    pub(super) fn kind(&self) -> io::Result<Kind> {
        let found = fs::metadata(&self.path)?;
        Ok(match () {
            () if found.is_dir() => Kind::Folder,
            () if found.is_file() => Kind::File,
            () => Kind::Other,
        })
    }

    pub(super) fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name().into_string();
            names.push(name.map_err(|name| io::Error::other(format!("the name {name:?} is no UTF-8")))?);
        }
        names.sort();
        Ok(names)
    }

    pub(super) fn below(&self, is_other: impl Fn(&str) -> bool + Copy) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        gather(&self.path, Path::new(""), is_other, &mut found)?;
        Ok(found)
    }

    pub(super) fn open(&self) -> io::Result<Opened> {
        let file = File::open(&self.path)?;
        let bytes = file.metadata()?.len();
        Ok(Opened::Disk { file, bytes })
    }

    pub(super) fn identity(&self) -> io::Result<Value> {
        let found = fs::metadata(&self.path)?;
        let modified = found.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Ok(json!({ "bytes": found.len(), "modified": modified.map(|time| time.as_nanos().to_string()) }))
    }
}

fn gather(
    root: &Path,
    below: &Path,
    is_other: impl Fn(&str) -> bool + Copy,
    found: &mut Vec<PathBuf>,
) -> io::Result<()> {
    for name in { Disk { path: root.join(below) } }.names()? {
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
