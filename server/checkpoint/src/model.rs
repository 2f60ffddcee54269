//! A model to read: a safetensors file, or a folder of them with what belongs to it.
//!
//! A folder is what `save_pretrained` writes: files of tensors, an index that says which tensor is in which if there are several,
//! `config.json`, and others, which are copied. Symbolic links are followed, as a cache of models wants it.

use std::{
    collections::{BTreeMap, HashMap},
    fmt, io,
    path::{Component, Path, PathBuf},
};

use safetensors::Dtype;
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};
use serde_json::{Map, Value, value::RawValue};

use crate::{
    error::CheckpointError,
    legacy::translated,
    source::{Source, Tensor},
    storage::{Kind, Location},
};

/// More than any index has: a model of 100,000 tensors takes 10 MB.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// More than any configuration has, as which it takes seventy times as much memory.
const CONFIG_BYTES_MAX: u64 = 4 << 20;
/// Of an index, beside its tensors.
const METADATA_BYTES_MAX: usize = 64 << 10;
/// What holds weights in other formats: beside a quantized model it would be the dense one again.
const OTHER_WEIGHTS: [&str; 10] =
    ["bin", "ckpt", "gguf", "h5", "msgpack", "onnx", "onnx_data", "pt", "pth", "safetensors"];
/// What the command line writes into a folder: of another model, if it is there.
pub const REPORT: &str = "quarrel.report.json";
/// What loaders know a model by.
pub(crate) const CONFIG: &str = "config.json";
/// Which tensor is in which file.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// A model. Of its files, only headers and the configuration are in memory.
#[derive(Debug, Clone)]
pub struct Model {
    location: Location,
    shards: Vec<Source>,
    folder: Option<Folder>,
    stored_bytes: u64,
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
    /// Read once it is known to be small: as values it takes seventy times as much memory.
    metadata: Option<Box<RawValue>>,
    #[serde(deserialize_with = "once")]
    weight_map: BTreeMap<String, String>,
}

impl Model {
    /// Opens a file, or a folder and every file of tensors in it.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], [`CheckpointError::Malformed`].
    pub fn open(location: &Location) -> Result<Model, CheckpointError> {
        Model::open_as(location, None)
    }

    /// The same; what is decoded as it is opened, since no layout here has a place for its codes, is of that type.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], [`CheckpointError::Malformed`].
    pub(crate) fn open_as(location: &Location, dtype: Option<Dtype>) -> Result<Model, CheckpointError> {
        let path = location.shown();
        let kind = location.kind().map_err(CheckpointError::io("cannot open", &path))?;
        if kind != Kind::Folder {
            let source = Source::open(location)?;
            let stored_bytes = source.bytes();
            return Ok(Model { location: location.clone(), shards: vec![source], folder: None, stored_bytes });
        }
        let names = location.names().map_err(CheckpointError::io("cannot read", &path))?;
        let indices = Vec::from_iter(names.iter().filter(|name| name.ends_with(".safetensors.index.json")));
        let index = match one(&path, &indices, INDEX, "indices")? {
            Some(name) => Some((name.clone(), read_json::<Index>(location, name, INDEX_BYTES_MAX)?)),
            None => None,
        };
        let shards = match &index {
            Some((name, index)) => indexed(location, name, index)?,
            None => {
                let files = Vec::from_iter(names.iter().filter(|name| name.ends_with(".safetensors")));
                let several = "files of safetensors and no index (`model.safetensors.index.json`)";
                let file = one(&path, &files, "model.safetensors", several)?;
                let none = || malformed(&path, "the folder holds no file of safetensors".to_owned());
                vec![Source::open(&location.join(Path::new(file.ok_or_else(none)?)))?]
            }
        };
        let config = names.iter().any(|name| name == CONFIG).then(|| config(location)).transpose()?;
        let files = location.below().map_err(CheckpointError::io("cannot read", &path))?;
        let is_known = |file: &Path| {
            let is_index = index.as_ref().is_some_and(|(name, _)| file == Path::new(name));
            is_index || [Path::new(CONFIG), Path::new(REPORT)].contains(&file)
        };
        let is_shard = |file: &Path| shards.iter().any(|shard| shard.path() == path.join(file));
        let files = files.into_iter().filter(|file| !is_known(file) && !is_shard(file));
        let (mut left_out, mut others): (Vec<_>, Vec<_>) = files.partition(|file| is_weights(file));
        left_out.sort();
        others.sort();
        let index = match index {
            Some((name, index)) => Some((name.clone(), metadata(&path.join(&name), index.metadata)?)),
            None => None,
        };
        let stored_bytes = shards.iter().map(Source::bytes).sum();
        let shards = translated(shards, config.as_ref(), &mut others, dtype)?;
        let folder = Folder { index, config, others, left_out };
        Ok(Model { location: location.clone(), shards, folder: Some(folder), stored_bytes })
    }

    /// Where it is.
    pub(crate) fn location(&self) -> &Location {
        &self.location
    }

    /// Its path or URI, as it was given.
    pub fn path(&self) -> PathBuf {
        self.location.shown()
    }

    /// Its files of tensors, by name.
    pub fn shards(&self) -> &[Source] {
        &self.shards
    }

    /// A file of tensors in its place, with nothing beside it.
    pub(crate) fn as_one(&self, shard: Source) -> Model {
        let (location, stored_bytes) = (self.location.clone(), self.stored_bytes);
        Model { location, shards: vec![shard], folder: None, stored_bytes }
    }

    /// The same files, seen otherwise.
    pub(crate) fn replace_shards(&mut self, shards: Vec<Source>) {
        self.shards = shards;
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

    /// Bytes of all tensors as its files have them, however they are seen here.
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }
}

/// The files that an index names, each tensor where it says.
fn indexed(folder: &Location, name: &str, index: &Index) -> Result<Vec<Source>, CheckpointError> {
    let path = folder.shown().join(name);
    let mut shards = BTreeMap::<&str, Source>::new();
    for file in index.weight_map.values() {
        if shards.contains_key(file.as_str()) {
            continue;
        }
        let mut parts = Path::new(file).components();
        let (Some(Component::Normal(_)), None) = (parts.next(), parts.next()) else {
            return Err(malformed(&path, format!("it names `{file}`: expected a file in its own folder")));
        };
        let source = Source::open(&folder.join(Path::new(file))).map_err(|error| match error {
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
                return Err(malformed(
                    &folder.shown(),
                    format!("tensor `{}` is in `{home}` and in `{file}`", tensor.name),
                ));
            }
        }
    }
    if shards.is_empty() {
        return Err(malformed(&path, "its `weight_map` is empty".to_owned()));
    }
    Ok(shards.into_values().collect())
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

fn metadata(path: &Path, said: Option<Box<RawValue>>) -> Result<Map<String, Value>, CheckpointError> {
    let Some(said) = said else { return Ok(Map::new()) };
    let (bytes, most) = (said.get().len(), METADATA_BYTES_MAX);
    if bytes > most {
        return Err(malformed(path, format!("its `metadata` has {bytes} bytes: expected at most {most}")));
    }
    let found = serde_json::from_str(said.get());
    found.map_err(|error| malformed(path, format!("its `metadata` is no JSON of the kind: {error}")))
}

/// Whether a file is, by its ending, of weights in a format that is no source of ours.
pub(crate) fn is_weights(file: &Path) -> bool {
    file.extension().is_some_and(|ending| OTHER_WEIGHTS.iter().any(|other| ending == *other))
}

/// A folder's `config.json`.
pub(crate) fn config(folder: &Location) -> Result<Map<String, Value>, CheckpointError> {
    read_json(folder, CONFIG, CONFIG_BYTES_MAX)
}

fn read_json<T: for<'a> Deserialize<'a>>(folder: &Location, name: &str, bytes_max: u64) -> Result<T, CheckpointError> {
    let file = folder.join(Path::new(name));
    let path = file.shown();
    let bytes = file.read(bytes_max).map_err(CheckpointError::io("cannot read", &path))?;
    serde_json::from_slice(&bytes).map_err(|error| malformed(&path, format!("it is no JSON of the kind: {error}")))
}

/// Names and files, no name twice: a reader would take the one or the other.
fn once<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error> {
    struct Once;
    impl<'de> Visitor<'de> for Once {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of files by tensor")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut files = BTreeMap::new();
            while let Some((tensor, file)) = map.next_entry::<String, String>()? {
                if files.contains_key(&tensor) {
                    return Err(A::Error::custom(format_args!("tensor `{tensor}` is there twice")));
                }
                files.insert(tensor, file);
            }
            Ok(files)
        }
    }
    deserializer.deserialize_map(Once)
}

fn malformed(path: &Path, detail: String) -> CheckpointError {
    CheckpointError::Model { path: path.to_owned(), detail }
}
