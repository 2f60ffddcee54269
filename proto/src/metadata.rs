//! Keys of the reply's schema metadata, and names of actions.

/// The effective command, as JSON.
pub const COMMAND: &str = "quarrel.command";
/// The contract's version.
pub const VERSION: &str = "quarrel.version";
/// The CPU level that computes.
pub const LEVEL: &str = "quarrel.level";

/// Action: version, limits and CPU level, as `ServerInfo`.
pub const ACTION_SERVER_INFO: &str = "server.info";
/// Action: every scheme, as `Schemes`.
pub const ACTION_SCHEMES_LIST: &str = "schemes.list";
/// Action: a checkpoint from one URI to another; takes a `JobRequest` and answers a `Job`.
pub const ACTION_JOB_SUBMIT: &str = "job.submit";
/// Action: how far a job is; takes a `JobName` and answers a `Job`.
pub const ACTION_JOB_STATUS: &str = "job.status";
/// Action: stops a job; takes a `JobName` and answers a `Job`.
pub const ACTION_JOB_CANCEL: &str = "job.cancel";
/// Action: a `Job` for each that the server knows.
pub const ACTION_JOB_LIST: &str = "job.list";

/// `app_metadata` of a request's message that ends the input, as the end of the request itself does.
pub const END: &str = r#"{"end": {}}"#;

/// Whether `app_metadata` says [`END`]: these bytes, or other JSON that means the same. Anything else is not ours to read.
pub fn is_end(app_metadata: &[u8]) -> bool {
    // Nobody's metadata is parsed for nothing.
    let may_be = app_metadata.len() <= END_BYTES_MAX && app_metadata.trim_ascii_start().starts_with(b"{");
    may_be
        && serde_json::from_slice::<serde_json::Value>(app_metadata)
            .is_ok_and(|said| said == serde_json::json!({"end": {}}))
}

/// White space and all.
const END_BYTES_MAX: usize = 64;

/// What `app_metadata` says at the end of a DoPut: that all layers have come, and what is known of their model.
#[derive(Debug, Clone, PartialEq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct End {
    /// How many.
    pub layers: u64,
    /// What the model's `config.json` is to say beside what its layers are quantized with.
    #[serde(default)]
    pub config: serde_json::Map<String, serde_json::Value>,
}

/// A configuration is not longer.
const PUT_END_BYTES_MAX: usize = 256 << 10;

impl End {
    /// The end that `app_metadata` says; `None` if it says something that is not ours to read.
    ///
    /// # Errors
    /// What is wrong with an end.
    pub fn of(app_metadata: &[u8]) -> Option<Result<End, String>> {
        #[derive(serde::Deserialize)]
        struct Said {
            end: Option<serde_json::Value>,
        }
        let text = app_metadata.trim_ascii_start();
        if !text.starts_with(b"{") {
            return None;
        }
        if app_metadata.len() > PUT_END_BYTES_MAX {
            let is_end = text.get(..64).is_some_and(|first| first.windows(5).any(|word| word == br#""end""#));
            return is_end.then(|| Err(format!("it has more than {PUT_END_BYTES_MAX} bytes")));
        }
        let end = serde_json::from_slice::<Said>(app_metadata).ok()?.end?;
        Some(serde_json::from_value(end).map_err(|error| error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_put_counts_its_layers() {
        let end = |text: &str| End::of(text.as_bytes());
        assert_eq!(end(r#"{"end": {"layers": 3}}"#), Some(Ok(End { layers: 3, config: serde_json::Map::new() })));
        let with = end(r#" {"end": {"layers": 0, "config": {"a": 1}}}"#);
        assert!(with.is_some_and(|end| end.is_ok_and(|end| end.config["a"] == 1)));
        for wrong in
            [r#"{"end": {}}"#, r#"{"end": 3}"#, r#"{"end": {"layers": -1}}"#, r#"{"end": {"layers": 1, "x": 2}}"#]
        {
            assert!(matches!(end(wrong), Some(Err(_))), "{wrong}");
        }
        for other in ["", "end", "{}", r#"{"start": 1}"#, r#"{"end"#, "alive"] {
            assert_eq!(end(other), None, "{other}");
        }
    }

    #[test]
    fn the_end_is_json_and_nothing_else_is_the_end() {
        for end in [END, r#"{"end":{}}"#, " {\n \"end\": { } }\n"] {
            assert!(is_end(end.as_bytes()), "{end}");
        }
        for other in ["", "end", "{}", r#"{"end": 1}"#, r#"{"end": {}, "more": 1}"#, r#"{"end": {}} x"#, "alive"] {
            assert!(!is_end(other.as_bytes()), "{other}");
        }
    }
}
