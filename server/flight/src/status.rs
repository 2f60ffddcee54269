//! Errors to gRPC statuses: the one file that names codes.
//!
//! The code says who must act: INVALID_ARGUMENT and FAILED_PRECONDITION the caller, RESOURCE_EXHAUSTED and UNAVAILABLE
//! the caller later, INTERNAL us. The message is `[reason] sentence`: for pyarrow the text is all that arrives.

use std::io::ErrorKind;

use quarrel_checkpoint::{CheckpointError, Outside};
use quarrel_engine::{LayerError, Note, PlanError, shorten};
use quarrel_pool::{Panicked, Refused};
use quarrel_proto::{Reason, command::CommandError};
use quarrel_wire::{Malformed, TooLong};
use tonic::{Code, Status, codegen::http::HeaderMap};

/// Bytes of a message: what survives every client's limit on header lists, even percent-encoded.
const MESSAGE_BYTES_MAX: usize = 2_000;

/// What ends a stream or a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("[{reason}] {message}")]
pub(crate) struct Fault {
    pub(crate) reason: Reason,
    pub(crate) message: String,
}

impl Fault {
    pub(crate) fn new(reason: Reason, message: impl Into<String>) -> Fault {
        Fault { reason, message: message.into() }
    }

    /// Nothing moves on a stream.
    pub(crate) fn idle(seconds: u64) -> Fault {
        Fault::new(Reason::Idle, format!("nothing came and nothing was taken for {seconds} s (`idle_seconds`)"))
    }

    /// A fault of the server, of which the log says more.
    pub(crate) fn ours() -> Fault {
        Fault::new(Reason::Internal, "a fault of the server, which goes on; its log says more")
    }

    /// Whether a person of ours must look.
    pub(crate) fn is_ours(&self) -> bool {
        code(self.reason) == Code::Internal
    }
}

/// The code of each reason.
fn code(reason: Reason) -> Code {
    match reason {
        Reason::CommandMissing
        | Reason::CommandMalformed
        | Reason::FieldUnknown
        | Reason::OptionConflict
        | Reason::OptionInvalid
        | Reason::SchemeUnknown
        | Reason::ProfileUnknown
        | Reason::RecipeInvalid
        | Reason::SchemaMissing
        | Reason::ColumnMissing
        | Reason::ColumnUnexpected
        | Reason::ColumnType
        | Reason::Permuted
        | Reason::FrameInvalid
        | Reason::MessageTooLarge
        | Reason::BatchRowsExceeded
        | Reason::LayersExceeded
        | Reason::NameTooLong
        | Reason::NameNull
        | Reason::WeightsNull
        | Reason::ElementNull
        | Reason::DtypeInvalid
        | Reason::DtypeChanged
        | Reason::ShapeInvalid
        | Reason::ShapeChanged
        | Reason::ImportanceInvalid
        | Reason::BytesRagged
        | Reason::ChannelCut
        | Reason::LayerTooLong
        | Reason::LayerInterrupted
        | Reason::LayerRepeated
        | Reason::LayerIncomplete
        | Reason::EndMissing
        | Reason::EndInvalid
        | Reason::FusedScalesDiffer
        | Reason::ChannelTooLarge
        | Reason::NonFinite
        | Reason::ScaleOverflow
        | Reason::AmaxExceeded
        | Reason::GroupSizeIndivisible
        | Reason::RankUnsupported
        | Reason::NeedsCalibration
        | Reason::KeptWithoutData
        | Reason::RowInconsistent
        | Reason::ChecksumMismatch
        | Reason::SpanTooLarge
        | Reason::UriInvalid
        | Reason::SourceMalformed => Code::InvalidArgument,
        Reason::UriNotAllowed | Reason::StorageDenied => Code::PermissionDenied,
        Reason::SourceMissing | Reason::JobUnknown => Code::NotFound,
        Reason::SinkExists => Code::AlreadyExists,
        Reason::VerbUnsupported => Code::Unimplemented,
        Reason::ClientNotReading | Reason::SinkTaken | Reason::QualityMissed => Code::FailedPrecondition,
        Reason::Idle | Reason::HeaderTimeout | Reason::StreamTimeout => Code::DeadlineExceeded,
        Reason::Busy | Reason::StreamsExceeded | Reason::JobsExceeded => Code::ResourceExhausted,
        Reason::Stopping | Reason::StorageFailed => Code::Unavailable,
        Reason::Internal => Code::Internal,
        // Rows say these, and what becomes a checkpoint may end with them.
        Reason::NotAWeight | Reason::AlreadyQuantized => Code::InvalidArgument,
        // Rows say these; no stream ends with them.
        Reason::Ignored
        | Reason::Unmatched
        | Reason::Rank1
        | Reason::Empty
        | Reason::BelowThreshold
        | Reason::NotFloat => Code::Internal,
    }
}

impl From<Fault> for Status {
    fn from(fault: Fault) -> Status {
        Status::new(code(fault.reason), shorten(&fault.to_string(), MESSAGE_BYTES_MAX))
    }
}

/// The end of a stream as trailers.
pub(crate) fn trailers(ended: Result<(), Fault>) -> Result<HeaderMap, Status> {
    let status = ended.map_or_else(Status::from, |()| Status::ok(""));
    let mut trailers = HeaderMap::new();
    status.add_header(&mut trailers)?;
    Ok(trailers)
}

impl From<CommandError> for Fault {
    fn from(error: CommandError) -> Fault {
        Fault::new(error.reason(), error.to_string())
    }
}

impl From<PlanError> for Fault {
    fn from(error: PlanError) -> Fault {
        Fault::new(error.reason(), error.to_string())
    }
}

impl From<CheckpointError> for Fault {
    fn from(error: CheckpointError) -> Fault {
        let message = error.to_string();
        let reason = match error {
            CheckpointError::Io { error, what, .. } => match error.kind() {
                ErrorKind::NotFound if what == "cannot open" => Reason::SourceMissing,
                ErrorKind::PermissionDenied if is_outside(&error) => Reason::UriNotAllowed,
                ErrorKind::PermissionDenied => Reason::StorageDenied,
                _ => Reason::StorageFailed,
            },
            CheckpointError::Read { error, .. } if error.kind() == ErrorKind::PermissionDenied => Reason::StorageDenied,
            CheckpointError::Read { .. } => Reason::StorageFailed,
            CheckpointError::Uri { .. } => Reason::UriInvalid,
            CheckpointError::NotAllowed { .. } => Reason::UriNotAllowed,
            CheckpointError::Malformed { .. }
            | CheckpointError::Gguf { .. }
            | CheckpointError::Columns { .. }
            | CheckpointError::Model { .. }
            | CheckpointError::Module { .. }
            | CheckpointError::Foreign { .. }
            | CheckpointError::NothingQuantized { .. }
            | CheckpointError::Twice { .. } => Reason::SourceMalformed,
            CheckpointError::NoFolder { .. } | CheckpointError::NoFile { .. } | CheckpointError::Exists { .. } => {
                Reason::SinkExists
            }
            CheckpointError::JobChanged { .. } | CheckpointError::JobRuns { .. } | CheckpointError::Overlap { .. } => {
                Reason::SinkTaken
            }
            CheckpointError::Gate { .. } => Reason::QualityMissed,
            // These say it themselves.
            CheckpointError::Command { reason, message } | CheckpointError::Layer { reason, message } => {
                return Fault { reason, message };
            }
            _ => Reason::Internal,
        };
        Fault { reason, message }
    }
}

/// Whether a path was not followed.
fn is_outside(error: &std::io::Error) -> bool {
    error.get_ref().is_some_and(|why| why.is::<Outside>())
}

impl From<LayerError> for Fault {
    fn from(LayerError(Note { reason, message }): LayerError) -> Fault {
        Fault { reason, message }
    }
}

impl From<Refused> for Fault {
    fn from(refused: Refused) -> Fault {
        Fault::new(
            Reason::SpanTooLarge,
            format!(
                "rows that are computed together need, with their results, {refused}: send the layer in smaller runs"
            ),
        )
    }
}

impl From<TooLong> for Fault {
    fn from(long: TooLong) -> Fault {
        Fault::new(Reason::Internal, format!("an answer of {long}"))
    }
}

impl From<Panicked> for Fault {
    fn from(panicked: Panicked) -> Fault {
        tracing::error!(%panicked, "a bug: please report it");
        Fault::ours()
    }
}

/// Why a request has no next message.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The client did something wrong, and can be told.
    Fault(Fault),
    /// The client is gone.
    Gone,
}

impl From<Broken> for Option<Fault> {
    fn from(broken: Broken) -> Option<Fault> {
        match broken {
            Broken::Fault(fault) => Some(fault),
            Broken::Gone => None,
        }
    }
}

/// What tonic says of a broken request, which our framing is compared with.
#[cfg(test)]
pub(crate) fn of_transport(status: &Status, message_bytes_max: usize) -> Broken {
    match status.code() {
        Code::OutOfRange => Broken::Fault(message_too_large(message_bytes_max)),
        // A reset, a closed connection, a deadline.
        Code::Cancelled | Code::Unknown | Code::Unavailable | Code::DeadlineExceeded => Broken::Gone,
        _ => Broken::Fault(broken_off(status.message())),
    }
}

/// What is no message.
pub(crate) fn of_malformed(why: &Malformed, message_bytes_max: usize) -> Fault {
    match why {
        Malformed::TooLarge { .. } => message_too_large(message_bytes_max),
        other => broken_off(&other.to_string()),
    }
}

pub(crate) fn message_too_large(message_bytes_max: usize) -> Fault {
    Fault::new(
        Reason::MessageTooLarge,
        format!(
            "a message is over `message_bytes_max` {message_bytes_max}: send fewer rows in a batch, or a layer in runs"
        ),
    )
}

/// A request whose bytes are no gRPC messages.
pub(crate) fn broken_off(why: &str) -> Fault {
    Fault::new(Reason::FrameInvalid, format!("the request broke off: {why}"))
}

/// Verbs that are not here.
pub(crate) fn unsupported(instead: &str) -> Status {
    Fault::new(Reason::VerbUnsupported, instead).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_keeps_its_reason_and_both_ends() {
        let status = Status::from(Fault::new(Reason::LayerRepeated, format!("layer `{}` ends", "é".repeat(5_000))));
        assert!(status.message().len() <= MESSAGE_BYTES_MAX);
        assert!(status.message().starts_with("[layer_repeated] layer `é"));
        assert!(status.message().ends_with("é` ends"));
    }
}
