//! A model to read: a safetensors file, or a folder of them with what belongs to it.
//!
//! A folder is what `save_pretrained` writes: files of tensors, an index that says which tensor is in which if there are several,
//! `config.json`, and others, which are copied. Symbolic links are followed, as a cache of models wants it.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    error::CheckpointError,
    source::{Source, Tensor},
};

/// More than any configuration or index has: a model of 100,000 tensors takes 10 MB.
const JSON_BYTES_MAX: u64 = 256 << 20;
/// What holds weights in other formats: beside a quantized model it would be the dense one again.
const OTHER_WEIGHTS: [&str; 10] =
    ["bin", "ckpt", "gguf", "h5", "msgpack", "onnx", "onnx_data", "pt", "pth", "safetensors"];
/// What the command line writes into a folder: of another model, if it is there.
pub const REPORT: &str = "quarrel.report.json";
/// Folders of tools, not of models.
const OTHER_FOLDERS: [&str; 5] = [".git", ".cache", ".quarrel", ".quarrel.done", "__pycache__"];

/// A model on disk. Of its files, only headers and the configuration are in memory.
#[derive(Debug, Clone)]
pub struct Model {
    path: PathBuf,
    shards: Vec<Source>,
    folder: Option<Folder>,
}

/// What a folder has beside tensors.
#[derive(Debug, Clone)]
pub struct Folder {
    /// The index's file name and its `metadata`, if there is one.
    pub(crate) index: Option<(String, Map<String, Value>)>,
    /// `config.json`.
    pub(crate) config: Option<Map<String, Value>>,
    /// Files to copy, within the folder.
    pub(crate) others: Vec<PathBuf>,
    /// Weights that are not of the model: other formats, other models.
    pub(crate) left_out: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct Index {
    #[serde(default)]
    metadata: Map<String, Value>,
    weight_map: BTreeMap<String, String>,
}

impl Model {
    /// Opens a file, or a folder and every file of tensors in it.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], [`CheckpointError::Malformed`].
    pub fn open(path: impl AsRef<Path>) -> Result<Model, CheckpointError> {
        let path = path.as_ref().to_owned();
        let kind = fs::metadata(&path).map_err(CheckpointError::io("cannot open", &path))?;
        if !kind.is_dir() {
            let source = Source::open(&path)?;
            return Ok(Model { path, shards: vec![source], folder: None });
        }
        let names = Vec::from_iter(names(&path)?);
        let indices = Vec::from_iter(names.iter().filter(|name| name.ends_with(".safetensors.index.json")));
        let index = match one(&path, &indices, "model.safetensors.index.json", "indices")? {
            Some(name) => Some((name.clone(), read_json::<Index>(&path.join(name))?)),
            None => None,
        };
        let shards = match &index {
            Some((name, index)) => indexed(&path, name, index)?,
            None => {
                let files = Vec::from_iter(names.iter().filter(|name| name.ends_with(".safetensors")));
                let several = "files of safetensors and no index (`model.safetensors.index.json`)";
                let file = one(&path, &files, "model.safetensors", several)?;
                let none = || malformed(&path, "the folder holds no file of safetensors".to_owned());
                vec![Source::open(path.join(file.ok_or_else(none)?))?]
            }
        };
        let config = match names.iter().any(|name| name == "config.json") {
            true => Some(read_json(&path.join("config.json"))?),
            false => None,
        };
        let (mut others, mut left_out) = (Vec::new(), Vec::new());
        gather(&path, Path::new(""), &mut others, &mut left_out)?;
        let shard = |other: &Path| shards.iter().any(|shard| shard.path() == path.join(other));
        others.retain(|other| !shard(other));
        left_out.retain(|other| !shard(other));
        left_out.sort();
        let written = |other: &Path| {
            index.as_ref().is_some_and(|(name, _)| other == Path::new(name)) || other == Path::new("config.json")
        };
        others.retain(|other| !written(other));
        others.sort();
        let index = index.map(|(name, index)| (name, index.metadata));
        Ok(Model { path, shards, folder: Some(Folder { index, config, others, left_out }) })
    }

    /// Its path, as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its files of tensors, by name.
    pub fn shards(&self) -> &[Source] {
        &self.shards
    }

    /// What it has beside them, if it is a folder.
    pub fn folder(&self) -> Option<&Folder> {
        self.folder.as_ref()
    }

    /// Weights in its folder that are not of it, and are not copied.
    pub fn left_out(&self) -> impl Iterator<Item = &Path> {
        self.folder.iter().flat_map(|folder| folder.left_out.iter().map(PathBuf::as_path))
    }

    /// All tensors, file by file.
    pub fn tensors(&self) -> impl Iterator<Item = (&Source, &Tensor)> {
        self.shards.iter().flat_map(|shard| shard.tensors().iter().map(move |tensor| (shard, tensor)))
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(Source::bytes).sum()
    }
}

/// The files that an index names, each tensor where it says.
fn indexed(folder: &Path, name: &str, index: &Index) -> Result<Vec<Source>, CheckpointError> {
    let path = folder.join(name);
    let mut shards = BTreeMap::<&str, Source>::new();
    for file in index.weight_map.values() {
        if shards.contains_key(file.as_str()) {
            continue;
        }
        let mut parts = Path::new(file).components();
        let (Some(Component::Normal(_)), None) = (parts.next(), parts.next()) else {
            return Err(malformed(&path, format!("it names `{file}`: expected a file in its own folder")));
        };
        let source = Source::open(folder.join(file)).map_err(|error| match error {
            CheckpointError::Io { error, .. } if error.kind() == io::ErrorKind::NotFound => {
                malformed(&path, format!("it names `{file}`, which is not there"))
            }
            other => other,
        })?;
        shards.insert(file, source);
    }
    for (tensor, file) in &index.weight_map {
        if shards.get(file.as_str()).and_then(|shard| shard.tensor(tensor)).is_none() {
            return Err(malformed(&path, format!("it has tensor `{tensor}` in `{file}`, which does not hold it")));
        }
    }
    let mut homes = HashMap::<&str, &str>::new();
    for (file, shard) in &shards {
        for tensor in shard.tensors() {
            if let Some(home) = homes.insert(&tensor.name, file) {
                return Err(malformed(folder, format!("tensor `{}` is in `{home}` and in `{file}`", tensor.name)));
            }
        }
    }
    if shards.is_empty() {
        return Err(malformed(&path, "its `weight_map` is empty".to_owned()));
    }
    Ok(shards.into_values().collect())
}

/// Names of the entries of a folder, as far as they are text, sorted.
fn names(folder: &Path) -> Result<Vec<String>, CheckpointError> {
    let read = |error| CheckpointError::Io { what: "cannot read", path: folder.to_owned(), error };
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(read)? {
        let name = entry.map_err(read)?.file_name().into_string();
        names.push(name.map_err(|name| malformed(folder, format!("the name {name:?} is no UTF-8")))?);
    }
    names.sort();
    Ok(names)
}

/// The only one, if there is any, or the one of that name.
fn one<'a>(
    folder: &Path,
    found: &[&'a String],
    usual: &str,
    what: &str,
) -> Result<Option<&'a String>, CheckpointError> {
    match (found.iter().find(|name| **name == usual), found) {
        (Some(name), _) => Ok(Some(name)),
        (None, []) => Ok(None),
        (None, [name]) => Ok(Some(name)),
        (None, [one, two, ..]) => {
            let detail =
                format!("the folder holds several {what}, `{one}` and `{two}` among them: expected one, or `{usual}`");
            Err(malformed(folder, detail))
        }
    }
}

/// Files that are no weights, with those of folders below.
fn gather(
    root: &Path,
    below: &Path,
    others: &mut Vec<PathBuf>,
    left_out: &mut Vec<PathBuf>,
) -> Result<(), CheckpointError> {
    for name in names(&root.join(below))? {
        let path = below.join(&name);
        let full = root.join(&path);
        let kind = fs::metadata(&full).map_err(CheckpointError::io("cannot read", &full))?;
        let is_link = fs::symlink_metadata(&full).is_ok_and(|found| found.is_symlink());
        // A link to a folder may lead in a circle.
        if kind.is_dir() && !is_link && !OTHER_FOLDERS.contains(&name.as_str()) {
            gather(root, &path, others, left_out)?;
        }
        let is_weights = path.extension().is_some_and(|ending| OTHER_WEIGHTS.iter().any(|other| ending == *other));
        match kind.is_file() {
            true if is_weights => left_out.push(path),
            true if path != Path::new(REPORT) => others.push(path),
            _ => {}
        }
    }
    Ok(())
}

fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T, CheckpointError> {
    let size = fs::metadata(path).map_err(CheckpointError::io("cannot read", path))?.len();
    if size > JSON_BYTES_MAX {
        return Err(malformed(path, format!("it has {size} bytes: expected at most {JSON_BYTES_MAX}")));
    }
    let bytes = fs::read(path).map_err(CheckpointError::io("cannot read", path))?;
    serde_json::from_slice(&bytes).map_err(|error| malformed(path, format!("it is no JSON of the kind: {error}")))
}

fn malformed(path: &Path, detail: String) -> CheckpointError {
    CheckpointError::Model { path: path.to_owned(), detail }
}
