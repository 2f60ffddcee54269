//! Object stores: a key for each file, and no folders but what keys have in common.

use std::{
    fmt,
    fs::File,
    io::{self, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::{
    Error, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutPayload,
    client::{HttpError, HttpErrorKind},
    path::Path as Key,
};
use serde_json::{Value, json};
use tokio::{
    runtime::{Builder, Runtime},
    task::block_in_place,
    time::sleep,
};

use crate::{
    storage::{Kind, Opened, uri::scrubbed},
    target::{Replace, Stop},
};

/// Bytes of a request, where more are wanted.
const STEP_BYTES: u64 = 8 << 20;
/// Requests at once of one upload or copy.
const AT_ONCE: usize = 4;
/// As many as S3 takes, and some to spare.
const PARTS_MAX: u64 = 9_000;
/// Milliseconds before a list that broke off is asked for again.
const LIST_PAUSES_MS: [u64; 5] = [100, 200, 400, 800, 1600];
/// What a model's folder usually has, for servers that list nothing.
const USUAL: [&str; 22] = [
    "adapter_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "LICENSE",
    "merges.txt",
    "model.safetensors",
    "model.safetensors.index.json",
    "model_index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "README.md",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
];

/// What stores are asked on. It has no end: a thread that waits for an answer must not find its runtime gone.
static RUNTIME: LazyLock<io::Result<Runtime>> =
    LazyLock::new(|| Builder::new_multi_thread().worker_threads(1).thread_name("stores").enable_all().build());

/// A key of a store.
#[derive(Clone)]
pub struct Object {
    pub(super) store: Arc<dyn ObjectStore>,
    /// Scheme, host and, where the host is not the bucket's own, the bucket.
    pub(super) root: String,
    pub(super) key: Key,
    /// As it was given.
    pub(super) uri: String,
    /// Whether that ended with a slash.
    pub(super) says_folder: bool,
    /// Whether the store says what it has.
    pub(super) is_listed: bool,
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Object").field("uri", &self.uri).finish_non_exhaustive()
    }
}

impl Object {
    pub(super) fn join(&self, name: &Path) -> Object {
        let parts = name.iter().map(|part| part.to_string_lossy());
        let key = parts.clone().fold(self.key.clone(), |key, part| key.join(&*part));
        let uri = parts.fold(self.uri.clone(), |uri, part| format!("{uri}/{part}"));
        Object { key, uri, says_folder: false, ..self.clone() }
    }

    /// The answer, on a thread that may block.
    pub(super) fn wait<T>(&self, asked: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        // Errors quote URLs.
        let runtime = RUNTIME.as_ref().map_err(|error| io::Error::new(error.kind(), error.to_string()))?;
        block_in_place(|| runtime.block_on(asked)).map_err(|error| match error.get_ref() {
            Some(why) => io::Error::new(error.kind(), scrubbed(&why.to_string())),
            None => error,
        })
    }

    fn head(&self) -> io::Result<ObjectMeta> {
        self.wait(async { self.store.head(&self.key).await.map_err(io) })
    }

    /// A key that is there is a file; one that others begin with is a folder.
    pub(super) fn kind(&self) -> io::Result<Kind> {
        match if self.key.as_ref().is_empty() { Err(io::ErrorKind::NotFound.into()) } else { self.head() } {
            Ok(_) => Ok(Kind::File),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Err(error) if self.names()?.is_empty() => Err(error),
            Err(_) => Ok(Kind::Folder),
        }
    }

    pub(super) fn names(&self) -> io::Result<Vec<String>> {
        if !self.is_listed {
            return self.usual();
        }
        let found = self.wait(whole(|| self.store.list_with_delimiter(Some(&self.key))))?;
        let keys = found.common_prefixes.iter().chain(found.objects.iter().map(|object| &object.location));
        // An object of the folder's own name with a slash: consoles make folders of these.
        let keys = keys.filter(|key| **key != self.key);
        let mut names = Vec::from_iter(keys.filter_map(|key| key.filename().map(str::to_owned)));
        names.sort();
        Ok(names)
    }

    /// Those of the usual names that are there.
    fn usual(&self) -> io::Result<Vec<String>> {
        let is_there = |name: &'static str| {
            let object = self.join(Path::new(name));
            async move {
                match object.store.head(&object.key).await {
                    Ok(_) => Ok(Some(name.to_owned())),
                    Err(Error::NotFound { .. }) => Ok(None),
                    Err(error) => Err(io(error)),
                }
            }
        };
        let found = stream::iter(USUAL.map(is_there)).buffered(AT_ONCE).try_filter_map(|name| async { Ok(name) });
        self.wait(found.try_collect())
    }

    pub(super) fn below(&self, is_other: impl Fn(&str) -> bool) -> io::Result<Vec<PathBuf>> {
        if !self.is_listed {
            return Ok(self.usual()?.into_iter().map(PathBuf::from).collect());
        }
        let found: Vec<ObjectMeta> = self.wait(whole(|| self.store.list(Some(&self.key)).try_collect()))?;
        let path = |object: ObjectMeta| -> Option<PathBuf> {
            let parts = Vec::from_iter(object.location.prefix_match(&self.key)?.map(|part| part.as_ref().to_owned()));
            let (_, folders) = parts.split_last()?;
            (!folders.iter().any(|folder| is_other(folder))).then(|| parts.iter().collect())
        };
        Ok(found.into_iter().filter_map(path).collect())
    }

    pub(super) fn open(&self) -> io::Result<Opened> {
        let found = self.head()?;
        Ok(Opened::Object { object: self.clone(), bytes: found.size, tag: found.e_tag })
    }

    pub(super) fn identity(&self) -> io::Result<Value> {
        let found = self.head()?;
        let modified = found.e_tag.is_none().then(|| found.last_modified.to_rfc3339());
        Ok(json!({ "bytes": found.size, "e_tag": found.e_tag, "modified": modified }))
    }

    /// A range of the object that has that tag.
    pub(super) async fn read(&self, range: Range<u64>, tag: Option<&str>) -> io::Result<Bytes> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let wanted = range.end - range.start;
        let if_match = tag.map(str::to_owned);
        let options = GetOptions { range: Some(GetRange::Bounded(range)), if_match, ..GetOptions::default() };
        let bytes = self.store.get_opts(&self.key, options).await.map_err(io)?.bytes().await?;
        match bytes.len() as u64 == wanted {
            true => Ok(bytes),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    pub(super) fn copy(&self, range: &Range<u64>, tag: Option<&str>, to: &mut File, stop: &Stop) -> io::Result<u64> {
        let steps = steps(range.clone(), STEP_BYTES).map(|step| self.read(step, tag));
        let mut pieces = stream::iter(steps).buffered(AT_ONCE);
        while let Some(piece) = self.wait(async { pieces.try_next().await })? {
            if stop.is_stopped() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            to.write_all(&piece)?;
        }
        Ok(range.end - range.start)
    }

    pub(super) fn remove(&self) -> io::Result<()> {
        self.wait(async { self.store.delete(&self.key).await.map_err(io) })
    }

    /// Makes the object of a file: all of it, or nothing. Stopped, it is `Interrupted`; one that is there, if it is to stay, `AlreadyExists`.
    pub(super) fn write(
        &self,
        file: &File,
        replace: Replace,
        stop: &Stop,
        may_end: impl Fn() -> bool,
    ) -> io::Result<()> {
        let bytes = file.metadata()?.len();
        if replace == Replace::Never && bytes > STEP_BYTES && self.head().is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        if bytes > STEP_BYTES {
            return self.wait(self.write_parts(file, bytes, stop, may_end));
        }
        let mut whole = vec![0; bytes as usize];
        file.read_exact_at(&mut whole, 0)?;
        if !may_end() {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let mode = if replace == Replace::Never { PutMode::Create } else { PutMode::Overwrite };
        self.wait(async {
            match self.store.put_opts(&self.key, PutPayload::from(whole), mode.into()).await {
                Err(Error::AlreadyExists { .. }) => Err(io::ErrorKind::AlreadyExists.into()),
                put => put.map(drop).map_err(io),
            }
        })
    }

    async fn write_parts(&self, file: &File, bytes: u64, stop: &Stop, may_end: impl Fn() -> bool) -> io::Result<()> {
        let mut upload = self.store.put_multipart(&self.key).await.map_err(io)?;
        let step = STEP_BYTES.max(bytes.div_ceil(PARTS_MAX).next_multiple_of(1 << 20));
        let parts = steps(0..bytes, step).map(|step| {
            let mut part = vec![0; (step.end - step.start) as usize];
            let read = file.read_exact_at(&mut part, step.start);
            // Parts are numbered in the order of these calls.
            let put = upload.put_part(PutPayload::from(part));
            async move {
                read?;
                match stop.is_stopped() {
                    true => Err(io::ErrorKind::Interrupted.into()),
                    false => put.await.map_err(io),
                }
            }
        });
        let done: io::Result<Vec<()>> = stream::iter(parts).buffered(AT_ONCE).try_collect().await;
        let done = match done {
            Ok(_) if !may_end() => Err(io::ErrorKind::Interrupted.into()),
            Ok(_) => upload.complete().await.map(drop).map_err(io),
            Err(error) => Err(error),
        };
        if done.is_err() {
            // The store forgets its parts by itself some day: that it cannot be told so now is no second error.
            let _ = upload.abort().await;
        }
        done
    }
}

/// With the kind that the store's own errors have.
fn io(error: Error) -> io::Error {
    match &error {
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
            io::Error::new(io::ErrorKind::PermissionDenied, error)
        }
        _ => error.into(),
    }
}

/// A list that comes whole. The library asks again until an answer begins, not if it breaks off.
async fn whole<T, F: Future<Output = object_store::Result<T>>>(ask: impl Fn() -> F) -> io::Result<T> {
    let mut pauses = LIST_PAUSES_MS.into_iter();
    loop {
        match (ask().await, pauses.next()) {
            (Err(error), Some(pause)) if is_broken(&error) => sleep(Duration::from_millis(pause)).await,
            (answer, _) => return answer.map_err(io),
        }
    }
}

/// Whether an answer began and did not end.
fn is_broken(error: &(dyn std::error::Error + 'static)) -> bool {
    let kind = error.downcast_ref::<HttpError>().map(HttpError::kind);
    let here = matches!(kind, Some(HttpErrorKind::Interrupted | HttpErrorKind::Decode | HttpErrorKind::Unknown));
    here || error.source().is_some_and(is_broken)
}

fn steps(range: Range<u64>, step: u64) -> impl Iterator<Item = Range<u64>> {
    let end = range.end;
    range.step_by(step as usize).map(move |start| start..end.min(start + step))
}
