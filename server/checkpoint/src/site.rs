//! A folder that is to become a model: its files appear one by one, and what makes it one last.
//!
//! `.quarrel` in it holds what a run needs that goes on where another was stopped: what the job is (`job.json`), facts over the whole
//! model (`facts.json`), and a record of each file that is complete. It goes when the model is complete.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    error::CheckpointError,
    report::LayerReport,
    target::{Replace, Stop, Target},
};

/// Bytes that are copied between two looks at whether to stop.
const STEP_BYTES: u64 = 64 << 20;
const STATE: &str = ".quarrel";
/// The same of a model that is complete, while it is removed.
const OVER: &str = ".quarrel.done";

/// The folder, and the only process that writes to it.
#[derive(Debug)]
pub(crate) struct Site {
    path: PathBuf,
    state: PathBuf,
    /// Held until the process ends or the site is dropped.
    _lock: File,
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
    pub(crate) fn open(path: &Path, job: Value, replace: Replace, stop: &Stop) -> Result<Site, CheckpointError> {
        let writing = |error| CheckpointError::Io { what: "cannot write", path: path.to_owned(), error };
        match fs::metadata(path) {
            Ok(found) if !found.is_dir() => {
                return Err(CheckpointError::NoFolder { path: path.to_owned() });
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir_all(path).map_err(writing)?,
            Err(error) => return Err(writing(error)),
        }
        let state = path.join(STATE);
        let is_empty =
            || fs::read_dir(path).map(|mut entries| entries.all(|entry| entry.is_ok_and(|of| of.file_name() == STATE)));
        if !is_empty().map_err(writing)? && !state.is_dir() && replace == Replace::Never {
            return Err(CheckpointError::Exists { path: path.to_owned() });
        }
        fs::create_dir_all(&state).map_err(writing)?;
        let lock = File::create(state.join("lock")).map_err(writing)?;
        let is_ours = match lock.try_lock() {
            // Whoever had it may have been done meanwhile, and have taken the state away.
            Ok(()) => fs::metadata(state.join("lock"))
                .is_ok_and(|found| lock.metadata().is_ok_and(|ours| ours.ino() == found.ino())),
            Err(TryLockError::WouldBlock) => false,
            Err(TryLockError::Error(error)) => return Err(writing(error)),
        };
        if !is_ours {
            return Err(CheckpointError::JobRuns { path: path.to_owned() });
        }
        let mut site = Site { path: path.to_owned(), state, _lock: lock, identity: job, records: BTreeMap::new() };
        match (site.read::<Value>("job.json")?, replace) {
            (Some(before), Replace::Never) if before == site.identity => site.records = site.complete(stop)?,
            (Some(before), Replace::Never) => {
                let what = changed(&before, &site.identity);
                return Err(CheckpointError::JobChanged { path: path.to_owned(), what });
            }
            (None, Replace::Never) if !is_empty().map_err(writing)? => {
                return Err(CheckpointError::Exists { path: path.to_owned() });
            }
            // Nothing of it, or what is to be replaced: what makes it look complete goes first.
            (_, _) => {
                site.clear()?;
                site.write("job.json", &site.identity)?;
            }
        }
        Ok(site)
    }

    /// Whether the source is still what it was when the site was opened.
    pub(crate) fn still(&self, now: &Value) -> Result<(), CheckpointError> {
        match self.identity["source"] == now["source"] {
            true => Ok(()),
            false => Err(CheckpointError::JobChanged { path: self.path.clone(), what: "its source".to_owned() }),
        }
    }

    /// The record of a unit that is complete.
    pub(crate) fn record(&self, file: &str) -> Option<&Record> {
        self.records.get(file)
    }

    /// Where a file of the model is to appear.
    pub(crate) fn target(&self, file: &Path) -> Result<Target, CheckpointError> {
        let path = self.path.join(file);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(CheckpointError::io("cannot write", folder))?;
        }
        Ok(Target::new(path, Replace::AtTheEnd)?.by_way_of(&self.state))
    }

    /// Remembers that a unit is complete: its file has its name.
    pub(crate) fn complete_unit(&mut self, record: Record) -> Result<(), CheckpointError> {
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
    pub(crate) fn copy(&self, from: &Path, file: &Path, stop: &Stop) -> Result<(), CheckpointError> {
        let target = self.target(file)?;
        let mut source = File::open(from).map_err(CheckpointError::io("cannot read", from))?;
        target.write(stop, |out| {
            while !stop.is_stopped()
                && io::copy(&mut (&mut source).take(STEP_BYTES), out).map_err(target.writing())? > 0
            {}
            Ok(())
        })
    }

    /// The model is complete.
    pub(crate) fn done(self) -> Result<(), CheckpointError> {
        // At once: half of a state would be that of a run that was stopped.
        let gone = self.path.join(OVER);
        let _ = fs::remove_dir_all(&gone);
        fs::rename(&self.state, &gone).map_err(CheckpointError::io("cannot remove", &self.state))?;
        fs::remove_dir_all(&gone).map_err(CheckpointError::io("cannot remove", &gone))
    }

    /// Records whose files are as they were written. A file that is not is made again.
    fn complete(&self, stop: &Stop) -> Result<BTreeMap<String, Record>, CheckpointError> {
        let mut records = BTreeMap::new();
        let reading = CheckpointError::io("cannot read", &self.state);
        let entries = fs::read_dir(&self.state).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(reading)?;
        for entry in entries {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".partial") {
                // Of a run that was killed: nobody else is here.
                let _ = fs::remove_file(entry.path());
            }
            if !name.starts_with("unit-") {
                continue;
            }
            let Some(record) = self.read::<Record>(&name)? else { continue };
            match checksum(&self.path.join(&record.file), stop) {
                Ok(found) if found == (record.bytes, record.crc32c) => {
                    records.insert(record.file.clone(), record);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    return Err(CheckpointError::Io { what: "cannot read", path: self.path.join(&record.file), error });
                }
                Ok(_) | Err(_) => {}
            }
        }
        Ok(records)
    }

    fn clear(&self) -> Result<(), CheckpointError> {
        let gone = |path: &Path, done: io::Result<()>| match done {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(CheckpointError::Io { what: "cannot remove", path: path.to_owned(), error })
            }
            _ => Ok(()),
        };
        let reading = CheckpointError::io("cannot read", &self.path);
        let entries = fs::read_dir(&self.path).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(reading)?;
        for entry in entries {
            let name = entry.file_name();
            let endings = [".safetensors", ".safetensors.index.json", ".bin"];
            let is_weights = endings.iter().any(|ending| name.to_string_lossy().ends_with(ending));
            if entry.path().is_file() && (is_weights || name == "config.json" || name == "adapter_config.json") {
                gone(&entry.path(), fs::remove_file(entry.path()))?;
            }
        }
        let reading = CheckpointError::io("cannot read", &self.state);
        let entries = fs::read_dir(&self.state).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(reading)?;
        for entry in entries.iter().filter(|entry| entry.file_name() != "lock") {
            gone(&entry.path(), fs::remove_file(entry.path()))?;
        }
        Ok(())
    }

    fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, CheckpointError> {
        let path = self.state.join(name);
        match fs::read(&path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(CheckpointError::Io { what: "cannot read", path, error }),
        }
    }

    fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<(), CheckpointError> {
        let text = serde_json::to_vec_pretty(value).map_err(|error| CheckpointError::Ours(error.to_string()))?;
        let target = Target::new(self.state.join(name), Replace::AtTheEnd)?.by_way_of(&self.state);
        target.write(&Stop::default(), |out| out.write_all(&text).map_err(target.writing()))
    }
}

/// A file's bytes, and their crc32c.
pub(crate) fn checksum(path: &Path, stop: &Stop) -> io::Result<(u64, u32)> {
    let mut file = File::open(path)?;
    let (mut bytes, mut sum) = (0, 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        if stop.is_stopped() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        match file.read(&mut buffer)? {
            0 => return Ok((bytes, sum)),
            read => {
                bytes += read as u64;
                sum = crc32c::crc32c_append(sum, &buffer[..read]);
            }
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
