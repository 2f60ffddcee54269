//! Logs: a line when a stream ends, spans for streams and batches. INFO for what callers do, ERROR for what we must mend.

use std::time::Duration;

use tracing_subscriber::EnvFilter;

use crate::status::Fault;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging to standard error. `filter` is in the syntax of tracing's `EnvFilter`: `info`, `quarrel_flight=debug`.
///
/// # Errors
/// A sentence about a filter that cannot be used.
pub fn start(filter: &str, format: LogFormat) -> Result<(), String> {
    let filter = EnvFilter::try_new(filter).map_err(|error| format!("log filter `{filter}`: {error}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        LogFormat::Text => builder.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    started.map_err(|error| error.to_string())
}

/// The one line that a stream leaves. Faults quote names that clients chose, so they are escaped.
pub(crate) fn stream_ended(ended: &Result<(), Option<Fault>>, elapsed: Duration) {
    let seconds = elapsed.as_secs_f64();
    match ended {
        Ok(()) => tracing::info!(seconds, "done"),
        Err(None) => tracing::info!(seconds, "the client has left"),
        Err(Some(fault)) if fault.is_ours() => tracing::error!(seconds, fault = ?fault.to_string(), "failed"),
        Err(Some(fault)) => tracing::info!(seconds, fault = ?fault.to_string(), "refused"),
    }
}
