//! One stream on one connection: rows out, answers in, both at once.
//!
//! The receiving half takes every answer as soon as it is there. The sending half waits while the consumer has too many
//! of them untaken, and meanwhile says now and then that it is alive. So no side ever waits for the other in a circle.

use std::{
    collections::VecDeque,
    ops::Range,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use arrow_array::RecordBatch;
use arrow_flight::{FlightDescriptor, decode::DecodedPayload};
use arrow_schema::{ArrowError, SchemaRef};
use bytes::Bytes;
use futures::{StreamExt, future::poll_immediate};
use prost::Message;
use quarrel_proto::{json, metadata};
use quarrel_wire::{Encoder, FrameOut, schema_frame};
use tokio::{sync::mpsc, time::timeout};
use tonic::transport::Channel;

use crate::{
    client::Limits,
    cut::Cut,
    error::Error,
    feed::{Feed, lock},
    wire::{self, Next},
};

/// Rows of small layers share a message up to so many bytes.
const MESSAGE_BYTES: usize = 1 << 20;

/// What a stream does with layers.
pub(crate) trait Verb: Send + Sync + 'static {
    type Layer: Clone + Send + Sync + 'static;
    type Row: Send + 'static;
    type Answer: Send + 'static;

    /// The command, as protobuf.
    fn command(&self) -> Vec<u8>;
    /// The columns that are sent.
    fn schema(&self) -> SchemaRef;
    /// How a layer is cut; an error if it does not fit together.
    fn cut(&self, layer: &Self::Layer, message_bytes_max: u64) -> Result<Cut, Error>;
    /// Whether reading a row may block.
    fn blocks(layer: &Self::Layer) -> bool;
    /// Reads a row.
    fn read(layer: &Self::Layer, cut: Cut, channels: Range<u64>) -> Result<Self::Row, Error>;
    /// Bytes of a row.
    fn bytes(row: &Self::Row) -> usize;
    /// Rows as a batch.
    fn batch(&self, rows: Vec<Self::Row>) -> Result<RecordBatch, Error>;
    /// Takes a batch of answers to the layers under way, in order; those that are complete leave `underway`.
    fn take(
        &self,
        batch: &RecordBatch,
        underway: &mut VecDeque<Underway<Self::Layer>>,
    ) -> Result<Vec<(Self::Answer, usize)>, Error>;
}

/// A layer that was sent, at least in part, and not yet answered whole.
#[derive(Debug)]
pub(crate) struct Underway<L> {
    pub(crate) layer: L,
    pub(crate) cut: Cut,
    /// What is answered: rows or elements, as the verb counts.
    pub(crate) done: u64,
}

/// The layers of one stream that are under way.
type Line<V> = Mutex<VecDeque<Underway<<V as Verb>::Layer>>>;

/// Sends layers from `feed` and hands it their answers, until there are no more. After an error, what was not answered
/// whole is with the feed again. A long silence is broken by a message that says nothing.
pub(crate) async fn exchange<V: Verb>(
    channel: Channel,
    verb: &Arc<V>,
    feed: &Feed<V>,
    limits: Limits,
) -> Result<(), Error> {
    let line: Line<V> = Mutex::default();
    let (sender, receiver) = mpsc::channel(1);
    let sent_all = AtomicBool::new(false);
    let send = send(verb, feed, &line, Outgoing { sender, limits, sent_all: &sent_all });
    let receive = receive(channel, receiver, verb, feed, &line, &sent_all);
    let ended = tokio::try_join!(send, receive).map(drop);
    feed.give_back(lock(&line).drain(..).map(|underway| underway.layer));
    ended
}

/// The stream's other half has ended, and knows why.
struct Gone;

/// The request, message by message.
struct Outgoing<'a> {
    sender: mpsc::Sender<Next>,
    limits: Limits,
    sent_all: &'a AtomicBool,
}

impl Outgoing<'_> {
    async fn push(&self, message: FrameOut) -> Result<(), Gone> {
        self.sender.send(Next::Message(message)).await.map_err(|_| Gone)
    }

    /// Waits, and keeps the server from taking the silence for an idle stream.
    async fn alive<T>(&self, wait: impl Future<Output = T>) -> Result<T, Gone> {
        let mut wait = pin!(wait);
        loop {
            match timeout(self.limits.alive_every, &mut wait).await {
                Ok(value) => return Ok(value),
                Err(_) => self.push(FrameOut { metadata: Bytes::from_static(b"alive"), ..FrameOut::default() }).await?,
            }
        }
    }
}

async fn send<V: Verb>(verb: &Arc<V>, feed: &Feed<V>, line: &Line<V>, out: Outgoing<'_>) -> Result<(), Error> {
    match send_all(verb, feed, line, &out).await {
        // The receiving half says why.
        Ok(()) | Err(Stop::Gone) => Ok(()),
        Err(Stop::Error(error)) => Err(error),
    }
}

enum Stop {
    Gone,
    Error(Error),
}

impl From<Gone> for Stop {
    fn from(Gone: Gone) -> Stop {
        Stop::Gone
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Stop {
        Stop::Error(error)
    }
}

async fn send_all<V: Verb>(verb: &Arc<V>, feed: &Feed<V>, line: &Line<V>, out: &Outgoing<'_>) -> Result<(), Stop> {
    let schema = verb.schema();
    let mut encoder = Encoder::new(&schema).map_err(unencodable)?;
    let command = FlightDescriptor::new_cmd(verb.command()).encode_to_vec();
    out.push(FrameOut { descriptor: command.into(), ..schema_frame(&schema) }).await?;
    let (mut rows, mut bytes) = (Vec::new(), 0);
    loop {
        let mut next = pin!(feed.next());
        let layer = match poll_immediate(&mut next).await {
            Some(layer) => layer,
            None => {
                // Nothing waits for a layer that may be long in coming.
                flush(verb, &mut encoder, out, &mut rows).await?;
                bytes = 0;
                out.alive(next).await?
            }
        };
        let Some(layer) = layer.transpose()? else { break };
        let cut = verb.cut(&layer, out.limits.message_bytes_max)?;
        lock(line).push_back(Underway { layer: layer.clone(), cut, done: 0 });
        for row in 0..cut.rows() {
            out.alive(feed.room()).await?;
            let row = read::<V>(&layer, cut, cut.channels(row)).await?;
            let is_full = rows.len() as u64 == out.limits.batch_rows_max;
            if is_full
                || !rows.is_empty()
                    && bytes + V::bytes(&row) > MESSAGE_BYTES.min(out.limits.message_bytes_max as usize / 2)
            {
                flush(verb, &mut encoder, out, &mut rows).await?;
                bytes = 0;
            }
            bytes += V::bytes(&row);
            rows.push(row);
        }
    }
    flush(verb, &mut encoder, out, &mut rows).await?;
    out.sent_all.store(true, Ordering::Release);
    out.sender.send(Next::End).await.map_err(|_| Stop::Gone)
}

async fn read<V: Verb>(layer: &V::Layer, cut: Cut, channels: Range<u64>) -> Result<V::Row, Error> {
    if !V::blocks(layer) {
        return V::read(layer, cut, channels);
    }
    let layer = layer.clone();
    match tokio::task::spawn_blocking(move || V::read(&layer, cut, channels)).await {
        Ok(row) => row,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // It never began, since the runtime is stopping: so is this task, and nobody waits for the row.
            Err(_) => std::future::pending().await,
        },
    }
}

async fn flush<V: Verb>(
    verb: &Arc<V>,
    encoder: &mut Encoder,
    out: &Outgoing<'_>,
    rows: &mut Vec<V::Row>,
) -> Result<(), Stop> {
    if !rows.is_empty() {
        let batch = verb.batch(std::mem::take(rows))?;
        for frame in encoder.batch(&batch, "").map_err(unencodable)? {
            out.push(frame).await?;
        }
    }
    Ok(())
}

fn unencodable(error: ArrowError) -> Error {
    Error::Answer { detail: format!("a batch cannot be sent: {error}") }
}

async fn receive<V: Verb>(
    channel: Channel,
    requests: mpsc::Receiver<Next>,
    verb: &Arc<V>,
    feed: &Feed<V>,
    line: &Line<V>,
    sent_all: &AtomicBool,
) -> Result<(), Error> {
    let mut responses = wire::open(channel, requests).await?;
    while let Some(message) = responses.next().await {
        let message = message.map_err(wire::error)?;
        match message.payload {
            DecodedPayload::None => {}
            DecodedPayload::Schema(schema) => {
                if let Some(command) = schema.metadata().get(metadata::COMMAND) {
                    feed.effective(command);
                }
            }
            DecodedPayload::RecordBatch(batch) if batch.num_rows() == 0 => {
                return feed.ended(
                    summary(&message.inner.app_metadata)?,
                    sent_all.load(Ordering::Acquire) && lock(line).is_empty(),
                );
            }
            DecodedPayload::RecordBatch(batch) => {
                let answers = verb.take(&batch, &mut lock(line))?;
                feed.answered(answers);
            }
        }
    }
    // A request that was cancelled on the way reads as a clean end.
    Err(Error::Unreachable { detail: "the stream ended before its summary".to_owned() })
}

fn summary(bytes: &Bytes) -> Result<quarrel_proto::v1::Summary, Error> {
    json::read_summary(bytes)
        .map_err(|error| Error::Answer { detail: format!("its summary is no quarrel.v1.Summary: {error}") })
}
