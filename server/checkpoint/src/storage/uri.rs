//! What a URI says, before anything is connected to.

use std::path::PathBuf;

use object_store::{ObjectStoreScheme, path::Path as Key};
use url::Url;

use crate::error::CheckpointError;

/// What URIs may begin with.
const SCHEMES: &str = "file, s3, gs, az, abfs, abfss, http or https";
/// No URI is longer.
const URI_BYTES_MAX: usize = 4096;

/// A URI, read.
pub(super) struct Uri {
    /// As it was given, without a slash at its end.
    pub(super) text: String,
    pub(super) what: What,
    /// Whether there was one.
    pub(super) says_folder: bool,
}

/// Where it is.
pub(super) enum What {
    Disk(PathBuf),
    Object { url: Url, scheme: ObjectStoreScheme, root: String, key: Key },
}

impl Uri {
    pub(super) fn parse(text: &str) -> Result<Uri, CheckpointError> {
        let wrong = |detail: String| CheckpointError::Uri { uri: shortened(&scrubbed(text)), detail };
        if text.len() > URI_BYTES_MAX {
            return Err(wrong(format!("it has {} bytes: expected at most {URI_BYTES_MAX}", text.len())));
        }
        let url = Url::parse(text).map_err(|error| wrong(format!("it cannot be read: {error}")))?;
        let is_bucket = ["s3", "s3a", "gs"].contains(&url.scheme());
        if url.password().is_some() || (!url.username().is_empty() && (is_bucket || url.scheme().starts_with("http"))) {
            return Err(wrong("it holds a user or a password: expected those in the environment".to_owned()));
        }
        if url.query().is_some() || url.fragment().is_some() || (is_bucket && url.port().is_some()) {
            return Err(wrong("it has a query, a fragment or a port: expected scheme, host and path".to_owned()));
        }
        let (given, says_folder) = (text.trim_end_matches('/').to_owned(), text.ends_with('/'));
        if url.scheme() == "file" {
            let path = url.to_file_path().map_err(|()| wrong("expected file:///PATH".to_owned()))?;
            return Ok(Uri { text: given, what: What::Disk(path), says_folder });
        }
        let expected = |what: &str| wrong(format!("{what}expected a URI of {SCHEMES}"));
        let (scheme, key) = ObjectStoreScheme::parse(&url).map_err(|error| expected(&format!("{error}: ")))?;
        if matches!(scheme, ObjectStoreScheme::Local | ObjectStoreScheme::Memory) {
            return Err(expected(""));
        }
        // Two names of one scheme.
        let mut root = url[..url::Position::BeforePath].replacen("s3a://", "s3://", 1);
        // An https URL of a store's own host has the bucket in its path.
        if Key::from_url_path(url.path()).is_ok_and(|path| path != key) {
            root.extend(["/", url.path_segments().and_then(|mut parts| parts.next()).unwrap_or_default()]);
        }
        Ok(Uri { text: given, what: What::Object { url, scheme, root, key }, says_folder })
    }
}

/// Whether it is a URI rather than a path.
pub fn is_uri(text: &str) -> bool {
    let letters = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
    let is_file = text.get(..6).is_some_and(|start| start.eq_ignore_ascii_case("file:/"));
    is_file || text.split_once("://").is_some_and(|(scheme, _)| !scheme.is_empty() && letters(scheme))
}

/// A text without the users and passwords of URLs in it.
pub(super) fn scrubbed(text: &str) -> String {
    let mut parts = text.split("://");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let host = part.find(['/', ' ', '"', '`', '?']).unwrap_or(part.len());
        let shown = part[..host].rfind('@').filter(|at| part[..*at].contains(':')).map_or(part, |at| &part[at..]);
        out.extend(["://", shown]);
    }
    out
}

pub(super) fn shortened(text: &str) -> String {
    quarrel_engine::shorten(text, 200)
}
