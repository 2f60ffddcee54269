//! DoGet: a stored checkpoint, quantized on the way. It is a stream of `exchange` whose rows the server reads itself.

use std::{sync::Arc, time::Duration};

use arrow_buffer::{Buffer, MutableBuffer};
use arrow_flight::FlightData;
use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use quarrel_checkpoint::{CheckpointError, Location, Pull, Stop};
use quarrel_engine::Limits;
use quarrel_proto::{
    Reason,
    command::{parse, to_json},
    v1::{self, command::Verb},
};
use quarrel_wire::{Encoder, FrameOut, schema_frame};
use tonic::Status;

use crate::{
    exchange,
    frame::FrameIn,
    replies::Messages,
    shared::Shared,
    stack::Peer,
    status::{Broken, Fault},
};

/// The answers to a ticket, which is a command with a `source`.
pub(crate) async fn open(
    shared: &Arc<Shared>,
    ticket: Bytes,
    peer: Peer,
) -> Result<impl Stream<Item = Result<FlightData, Status>> + Send + 'static, Fault> {
    // Patterns are compiled, and links of a path looked at: on a thread that may block.
    let of = Arc::clone(shared);
    let asked = tokio::task::spawn_blocking(move || asked(&of, &ticket)).await;
    let (source, quantize) = asked.map_err(|_| Fault::ours())??;
    // Its first word may be long in coming: where layers share a scale, all of them are read before.
    let patience = Duration::from_secs(shared.config.stream_seconds);
    let share = Arc::new(shared.budget.share());
    let limits = shared.config.layer_limits();
    let frames = stream::once(pulled(source, quantize, limits)).try_flatten().boxed();
    let responses = exchange::open::<Messages, _>(Arc::clone(shared), frames, share, peer, patience)?;
    Ok(responses.map(|frame| Ok(data(frame?))))
}

/// What a ticket asks for. A mistake of its command is an error of the call, not of its stream.
fn asked(shared: &Shared, ticket: &[u8]) -> Result<(Location, v1::Quantize), Fault> {
    let command = parse(ticket)?;
    let unsupported = |what: &str| Fault::new(Reason::VerbUnsupported, what);
    let (uri, quantize) = match (command.source, command.sink, &command.verb) {
        (None, ..) => {
            return Err(unsupported("a ticket names a `source`: send layers that are yours with DoExchange"));
        }
        (_, Some(_), _) => {
            return Err(unsupported("a ticket names no `sink`: submit a job with DoAction `job.submit`"));
        }
        (Some(uri), None, Some(Verb::Quantize(quantize))) => (uri, quantize.clone()),
        (Some(_), None, _) => {
            return Err(unsupported(
                "DoGet serves `quantize` alone: submit a job with DoAction `job.submit`, or send rows with DoExchange",
            ));
        }
    };
    let source = shared.jobs.source(&uri)?;
    quarrel_engine::Plan::new(&v1::Command { verb: command.verb, ..v1::Command::default() })?;
    Ok((source, quantize))
}

/// A checkpoint's messages, as a client would send them.
async fn pulled(
    source: Location,
    command: v1::Quantize,
    limits: Limits,
) -> Result<impl Stream<Item = Result<FrameIn, Broken>> + Send + 'static, Broken> {
    let stop = StopWhenDropped::default();
    let stopped = Arc::clone(&stop.0);
    let opened = tokio::task::spawn_blocking(move || Pull::open(&source, command, limits, &stopped)).await;
    let pull = opened.map_err(|error| broken(CheckpointError::Ours(error.to_string())))?.map_err(broken)?;
    let command = Bytes::from(to_json(&pull.command));
    let (schema, rows) = pull.rows();
    let mut encoder = Encoder::new(&schema).map_err(unencodable)?;
    let first = FrameIn { command: Some(command), header: schema_frame(&schema).header, ..FrameIn::default() };
    let rows = rows.map(move |row| {
        let frames = encoder.batch(&row.map_err(broken)?, "").map_err(unencodable)?;
        let came = |FrameOut { header, body, .. }| Ok(FrameIn { header, body: joined(&body), ..FrameIn::default() });
        Ok(stream::iter(frames.into_iter().map(came)))
    });
    Ok(stream::iter([Ok(first)]).chain(rows.try_flatten()))
}

/// Whoever pulled has gone: nothing more is read for it.
#[derive(Default)]
struct StopWhenDropped(Arc<Stop>);

impl Drop for StopWhenDropped {
    fn drop(&mut self) {
        self.0.stop();
    }
}

fn broken(error: CheckpointError) -> Broken {
    Broken::Fault(error.into())
}

fn unencodable(error: arrow_schema::ArrowError) -> Broken {
    Broken::Fault(Fault::new(Reason::Internal, error.to_string()))
}

fn joined(pieces: &[Buffer]) -> Buffer {
    let mut whole = MutableBuffer::with_capacity(pieces.iter().map(Buffer::len).sum());
    pieces.iter().for_each(|piece| whole.extend_from_slice(piece));
    whole.into()
}

fn data(frame: FrameOut) -> FlightData {
    FlightData {
        flight_descriptor: None,
        data_header: frame.header,
        app_metadata: frame.metadata,
        data_body: Bytes::from_owner(joined(&frame.body)),
    }
}
