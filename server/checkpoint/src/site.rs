//! A folder that is to become a model: its files appear one by one, and what makes it one last.
//!
//! `.quarrel` in it holds what a run needs that goes on where another was stopped: what the job is (`job.json`), facts over the whole
//! model (`facts.json`), and a record of each file that is complete. It goes when the model is complete.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    error::CheckpointError,
    model::CONFIG,
    report::LayerReport,
    storage::{Kind, Location, Opened},
    target::{Replace, Stop, Target},
};

const STATE: &str = ".quarrel";
const LOCK: &str = "lock";
const JOB: &str = "job.json";
/// In that, of a model that a stream brings: what tells the stream from every other.
pub(crate) const STREAM: &str = "stream";
/// The same of a model that is complete, while it is removed.
const OVER: &str = ".quarrel.done";
/// More than a record has: one of 100,000 tensors takes 50 MB.
const STATE_BYTES_MAX: u64 = 128 << 20;
/// More than is said of a job: configuration and command.
const JOB_BYTES_MAX: u64 = 16 << 20;

/// The folder, and the only process that writes to it. (In a store, nobody holds anybody off: units are the same whoever makes them.)
#[derive(Debug)]
pub(crate) struct Site {
    location: Location,
    state: Location,
    /// Held until the process ends or the site is dropped.
    lock: Option<File>,
    /// Whether the folder was not there before.
    is_made: bool,
    /// What the job is.
    identity: Value,
    /// Complete units, by file.
    records: BTreeMap<String, Record>,
}

/// A complete unit.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The file's name.
    pub(crate) file: String,
    /// Its bytes, and their crc32c.
    pub(crate) bytes: u64,
    pub(crate) crc32c: u32,
    /// What tells it from any other file, where a store says so: it need not be read to be known again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) stored: Option<Value>,
    /// Tensors in it, and their bytes.
    pub(crate) tensors: BTreeMap<String, u64>,
    /// What became of the tensors of the source.
    pub(crate) layers: Vec<LayerReport>,
}

impl Site {
    /// Opens a folder for a job, new or stopped before. `job` says what it is.
    ///
    /// # Errors
    /// [`CheckpointError::Exists`] for a folder that holds something else; [`CheckpointError::JobChanged`] for one of another job,
    /// unless both are to be replaced; [`CheckpointError::JobRuns`]; [`CheckpointError::Io`].
    pub(crate) fn open(
        location: &Location,
        job: Value,
        replace: Replace,
        stop: &Stop,
    ) -> Result<Site, CheckpointError> {
        let path = location.shown();
        let writing = |error| CheckpointError::Io { what: "cannot write", path: path.clone(), error };
        location.may_write()?;
        let mut is_made = false;
        match location.kind() {
            Ok(Kind::Folder) => {}
            Ok(_) => return Err(CheckpointError::NoFolder { path }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                location.make_folder().map_err(writing)?;
                is_made = true;
            }
            Err(error) => return Err(writing(error)),
        }
        let state = location.join(Path::new(STATE));
        let names = location.names().map_err(writing)?;
        let is_new = names.is_empty();
        if !is_new && !names.iter().any(|name| name == STATE) && replace == Replace::Never {
            return Err(CheckpointError::Exists { path });
        }
        state.make_folder().map_err(writing)?;
        let lock = match state.path() {
            Some(state) => Some(lock(state).map_err(writing)?.ok_or(CheckpointError::JobRuns { path: path.clone() })?),
            None => None,
        };
        let is_empty = |names: Vec<String>| names.iter().all(|name| name == STATE);
        let mut site =
            Site { location: location.clone(), state, lock, is_made, identity: job, records: BTreeMap::new() };
        let is_of_a_stream = |job: &Value| job[STREAM].is_string();
        match (site.read::<Value>(JOB)?, replace) {
            // What another stream has left is of no use to this one.
            (Some(before), Replace::Never) if is_of_a_stream(&before) && is_of_a_stream(&site.identity) => {
                site.clear()?;
                site.write(JOB, &site.identity)?;
            }
            (Some(before), Replace::Never) if before == site.identity => site.records = site.complete(stop)?,
            (Some(before), Replace::Never) => {
                let what = changed(&before, &site.identity);
                return Err(CheckpointError::JobChanged { path, what });
            }
            (None, Replace::Never) if !is_empty(location.names().map_err(writing)?) => {
                return Err(CheckpointError::Exists { path });
            }
            // Nothing of it, or what is to be replaced: what makes it look complete goes first.
            (_, _) => {
                site.clear()?;
                site.write(JOB, &site.identity)?;
            }
        }
        Ok(site)
    }

    /// Where the folder is.
    pub(crate) fn path(&self) -> PathBuf {
        self.location.shown()
    }

    /// Whether the source is still what it was when the site was opened.
    pub(crate) fn still(&self, now: &Value) -> Result<(), CheckpointError> {
        match self.identity["source"] == now["source"] {
            true => Ok(()),
            false => Err(CheckpointError::JobChanged { path: self.location.shown(), what: "its source".to_owned() }),
        }
    }

    /// Whether no other job has begun here meanwhile. In a store nobody can be held off, but whoever was first notices.
    pub(crate) fn is_ours(&self) -> Result<(), CheckpointError> {
        if self.lock.is_some() || self.read::<Value>(JOB)?.as_ref() == Some(&self.identity) {
            return Ok(());
        }
        Err(CheckpointError::JobChanged { path: self.location.shown(), what: "what is begun there now".to_owned() })
    }

    /// The record of a unit that is complete.
    pub(crate) fn record(&self, file: &str) -> Option<&Record> {
        self.records.get(file)
    }

    /// Where a file of the model is to appear.
    pub(crate) fn target(&self, file: &Path) -> Result<Target, CheckpointError> {
        let folder = self.location.join(file.parent().unwrap_or(Path::new("")));
        folder.make_folder().map_err(CheckpointError::io("cannot write", folder.shown()))?;
        Ok(Target::one_of(&self.location.join(file), &self.state))
    }

    /// Remembers that a unit is complete: its file has its name.
    pub(crate) fn complete_unit(&mut self, record: Record) -> Result<(), CheckpointError> {
        self.is_ours()?;
        self.write(&format!("unit-{}.json", record.file), &record)?;
        self.records.insert(record.file.clone(), record);
        Ok(())
    }

    /// What was found out about the whole model before.
    pub(crate) fn facts<T: DeserializeOwned>(&self) -> Result<Option<T>, CheckpointError> {
        self.read("facts.json")
    }

    pub(crate) fn remember_facts<T: Serialize>(&self, facts: &T) -> Result<(), CheckpointError> {
        self.write("facts.json", facts)
    }

    /// Writes a file of the model.
    pub(crate) fn put(&self, file: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
        let target = self.target(file)?;
        target.write(&Stop::default(), |out| out.write_all(bytes).map_err(target.writing()))
    }

    /// Copies a file of the source.
    pub(crate) fn copy(&self, from: &Location, file: &Path, stop: &Stop) -> Result<(), CheckpointError> {
        let target = self.target(file)?;
        let source = from.open().map_err(CheckpointError::io("cannot read", from.shown()))?;
        target.write(stop, |out| source.copy(&(0..source.bytes()), out, stop).map(drop).map_err(target.writing()))
    }

    /// The model is complete.
    pub(crate) fn done(&self) -> Result<(), CheckpointError> {
        let Some(state) = self.state.path() else {
            // The job first: what is left of a state without one says nothing.
            self.remove(&self.state, JOB)?;
            let names = self.state.names().map_err(CheckpointError::io("cannot remove", self.state.shown()))?;
            return names.iter().try_for_each(|name| self.remove(&self.state, name));
        };
        // At once: half of a state would be that of a run that was stopped.
        let gone = self.location.join(Path::new(OVER)).shown();
        let _ = fs::remove_dir_all(&gone);
        fs::rename(state, &gone).map_err(CheckpointError::io("cannot remove", state))?;
        fs::remove_dir_all(&gone).map_err(CheckpointError::io("cannot remove", &gone))
    }

    /// Whether files in a store are still those that were written.
    pub(crate) fn are_as_written(&self, records: &[Record]) -> Result<(), CheckpointError> {
        for record in records.iter().filter(|record| record.stored.is_some()) {
            let file = self.location.join(Path::new(&record.file));
            let found = match file.identity() {
                Ok(found) => Some(found),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(CheckpointError::Io { what: "cannot read", path: file.shown(), error }),
            };
            if found != record.stored {
                return Err(CheckpointError::JobChanged { path: file.shown(), what: "what is there now".to_owned() });
            }
        }
        Ok(())
    }

    /// Takes back all that is there, also what it has of that name, unless it is somebody else's by now.
    pub(crate) fn abandon(&self, copied: &[String]) {
        if self.is_ours().is_err() || self.clear().is_err() {
            return;
        }
        for name in copied {
            let _ = self.remove(&self.location, name);
        }
        let folder = self.location.path().map(Path::to_owned);
        let _ = self.done();
        if self.is_made {
            folder.map(fs::remove_dir);
        }
    }

    /// Records whose files are as they were written. A file that is not is made again.
    fn complete(&self, stop: &Stop) -> Result<BTreeMap<String, Record>, CheckpointError> {
        let mut records = BTreeMap::new();
        let names = self.state.names().map_err(CheckpointError::io("cannot read", self.state.shown()))?;
        for name in names {
            if name.ends_with(".partial") {
                // Of a run that was killed: nobody else is here.
                let _ = self.remove(&self.state, &name);
            }
            if !name.starts_with("unit-") {
                continue;
            }
            let Some(record) = self.read::<Record>(&name)? else { continue };
            let file = self.location.join(Path::new(&record.file));
            match is_as_written(&file, &record, stop) {
                Ok(true) => drop(records.insert(record.file.clone(), record)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    return Err(CheckpointError::Io { what: "cannot read", path: file.shown(), error });
                }
                Ok(false) | Err(_) => {}
            }
        }
        Ok(records)
    }

    fn clear(&self) -> Result<(), CheckpointError> {
        let reading = |of: &Location| CheckpointError::io("cannot read", of.shown());
        for name in self.location.names().map_err(reading(&self.location))? {
            let endings = [".safetensors", ".safetensors.index.json", ".bin"];
            let is_weights = endings.iter().any(|ending| name.ends_with(ending));
            let is_model = is_weights || name == CONFIG || name == "adapter_config.json";
            if is_model && self.location.join(Path::new(&name)).kind().is_ok_and(|kind| kind == Kind::File) {
                self.remove(&self.location, &name)?;
            }
        }
        let names = self.state.names().map_err(reading(&self.state))?;
        names.iter().filter(|name| *name != LOCK).try_for_each(|name| self.remove(&self.state, name))
    }

    fn remove(&self, folder: &Location, name: &str) -> Result<(), CheckpointError> {
        let file = folder.join(Path::new(name));
        file.remove().map_err(CheckpointError::io("cannot remove", file.shown()))
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, CheckpointError> {
        let file = self.state.join(Path::new(name));
        let most = if name == JOB { JOB_BYTES_MAX } else { STATE_BYTES_MAX };
        match file.read(most) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(CheckpointError::Io { what: "cannot read", path: file.shown(), error }),
        }
    }

    fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<(), CheckpointError> {
        let text = serde_json::to_vec_pretty(value).map_err(|error| CheckpointError::Ours(error.to_string()))?;
        let target = Target::one_of(&self.state.join(Path::new(name)), &self.state);
        target.write(&Stop::default(), |out| out.write_all(&text).map_err(target.writing()))
    }
}

/// The lock of a folder, unless another process has it.
fn lock(state: &Path) -> io::Result<Option<File>> {
    let path = state.join(LOCK);
    let lock = File::create(&path)?;
    let is_ours = match lock.try_lock() {
        // Whoever had it may have been done meanwhile, and have taken the state away.
        Ok(()) => fs::metadata(&path).is_ok_and(|found| lock.metadata().is_ok_and(|ours| ours.ino() == found.ino())),
        Err(TryLockError::WouldBlock) => false,
        Err(TryLockError::Error(error)) => return Err(error),
    };
    Ok(is_ours.then_some(lock))
}

/// Whether a unit's file is what its record says.
fn is_as_written(file: &Location, record: &Record, stop: &Stop) -> io::Result<bool> {
    if let Some(stored) = &record.stored {
        return Ok(file.identity()? == *stored);
    }
    match file.open()? {
        Opened::Disk { mut file, bytes } => Ok((bytes, checksum(&mut file, stop)?) == (record.bytes, record.crc32c)),
        Opened::Object { .. } => Ok(false),
    }
}

/// The crc32c of all of a file.
pub(crate) fn checksum(file: &mut File, stop: &Stop) -> io::Result<u32> {
    file.seek(SeekFrom::Start(0))?;
    let mut sum = 0;
    let mut buffer = vec![0; 1 << 20];
    loop {
        if stop.is_stopped() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        match file.read(&mut buffer)? {
            0 => return Ok(sum),
            read => sum = crc32c::crc32c_append(sum, &buffer[..read]),
        }
    }
}

/// The first thing in which two jobs differ.
fn changed(before: &Value, now: &Value) -> String {
    match (before, now) {
        (Value::Object(old), Value::Object(new)) => {
            let keys = new.keys().chain(old.keys());
            let key = keys.into_iter().find(|key| old.get(*key) != new.get(*key));
            key.map_or_else(|| "something".to_owned(), |key| format!("its {key}"))
        }
        _ => "something".to_owned(),
    }
}
