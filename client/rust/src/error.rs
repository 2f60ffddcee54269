//! Errors, rebuilt from what the wire carries: the one file of this crate that names gRPC codes.
//!
//! A server's status is `[reason] sentence`. The reason is the contract's word; the sentence names the layer.

use quarrel_proto::Reason;
use tonic::{
    Code, Status,
    codegen::http::{HeaderMap, StatusCode},
};

/// Why layers did not come back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An address that is none.
    #[error("`{address}` is no address: expected `grpc://HOST:PORT`, `HOST:PORT`, `grpc+unix://PATH` or `unix:PATH`")]
    Address {
        /// What was given.
        address: String,
    },
    /// Nobody answers there, or the connection broke.
    #[error("{detail}")]
    Unreachable {
        /// What the system said.
        detail: String,
    },
    /// Somebody answers there, but not as a Quarrel server of this contract.
    #[error("no Quarrel server answers there: {detail}")]
    Stranger {
        /// What it said.
        detail: String,
    },
    /// One output channel is larger than a message that the server takes.
    #[error(
        "layer `{layer}`: one output channel has {bytes} bytes: expected at most {limit}, the server's `message_bytes_max`"
    )]
    ChannelTooLarge {
        /// Its name.
        layer: String,
        /// Of a channel.
        bytes: u64,
        /// What the server takes.
        limit: u64,
    },
    /// The server refused the command, a layer or the stream.
    #[error("{0}")]
    Refused(Refusal),
    /// A layer could not be read at its source.
    #[error("layer `{layer}` cannot be read: {detail}")]
    Source {
        /// Its name.
        layer: String,
        /// What its reader said.
        detail: String,
    },
    /// A layer's bytes do not fit its shape.
    #[error("layer `{layer}`: {detail}")]
    Layer {
        /// Its name.
        layer: String,
        /// What is wrong, and what was expected.
        detail: String,
    },
    /// A layer's reader, or what makes the layers, panicked.
    #[error("the source of the layers panicked")]
    Panicked,
    /// The server answered something that the contract does not allow.
    #[error("the server's answer is not what the contract says: {detail}")]
    Answer {
        /// What is wrong with it.
        detail: String,
    },
}

/// A server's own words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The contract's word; a newer server may say one that this version does not know.
    pub word: String,
    /// What this version knows of it.
    pub reason: Option<Reason>,
    /// The sentence.
    pub message: String,
    /// The layer that the sentence names; a long name is cut in the middle.
    pub layer: Option<String>,
    kind: Kind,
}

/// Who must act.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// The caller: the command, a layer or the way of sending is wrong.
    Caller,
    /// Nobody: the server has no room now; try again later.
    Busy,
    /// Whoever runs the server: it is not there, or is stopping.
    Unavailable,
    /// The server does not do this.
    Unsupported,
    /// Whoever wrote the server.
    Server,
}

impl Error {
    /// Who must act.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Address { .. }
            | Error::Source { .. }
            | Error::Layer { .. }
            | Error::ChannelTooLarge { .. }
            | Error::Panicked => Kind::Caller,
            Error::Unreachable { .. } | Error::Stranger { .. } => Kind::Unavailable,
            Error::Refused(refusal) => refusal.kind,
            Error::Answer { .. } => Kind::Server,
        }
    }

    /// The contract's reason, where there is one.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Error::Refused(refusal) => refusal.reason,
            Error::ChannelTooLarge { .. } => Some(Reason::ChannelTooLarge),
            _ => None,
        }
    }

    /// The layer that it is about.
    pub fn layer(&self) -> Option<&str> {
        match self {
            Error::Source { layer, .. } | Error::Layer { layer, .. } | Error::ChannelTooLarge { layer, .. } => {
                Some(layer)
            }
            Error::Refused(refusal) => refusal.layer.as_deref(),
            Error::Address { .. }
            | Error::Unreachable { .. }
            | Error::Stranger { .. }
            | Error::Panicked
            | Error::Answer { .. } => None,
        }
    }

    /// What to do, in a sentence.
    pub fn advice(&self) -> &'static str {
        match self {
            Error::Address { .. } => "Copy the address from the first line that `quarrel serve` prints.",
            Error::Unreachable { .. } => "Check the address and that the server runs.",
            Error::Stranger { .. } => "Check the address: it is not `quarrel serve`, or one of another major version.",
            Error::ChannelTooLarge { .. } => Reason::ChannelTooLarge.advice(),
            Error::Panicked => "Repair the reader that the layers were given.",
            Error::Refused(Refusal { reason: Some(reason), .. }) => reason.advice(),
            Error::Refused(Refusal { kind: Kind::Busy | Kind::Unavailable, .. }) => "Try again later.",
            Error::Refused(_) => "See the server's SPEC.md; it may be newer than this client.",
            Error::Source { .. } => "Check the file, and start again.",
            Error::Layer { .. } => "Send the layer's full shape and as many bytes as it says.",
            Error::Answer { .. } => "Report it, with the versions of client and server.",
        }
    }

    /// Whether the same layers may pass when they are sent again.
    pub(crate) fn is_unavailable(&self) -> bool {
        self.kind() == Kind::Unavailable
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Error {
        let refused = |word: &str, message: &str, kind| {
            Error::Refused(Refusal {
                word: word.to_owned(),
                reason: Reason::from_word(word),
                message: message.to_owned(),
                layer: layer(message),
                kind,
            })
        };
        match (words(status.message()), kind(status.code())) {
            (Some((word, message)), kind) => refused(word, message, kind),
            // tonic's and hyper's own words for a connection that is gone.
            (None, Kind::Unavailable) => Error::Unreachable { detail: deepest(&status) },
            (None, kind) => refused("", status.message(), kind),
        }
    }
}

impl From<tonic::transport::Error> for Error {
    fn from(error: tonic::transport::Error) -> Error {
        Error::Unreachable { detail: deepest(&error) }
    }
}

/// What headers or trailers say of the end: an error, unless they say that it is good or say nothing.
pub(crate) fn of_headers(headers: &HeaderMap) -> Result<(), Status> {
    match Status::from_header_map(headers) {
        Some(status) if status.code() != Code::Ok => Err(status),
        _ => Ok(()),
    }
}

/// Of an answer that is no gRPC: a proxy's, or of something else that listens there.
pub(crate) fn of_http(status: StatusCode) -> Error {
    let detail = format!("HTTP status {status}");
    match status.as_u16() {
        429 | 502..=504 => Error::Unreachable { detail },
        _ => Error::Stranger { detail },
    }
}

/// The cause at the bottom: `transport error` alone helps nobody.
fn deepest(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let last = causes.last().map_or_else(String::new, ToString::to_string);
    format!("the connection failed: {last}")
}

/// `[reason] sentence`, apart.
fn words(text: &str) -> Option<(&str, &str)> {
    let (word, sentence) = text.strip_prefix('[')?.split_once("] ")?;
    let is_word = !word.is_empty() && word.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'));
    is_word.then_some((word, sentence))
}

/// The name after the first ``layer ` ``. Names may hold backticks; what follows the last of them is a colon, mostly.
fn layer(sentence: &str) -> Option<String> {
    let (_, rest) = sentence.split_once("layer `")?;
    rest.split_once("`: ").or_else(|| rest.split_once('`')).map(|(name, _)| name.to_owned())
}

fn kind(code: Code) -> Kind {
    match code {
        Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::NotFound
        | Code::AlreadyExists
        | Code::DeadlineExceeded
        | Code::Unauthenticated
        | Code::PermissionDenied => Kind::Caller,
        Code::ResourceExhausted => Kind::Busy,
        // A connection that breaks while a stream runs is Unknown or Cancelled to tonic, by the way it breaks.
        Code::Unavailable | Code::Cancelled | Code::Unknown => Kind::Unavailable,
        Code::Unimplemented => Kind::Unsupported,
        Code::Ok | Code::Internal | Code::Aborted | Code::DataLoss => Kind::Server,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]

    use super::*;

    #[test]
    fn a_status_becomes_a_typed_error() {
        let status = Status::new(Code::InvalidArgument, "[non_finite] layer `mlp`up`: element 7 is NaN");
        let error = Error::from(status);
        assert_eq!(
            (error.reason(), error.layer(), error.kind()),
            (Some(Reason::NonFinite), Some("mlp`up"), Kind::Caller)
        );
        assert_eq!(error.to_string(), "layer `mlp`up`: element 7 is NaN");
        assert_eq!(error.advice(), Reason::NonFinite.advice());
    }

    #[test]
    fn a_word_of_a_newer_server_is_kept() {
        let Error::Refused(refusal) = Error::from(Status::new(Code::ResourceExhausted, "[moon_full] wait")) else {
            panic!()
        };
        assert_eq!((refusal.word.as_str(), refusal.reason, refusal.kind), ("moon_full", None, Kind::Busy));
    }

    #[test]
    fn what_no_server_of_ours_said_is_a_broken_connection_or_its_own_words() {
        let kind = |code, text| Error::from(Status::new(code, text)).kind();
        assert_eq!(kind(Code::Unknown, "h2 protocol error"), Kind::Unavailable);
        assert_eq!(kind(Code::Unavailable, "[stopping] the server is stopping"), Kind::Unavailable);
        assert_eq!(kind(Code::Unimplemented, ""), Kind::Unsupported);
    }
}
