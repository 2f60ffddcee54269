//! Where files are: on this machine's disk, or in an object store under a URI. START at [`Stores`], which makes a [`Location`] of a path or a URI.
//!
//! Everything here may block: it is called on threads that may. What another machine keeps is read by ranges and written whole, from a file of ours:
//! nobody sees half of it.

mod allowed;
mod bucket;
mod disk;
mod uri;
mod web;

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    io,
    ops::Range,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use object_store::{ObjectStore, ObjectStoreScheme};
use serde_json::Value;
use url::Url;

pub use self::allowed::Allowed;
pub use self::disk::Outside;
pub(crate) use self::disk::copy;
pub use self::uri::is_uri;
use self::{
    bucket::Object,
    disk::Disk,
    uri::{Uri, What, scrubbed},
};
use crate::{
    error::CheckpointError,
    target::{Replace, Stop},
};

/// Folders of tools, not of models.
const OTHER_FOLDERS: [&str; 5] = [".git", ".cache", ".quarrel", ".quarrel.done", "__pycache__"];

/// The object stores that a process knows. Clones share their connections.
#[derive(Clone)]
pub struct Stores(Arc<Inner>);

struct Inner {
    /// Credentials, endpoints and the like, as the environment has them: `AWS_ENDPOINT`.
    options: Vec<(String, String)>,
    /// Whether what a store answers may lead to another.
    follows: bool,
    open: Mutex<HashMap<String, Arc<dyn ObjectStore>>>,
}

/// A file or a folder, there or not: a path, or a URI.
#[derive(Debug, Clone)]
pub enum Location {
    /// On this machine.
    #[doc(hidden)]
    Disk(Disk),
    /// In a store.
    #[doc(hidden)]
    Object(Object),
}

/// What is at a location.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Folder,
    /// A device or a pipe.
    Other,
}

impl Stores {
    /// `options` are what the environment says of credentials and endpoints, by the names that it has there: `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT`,
    /// `GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_ACCOUNT_NAME`.
    pub fn new(options: impl IntoIterator<Item = (String, String)>) -> Stores {
        // Other names of an environment, such as `TOKEN`, would be taken for options too.
        let is_known = |name: &str| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|prefix| name.starts_with(prefix));
        let options = options.into_iter().filter(|(name, _)| is_known(name)).collect();
        Stores(Arc::new(Inner { options, follows: true, open: Mutex::default() }))
    }

    /// The same, but that nothing leads elsewhere: for a server, whose callers may not read what it can reach.
    #[must_use]
    pub fn that_follow_nothing(&self) -> Stores {
        Stores(Arc::new(Inner { options: self.0.options.clone(), follows: false, open: Mutex::default() }))
    }

    /// A path, or a URI if it looks like one.
    ///
    /// # Errors
    /// [`CheckpointError::Uri`].
    pub fn locate(&self, said: &Path) -> Result<Location, CheckpointError> {
        match said.to_str().filter(|text| is_uri(text)) {
            Some(uri) => self.uri(uri),
            None => Ok(Location::disk(said)),
        }
    }

    /// A URI.
    ///
    /// # Errors
    /// [`CheckpointError::Uri`] if it is none, or its store does not fit what the environment says.
    pub fn uri(&self, text: &str) -> Result<Location, CheckpointError> {
        self.open(Uri::parse(text)?)
    }

    /// Where a place is reached: one client for all of a store, so that they share connections.
    fn open(&self, uri: Uri) -> Result<Location, CheckpointError> {
        let Uri { text: uri, what, says_folder } = uri;
        let (url, scheme, root, key) = match what {
            What::Disk(path) => return Ok(Location::disk(&path)),
            What::Object { url, scheme, root, key } => (url, scheme, root, key),
        };
        let wrong = |detail: String| CheckpointError::Uri { uri: uri.clone(), detail };
        let store = self.store(&url, &scheme, &root).map_err(|error| wrong(scrubbed(&error.to_string())))?;
        let is_listed = scheme != ObjectStoreScheme::Http;
        Ok(Location::Object(Object { store, root, key, uri, says_folder, is_listed }))
    }

    fn store(
        &self,
        url: &Url,
        scheme: &ObjectStoreScheme,
        root: &str,
    ) -> Result<Arc<dyn ObjectStore>, Box<dyn std::error::Error + Send + Sync>> {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = open.get(root) {
            return Ok(Arc::clone(store));
        }
        let said = self.0.options.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in said.clone().filter(|(name, _)| name.contains("ENDPOINT")) {
            // The library would panic.
            let is_web = Url::parse(value).is_ok_and(|url| ["http", "https"].contains(&url.scheme()) && url.has_host());
            if !is_web {
                return Err(format!("the variable `{name}` is no URL of http or https").into());
            }
        }
        // Whoever writes `http://` means it.
        let is_plain = |(name, value): (&str, &str)| name.starts_with("AWS_ENDPOINT") && value.starts_with("http://");
        let plain = url.scheme() == "http" || said.clone().any(is_plain);
        let options = said.chain(plain.then_some(("allow_http", "true")));
        let store = web::open(url, scheme, options, (!self.0.follows).then_some(web::Direct))?;
        open.insert(root.to_owned(), Arc::clone(&store));
        Ok(store)
    }
}

impl fmt::Debug for Stores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The options hold secrets.
        f.debug_struct("Stores").finish_non_exhaustive()
    }
}

impl Location {
    /// A path of this machine.
    pub fn disk(path: &Path) -> Location {
        Location::Disk(Disk { path: path.to_owned(), within: None })
    }

    /// The path or URI, for people.
    pub fn shown(&self) -> PathBuf {
        match self {
            Location::Disk(disk) => disk.path.clone(),
            Location::Object(object) => object.uri.clone().into(),
        }
    }

    /// The path, if it is one of this machine.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Location::Disk(disk) => Some(&disk.path),
            Location::Object(_) => None,
        }
    }

    /// Whether it is, or is to be, a folder by how it is written.
    pub(crate) fn says_folder(&self) -> bool {
        match self {
            Location::Disk(disk) => disk.path.as_os_str().as_bytes().ends_with(b"/"),
            Location::Object(object) => object.says_folder,
        }
    }

    /// Whether it is that place or lies within it, links followed.
    pub fn is_within(&self, outer: &Location) -> bool {
        match (self, outer) {
            (Location::Disk(inner), Location::Disk(outer)) => inner.real().starts_with(outer.real()),
            (Location::Object(inner), Location::Object(outer)) => {
                inner.root == outer.root && inner.key.prefix_matches(&outer.key)
            }
            _ => false,
        }
    }

    /// Whether both are one place, whatever they are called.
    pub fn is(&self, other: &Location) -> bool {
        self.is_within(other) && other.is_within(self)
    }

    /// Whether one lies within the other.
    pub fn overlaps(&self, other: &Location) -> bool {
        self.is_within(other) || other.is_within(self)
    }

    /// What has that name in this folder; `name` may be of a folder below.
    pub(crate) fn join(&self, name: &Path) -> Location {
        match self {
            Location::Disk(disk) => Location::Disk(disk.join(name)),
            Location::Object(object) => Location::Object(object.join(name)),
        }
    }

    /// Whether it is a folder that is there.
    ///
    /// # Errors
    /// [`CheckpointError::Io`], of kind `NotFound` if there is nothing.
    pub fn is_folder(&self) -> Result<bool, CheckpointError> {
        Ok(self.kind().map_err(CheckpointError::io("cannot open", self.shown()))? == Kind::Folder)
    }

    pub(crate) fn kind(&self) -> io::Result<Kind> {
        match self {
            Location::Disk(disk) => disk.kind(),
            Location::Object(object) => object.kind(),
        }
    }

    /// Names of the entries of a folder, sorted. Where nobody lists them, those of what models usually have.
    pub(crate) fn names(&self) -> io::Result<Vec<String>> {
        match self {
            Location::Disk(disk) => disk.names(),
            Location::Object(object) => object.names(),
        }
    }

    /// All files of a folder and of those below, but for tools' own.
    pub(crate) fn below(&self) -> io::Result<Vec<PathBuf>> {
        let is_other = |name: &str| OTHER_FOLDERS.contains(&name);
        match self {
            Location::Disk(disk) => disk.below(is_other),
            Location::Object(object) => object.below(is_other),
        }
    }

    /// Reads a file whole, if it has at most so many bytes.
    pub(crate) fn read(&self, bytes_max: u64) -> io::Result<Bytes> {
        let file = self.open()?;
        if file.bytes() > bytes_max {
            let sentence = format!("it has {} bytes: expected at most {bytes_max}", file.bytes());
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, sentence));
        }
        file.read(0..file.bytes())
    }

    /// Opens a file to read ranges of it.
    pub(crate) fn open(&self) -> io::Result<Opened> {
        match self {
            Location::Disk(disk) => disk.open(),
            Location::Object(object) => object.open(),
        }
    }

    /// What tells a file from what had its name before.
    pub(crate) fn identity(&self) -> io::Result<Value> {
        match self {
            Location::Disk(disk) => disk.identity(),
            Location::Object(object) => object.identity(),
        }
    }

    /// Whether a file may be made there or replaced: looked at again before each.
    pub(crate) fn check(&self) -> io::Result<()> {
        match self {
            Location::Disk(disk) => disk.check(),
            Location::Object(_) => Ok(()),
        }
    }

    /// Whether files can be made there at all.
    pub(crate) fn may_write(&self) -> Result<(), CheckpointError> {
        match self {
            Location::Object(Object { uri, is_listed: false, .. }) => {
                let detail = "it can be read only: expected a URI of file, s3, gs or az, or a path".to_owned();
                Err(CheckpointError::Uri { uri: uri.clone(), detail })
            }
            Location::Disk(_) | Location::Object(_) => Ok(()),
        }
    }

    /// Makes a folder, if that is something to be made.
    pub(crate) fn make_folder(&self) -> io::Result<()> {
        match self {
            Location::Disk(disk) => disk.make_folder(),
            Location::Object(_) => Ok(()),
        }
    }

    /// Makes a file of one of ours, where that is to be sent: all of it, or nothing. Stopped, or if it may not end, it is `Interrupted`; one that is
    /// there, if it is to stay, `AlreadyExists`.
    pub(crate) fn write(
        &self,
        file: &File,
        replace: Replace,
        stop: &Stop,
        may_end: impl Fn() -> bool,
    ) -> io::Result<()> {
        match self {
            // A file of this disk is made beside its name and renamed.
            Location::Disk(_) => Err(io::ErrorKind::Unsupported.into()),
            Location::Object(object) => object.write(file, replace, stop, may_end),
        }
    }

    /// Removes a file; one that is not there is removed.
    pub(crate) fn remove(&self) -> io::Result<()> {
        let removed = match self {
            Location::Disk(disk) => disk.remove(),
            Location::Object(object) => object.remove(),
        };
        match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

/// A file to read ranges of: what was opened, whatever has its name later.
#[derive(Debug)]
pub(crate) enum Opened {
    Disk { file: File, bytes: u64 },
    Object { object: Object, bytes: u64, tag: Option<String> },
}

impl Opened {
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Opened::Disk { bytes, .. } | Opened::Object { bytes, .. } => *bytes,
        }
    }

    /// A file that was cut short meanwhile is `UnexpectedEof`.
    pub(crate) fn read(&self, range: Range<u64>) -> io::Result<Bytes> {
        match self {
            Opened::Disk { file, .. } => disk::read(file, range),
            Opened::Object { object, tag, .. } => object.wait(object.read(range, tag.as_deref())),
        }
    }

    /// Copies a range to the end of a file; the kernel does it where it can. Stopped, it is `Interrupted`.
    pub(crate) fn copy(&self, range: &Range<u64>, to: &mut File, stop: &Stop) -> io::Result<u64> {
        match self {
            Opened::Disk { file, .. } => disk::copy(file, range, to, stop),
            Opened::Object { object, tag, .. } => object.copy(range, tag.as_deref(), to, stop),
        }
    }
}
