//! What an operator can set: each limit is a flag and a `QUARREL_` variable of the same name. Defaults stand here alone.
//!
//! This file and the command line's `args` are the only ones that see the environment.

use std::{ffi::OsString, fmt, num::NonZeroUsize, path::PathBuf, str::FromStr};

use clap::{Args, FromArgMatches, error::ContextKind};
use quarrel_checkpoint::{Allowed, CheckpointError};
use quarrel_engine::{Level, LevelError, Limits};

/// A year.
const SECONDS_MAX: u64 = 365 * 24 * 3_600;
/// A gRPC message's length is 32 bits, and pyarrow refuses batches of 2 GiB.
const MESSAGE_BYTES_MAX: u64 = (2 << 30) - (2 << 20);
/// More than any machine has, and few enough permits for 32 bits.
const MEMORY_BYTES_MAX: u64 = 4 << 40;
/// Streams, or connections.
const PLACES_MAX: u64 = 1 << 20;

/// Everything that can be set.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Where to listen: `HOST:PORT` (port 0: any free one) or `unix:PATH`
    #[arg(long, env = "QUARREL_LISTEN", default_value = "127.0.0.1:8815", value_name = "ADDRESS")]
    pub listen: Listen,

    /// Threads that compute [default: one a core]
    #[arg(long, env = "QUARREL_THREADS", value_name = "N")]
    pub threads: Option<NonZeroUsize>,

    /// CPU level to compute with: scalar, avx2 or avx512 [default: the best that the CPU has]
    #[arg(long, env = "QUARREL_CPU_LEVEL", value_name = "LEVEL", value_parser = level)]
    pub cpu_level: Option<Level>,

    /// Bytes of weights and results in memory, over all streams
    #[arg(long, env = "QUARREL_MEMORY_BYTES_MAX", default_value_t = 1 << 30, value_name = "BYTES")]
    pub memory_bytes_max: usize,

    /// Bytes of one message, and so of one output channel
    #[arg(long, env = "QUARREL_MESSAGE_BYTES_MAX", default_value_t = 64 << 20, value_name = "BYTES")]
    pub message_bytes_max: usize,

    /// Bytes that one span may hold until it is complete: a whole layer, for per-tensor scales, double quantization and ladders
    #[arg(long, env = "QUARREL_LAYER_BYTES_MAX", default_value_t = 512 << 20, value_name = "BYTES")]
    pub layer_bytes_max: usize,

    /// Rows of one batch
    #[arg(long, env = "QUARREL_BATCH_ROWS_MAX", default_value_t = 1_000_000, value_name = "N")]
    pub batch_rows_max: usize,

    /// Layers of one stream
    #[arg(long, env = "QUARREL_LAYERS_MAX", default_value_t = 1_000_000, value_name = "N")]
    pub layers_max: usize,

    /// Bytes of a layer's name
    #[arg(long, env = "QUARREL_NAME_BYTES_MAX", default_value_t = 1_024, value_name = "BYTES")]
    pub name_bytes_max: usize,

    /// Streams at once
    #[arg(long, env = "QUARREL_STREAMS_MAX", default_value_t = 32, value_name = "N")]
    pub streams_max: usize,

    /// Connections at once; one more is closed when it comes
    #[arg(long, env = "QUARREL_CONNECTIONS_MAX", default_value_t = 64, value_name = "N")]
    pub connections_max: usize,

    /// Streams at once on one connection
    #[arg(long, env = "QUARREL_CONNECTION_STREAMS_MAX", default_value_t = 32, value_name = "N")]
    pub connection_streams_max: usize,

    /// What jobs and DoGet may read: URIs, or absolute paths, and all that is under one; may be said again [default: nothing]
    #[arg(long, env = "QUARREL_ALLOW_READ", value_delimiter = ',', value_name = "PREFIX")]
    pub allow_read: Vec<String>,

    /// What jobs may write, likewise [default: nothing]
    #[arg(long, env = "QUARREL_ALLOW_WRITE", value_delimiter = ',', value_name = "PREFIX")]
    pub allow_write: Vec<String>,

    /// A file of a checkpoint that DoPut writes is closed before it takes more bytes, unless a single layer does
    #[arg(long, env = "QUARREL_SHARD_BYTES_MAX", default_value_t = 5 << 30, value_name = "BYTES")]
    pub shard_bytes_max: u64,

    /// Jobs at once, each with 48 MiB of memory beside `memory_bytes_max`
    #[arg(long, env = "QUARREL_JOBS_MAX", default_value_t = 4, value_name = "N")]
    pub jobs_max: usize,

    /// A connection has so many seconds to say its first word, and a stream to send its command
    #[arg(long, env = "QUARREL_HEADER_SECONDS", default_value_t = 30, value_name = "SECONDS")]
    pub header_seconds: u64,

    /// How long a stream may last in all
    #[arg(long, env = "QUARREL_STREAM_SECONDS", default_value_t = 86_400, value_name = "SECONDS")]
    pub stream_seconds: u64,

    /// A stream ends after so many seconds without a message, a result taken or work under way
    #[arg(long, env = "QUARREL_IDLE_SECONDS", default_value_t = 60, value_name = "SECONDS")]
    pub idle_seconds: u64,

    /// How long a stream waits for room while nothing moves
    #[arg(long, env = "QUARREL_STALL_SECONDS", default_value_t = 30, value_name = "SECONDS")]
    pub stall_seconds: u64,

    /// How long the rest of a request is read and discarded, so that the client meets the error
    #[arg(long, env = "QUARREL_DISCARD_SECONDS", default_value_t = 300, value_name = "SECONDS")]
    pub discard_seconds: u64,

    /// How long running streams may go on after SIGTERM
    #[arg(long, env = "QUARREL_DRAIN_SECONDS", default_value_t = 30, value_name = "SECONDS")]
    pub drain_seconds: u64,
}

/// An address to listen at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// A host and port.
    Tcp(String),
    /// A Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Tcp(address) => f.write_str(address),
            Listen::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Listen, String> {
        match text.strip_prefix("unix:") {
            Some("") => Err("expected a path after `unix:`".to_owned()),
            Some(path) => Ok(Listen::Unix(PathBuf::from(path))),
            None if text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) => {
                Ok(Listen::Tcp(text.trim_start_matches("grpc://").to_owned()))
            }
            None => Err("expected HOST:PORT or unix:PATH".to_owned()),
        }
    }
}

/// clap's error without what it says of the command line: nobody wrote a flag.
fn of_the_environment(error: &clap::Error) -> String {
    let said = |kind| error.get(kind).map(ToString::to_string).unwrap_or_default();
    let flag = said(ContextKind::InvalidArg);
    let name = flag.trim_start_matches('-').split(' ').next().unwrap_or_default().replace('-', "_").to_uppercase();
    let why = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
    format!("the variable `QUARREL_{name}` is `{}`, which it cannot be{why}", said(ContextKind::InvalidValue))
}

fn level(text: &str) -> Result<Level, LevelError> {
    Level::named(text)
}

/// Limits that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A limit that nothing could pass.
    #[error("`{0}` is 0: expected at least 1")]
    Zero(&'static str),
    /// A limit beyond sense, or beyond what Arrow Flight carries.
    #[error("`{name}` is {value}: expected at most {most}")]
    TooLarge {
        /// Its name.
        name: &'static str,
        /// What was set.
        value: u64,
        /// What may be.
        most: u64,
    },
    /// The largest message would not fit.
    #[error(
        "`memory_bytes_max` {memory} holds no message of `message_bytes_max` {message}: expected at least twice as much, \
         since one stream may hold half"
    )]
    MemoryTooSmall {
        /// `memory_bytes_max`.
        memory: usize,
        /// `message_bytes_max`.
        message: usize,
    },
}

impl Config {
    /// What the environment says, and defaults: for a server inside of another program.
    ///
    /// # Errors
    /// A variable whose value is none of its flag's.
    pub fn from_environment() -> Result<Config, String> {
        let command = Config::augment_args(clap::Command::new("quarrel").no_binary_name(true));
        let matches = command.try_get_matches_from([""; 0]).map_err(|error| of_the_environment(&error))?;
        Config::from_arg_matches(&matches).map_err(|error| of_the_environment(&error))
    }

    /// The variables of the environment that are text, for object stores to find credentials and endpoints in.
    pub fn variables() -> Vec<(String, String)> {
        let text = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
        std::env::vars_os().filter_map(text).collect()
    }

    /// Every limit: its name and value, as `server.info` lists them.
    pub fn limits(&self) -> [(&'static str, u64); 17] {
        [
            ("memory_bytes_max", self.memory_bytes_max as u64),
            ("message_bytes_max", self.message_bytes_max as u64),
            ("layer_bytes_max", self.layer_bytes_max as u64),
            ("batch_rows_max", self.batch_rows_max as u64),
            ("layers_max", self.layers_max as u64),
            ("name_bytes_max", self.name_bytes_max as u64),
            ("streams_max", self.streams_max as u64),
            ("connections_max", self.connections_max as u64),
            ("connection_streams_max", self.connection_streams_max as u64),
            ("shard_bytes_max", self.shard_bytes_max),
            ("jobs_max", self.jobs_max as u64),
            ("header_seconds", self.header_seconds),
            ("stream_seconds", self.stream_seconds),
            ("idle_seconds", self.idle_seconds),
            ("stall_seconds", self.stall_seconds),
            ("discard_seconds", self.discard_seconds),
            ("drain_seconds", self.drain_seconds),
        ]
    }

    /// Whether the limits fit together.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn check(&self) -> Result<(), ConfigError> {
        let may_be_zero = ["discard_seconds", "drain_seconds"];
        if let Some((name, _)) = self.limits().iter().find(|(name, value)| *value == 0 && !may_be_zero.contains(name)) {
            return Err(ConfigError::Zero(name));
        }
        for (name, value) in self.limits() {
            let most = match name {
                _ if name.ends_with("_seconds") => SECONDS_MAX,
                "message_bytes_max" => MESSAGE_BYTES_MAX,
                "memory_bytes_max" | "layer_bytes_max" => MEMORY_BYTES_MAX,
                "streams_max" | "connections_max" | "connection_streams_max" | "jobs_max" => PLACES_MAX,
                _ => u64::MAX,
            };
            if value > most {
                return Err(ConfigError::TooLarge { name, value, most });
            }
        }
        if self.memory_bytes_max / 2 < self.message_bytes_max {
            return Err(ConfigError::MemoryTooSmall { memory: self.memory_bytes_max, message: self.message_bytes_max });
        }
        Ok(())
    }

    /// Whether what jobs may read and write can be: what is wrong with it is to be said before anybody is let in.
    ///
    /// # Errors
    /// A prefix that is none.
    pub fn check_prefixes(&self) -> Result<(), CheckpointError> {
        self.allowed().map(drop)
    }

    /// What jobs may read, and what they may write.
    pub(crate) fn allowed(&self) -> Result<(Allowed, Allowed), CheckpointError> {
        let read = Allowed::new(&self.allow_read, "--allow-read")?;
        Ok((read, Allowed::new(&self.allow_write, "--allow-write")?))
    }

    /// The limits that a layer can meet.
    pub(crate) fn layer_limits(&self) -> Limits {
        Limits {
            message_bytes_max: self.message_bytes_max,
            span_bytes_max: self.layer_bytes_max.min(self.memory_bytes_max / 2),
            batch_rows_max: self.batch_rows_max,
            layers_max: self.layers_max,
            name_bytes_max: self.name_bytes_max,
        }
    }
}
