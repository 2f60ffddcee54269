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

#[cfg(test)]
mod tests {
    use super::*;

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
