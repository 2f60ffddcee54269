//! START HERE: the whole path of a stream, `frames -> decode -> plan -> rows -> pool: compute -> answers -> encode -> frames`.
//!
//! [`open`] returns the response at once: a client may wait for headers before it writes, and a bad command is an error
//! of the stream. Everything else runs in two halves: [`Stream::read`], in a task of its own, turns messages into units (`reader`)
//! and starts them on the pool; there each is computed and, in order, answered (`sequence`). What lies between is bounded by
//! permits: one is taken before a unit is computed and travels with its result until the bytes have left.
//!
//! Not here: what a row becomes (`engine`), Arrow IPC (the `engine`'s `ipc`, `replies`), gRPC (`wire`, `service`, `status`).

use std::{mem::take, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt};
use quarrel_engine::{Cancel, LayerError, Need, Output, Plan, Unit, shorten};
use quarrel_pool::{Landing, Lane, Reservation, Share, Wait};
use quarrel_proto::{Reason, command};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug_span, info_span};

use crate::{
    command::plan_of,
    frame::FrameIn,
    outbox::{Outbox, Responses, outbox},
    reader::Reader,
    replies::Replies,
    sequence::{Sequence, Ticket},
    shared::{Place, Shared},
    stack::Peer,
    status::{Broken, Fault},
    telemetry,
};

/// A unit of so many bytes is spread over all threads; smaller ones are computed side by side.
const WIDE_BYTES: usize = 8 << 20;
/// How much of one stream waits for each thread: two of the largest units that are computed side by side. More would be memory that
/// makes nothing faster.
const PENDING_BYTES: usize = 8 << 20;
/// By how much what a stream remembers may grow before it is charged again.
const CHARGE_STEP: usize = 64 << 10;

/// Starts a stream of a peer, with its share of the budget, and returns its response. The connection is closed under a client that does not read even the
/// error. Its command must come within `patience`.
pub(crate) fn open<R, F>(
    shared: Arc<Shared>,
    frames: F,
    share: Arc<Share>,
    peer: Peer,
    patience: Duration,
) -> Result<Responses<R::Item>, Fault>
where
    R: Replies,
    F: futures::Stream<Item = Result<FrameIn, Broken>> + Send + Unpin + 'static,
{
    let place = shared.place(&peer.streams)?;
    let stop = CancellationToken::new();
    let (outbox, responses) = outbox(stop.clone());
    let span = info_span!("stream", id = place.id, command = tracing::field::Empty);
    let lane = shared.pool.lane();
    let (cancel, connection) = (Cancel::default(), peer.kill);
    let stream = Stream::<R> { shared, share, outbox, stop, cancel, lane, connection, patience };
    tokio::spawn(stream.run(frames, place).instrument(span));
    Ok(responses)
}

/// One stream.
struct Stream<R: Replies> {
    shared: Arc<Shared>,
    share: Arc<Share>,
    outbox: Outbox<R::Item>,
    /// Cancelled when the client is gone.
    stop: CancellationToken,
    /// Stops what computes.
    cancel: Cancel,
    lane: Lane,
    connection: CancellationToken,
    /// Until the command has come.
    patience: Duration,
}

/// Why reading stopped.
enum Stopped {
    /// There is nobody to tell.
    Gone,
    /// An error that follows what was computed before it.
    InOrder(Fault),
    /// An error at once: nobody takes what was computed.
    AtOnce(Fault),
}

impl From<Fault> for Stopped {
    fn from(fault: Fault) -> Stopped {
        Stopped::InOrder(fault)
    }
}

impl From<Broken> for Stopped {
    fn from(broken: Broken) -> Stopped {
        match broken {
            Broken::Fault(fault) => Stopped::InOrder(fault),
            Broken::Gone => Stopped::Gone,
        }
    }
}

impl From<LayerError> for Stopped {
    fn from(error: LayerError) -> Stopped {
        Stopped::InOrder(error.into())
    }
}

impl<R: Replies> Stream<R> {
    async fn run<F>(self, mut frames: F, place: Place)
    where
        F: futures::Stream<Item = Result<FrameIn, Broken>> + Send + Unpin + 'static,
    {
        let started = Instant::now();
        let _guard = EndGuard(self.outbox.clone());
        let ended = tokio::select! {
            // A client that has taken the end is gone at once: that is no loss.
            biased;
            ended = self.opened(&mut frames, started) => ended,
            () = self.stop.cancelled() => Err(None),
            () = self.shared.stopped.cancelled() => {
                self.outbox.discard();
                Err(Some(Fault::new(Reason::Stopping, "the server has stopped before the stream was done: try again")))
            }
            () = sleep_until(started + Duration::from_secs(self.shared.config.stream_seconds)) => {
                self.outbox.discard();
                let seconds = self.shared.config.stream_seconds;
                let what = format!("the stream took longer than {seconds} s (`stream_seconds`): send fewer layers in one");
                Err(Some(Fault::new(Reason::StreamTimeout, what)))
            }
        };
        self.cancel.cancel();
        self.share.give_up();
        telemetry::stream_ended(&ended, started.elapsed());
        if let Err(Some(fault)) = ended {
            self.outbox.end(Err(fault));
            // Polled no more, the request would be reset, and with it a client that still writes would not see why.
            tokio::select! {
                () = self.discard_request(&mut frames) => {}
                () = self.stop.cancelled() => {}
                () = self.shared.stopped.cancelled() => {}
            }
        }
        drop(place);
        // Polled once more, the request gives back what a message that never came whole has taken.
        let _ = frames.next().now_or_never();
        self.close_if_unread().await;
    }

    /// From the first message to the last; `Err(None)` if there is nobody to tell.
    async fn opened<F>(&self, frames: &mut F, started: Instant) -> Result<(), Option<Fault>>
    where
        F: futures::Stream<Item = Result<FrameIn, Broken>> + Send + Unpin + 'static,
    {
        let (plan, first) = self.plan(frames).await?;
        let schema = Arc::new(Output::reply_schema(&plan, self.shared.level.name()));
        let (replies, first_replies) = R::begin(&schema)?;
        self.outbox.push(first_replies, None);
        let sequence = Sequence::new(Output::new(&plan, schema), replies, self.outbox.clone());

        let read = tokio::select! {
            biased;
            why = sequence.broken() => return Err(why),
            read = self.read(frames, first, &plan, &sequence) => read,
        };
        match read {
            Ok(()) => sequence.answered().await?,
            Err(Stopped::InOrder(fault)) => {
                sequence.answered().await?;
                return Err(Some(fault));
            }
            Err(Stopped::Gone) => return Err(None),
            Err(Stopped::AtOnce(fault)) => {
                self.cancel.cancel();
                self.outbox.discard();
                return Err(Some(fault));
            }
        }
        self.outbox.push(vec![sequence.summary(started)?], None);
        self.outbox.end(Ok(()));
        self.drained().await
    }

    /// The first message's command, as a plan. The message may carry the schema too.
    async fn plan<F>(&self, frames: &mut F) -> Result<(Plan, FrameIn), Option<Fault>>
    where
        F: futures::Stream<Item = Result<FrameIn, Broken>> + Send + Unpin,
    {
        let missing = || Fault::from(command::CommandError::Missing);
        let first = match timeout(self.patience, frames.next()).await {
            Err(_) => {
                let seconds = self.patience.as_secs();
                let what = format!("no command came within {seconds} s (`header_seconds`)");
                return Err(Some(Fault::new(Reason::HeaderTimeout, what)));
            }
            Ok(None) => return Err(Some(missing())),
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(broken))) => return Err(broken.into()),
        };
        let bytes = first.command.clone().ok_or_else(|| Some(missing()))?;
        let plan = plan_of(&self.shared, bytes).await.map_err(Some)?;
        tracing::Span::current().record("command", shorten(&command::to_json(&plan.effective), 300).as_str());
        Ok((plan, first))
    }

    /// Messages to units, started on the pool.
    async fn read<F>(
        &self,
        frames: &mut F,
        first: FrameIn,
        plan: &Plan,
        sequence: &Arc<Sequence<R>>,
    ) -> Result<(), Stopped>
    where
        F: futures::Stream<Item = Result<FrameIn, Broken>> + Send + Unpin,
    {
        let share = &*self.share;
        let mut reader = Reader::new(plan.clone(), Arc::clone(&self.shared), self.cancel.clone());
        let mut frame = Some(first);
        let mut reserved: Option<Reservation> = None;
        // Names, dictionaries and rows that wait are remembered, and count.
        let (mut charges, mut charged) = (Vec::new(), 0);
        while let Some(mut message) = frame {
            // Others have their turn, however fast messages come.
            tokio::task::consume_budget().await;
            let (is_last, landed) = (message.is_last, message.room.take().map(Arc::new));
            // Until it is computed, a unit may keep all of its message: a small one, which had no room to itself, counts with the first.
            let came = message.body.len();
            let mut roomless = if landed.is_none() { came } else { 0 };
            let mut message = Some(message);
            loop {
                let span = debug_span!("batch", bytes = message.as_ref().map_or(0, |message| message.body.len()));
                let (needs, more) = match span.in_scope(|| reader.glance(&mut message)) {
                    Some(seen) => seen,
                    None => {
                        let message = message.take();
                        let look = move || {
                            let seen = span.in_scope(|| reader.look(message.as_ref()));
                            (reader, seen)
                        };
                        let (back, seen) = self.lane.run(look).await.map_err(Fault::from)?;
                        reader = back;
                        seen
                    }
                };
                for need in needs {
                    match need {
                        Need::Span(bytes) => {
                            reserved = Some(self.room(share.reserve(bytes, came), sequence, || Wait::Others).await?);
                        }
                        Need::Unit(unit) => {
                            let span = if unit.closes_span { reserved.take() } else { None };
                            let pending = unit.bytes_in.max(take(&mut roomless));
                            sequence.turn(pending, self.shared.pool.threads() * PENDING_BYTES).await;
                            let bytes = pending + unit.bytes_out;
                            let room = share.acquire(bytes, unit.bytes_out, span);
                            let permit = self.room(room, sequence, || share.waits_for()).await?;
                            let ticket = sequence.ticket(permit, pending, unit.bytes_out);
                            self.start(unit, ticket, landed.clone());
                        }
                        Need::Rest => {}
                    }
                }
                let held = reader.held_bytes();
                if held > charged + CHARGE_STEP {
                    let more = held - charged;
                    charges.push(self.room(share.acquire(more, more, None), sequence, || share.waits_for()).await?);
                    charged = held;
                }
                if !more? {
                    break;
                }
            }
            // Its rows have room of their own; units that are not computed yet still hold it.
            drop(landed);
            frame = if is_last { None } else { self.next_frame(frames, sequence).await? };
        }
        reader.end().map_err(Stopped::from)
    }

    /// Starts a unit on the pool.
    fn start(&self, unit: Unit, ticket: Ticket<R>, landed: Option<Arc<Landing>>) {
        let (shared, cancel, span) = (Arc::clone(&self.shared), self.cancel.clone(), tracing::Span::current());
        let is_wide = unit.bytes_in >= WIDE_BYTES;
        let compute = move || {
            let result = unit.compute(shared.level, &cancel, &shared.shelf);
            drop(landed);
            result
        };
        let job = move || span.in_scope(|| ticket.run(compute));
        drop(if is_wide { self.lane.run_wide(job) } else { self.lane.run(job) });
    }

    /// The next message; `idle` if there is none for so long, though nothing computes and no result is taken.
    async fn next_frame<F>(&self, frames: &mut F, sequence: &Sequence<R>) -> Result<Option<FrameIn>, Stopped>
    where
        F: futures::Stream<Item = Result<FrameIn, Broken>> + Send + Unpin,
    {
        let idle_after = Duration::from_secs(self.shared.config.idle_seconds);
        let mut began = Instant::now();
        loop {
            let moved = self.outbox.last_taken().max(began);
            match timeout_at(moved + idle_after, frames.next()).await {
                Ok(frame) => return Ok(frame.transpose()?),
                Err(_) if self.outbox.last_taken() > moved => {}
                Err(_) if sequence.is_working() || self.share.is_landing() => began = Instant::now(),
                Err(_) => return Err(Stopped::AtOnce(Fault::idle(self.shared.config.idle_seconds))),
            }
        }
    }

    /// Waits for room, as long as something moves: room must come, a unit be computed, or the client take results.
    /// `waits_for` says whose room it is.
    async fn room<T>(
        &self,
        room: impl Future<Output = Result<T, quarrel_pool::Refused>>,
        sequence: &Sequence<R>,
        waits_for: impl Fn() -> Wait,
    ) -> Result<T, Stopped> {
        let stall = Duration::from_secs(self.shared.config.stall_seconds);
        let mut began = Instant::now();
        tokio::pin!(room);
        loop {
            let moved = self.outbox.last_taken().max(began);
            tokio::select! {
                got = &mut room => return got.map_err(|refused| Stopped::InOrder(refused.into())),
                () = sleep_until(moved + stall) => {}
            }
            if self.outbox.last_taken() > moved {
                continue;
            }
            if sequence.is_working() {
                began = Instant::now();
                continue;
            }
            let seconds = self.shared.config.stall_seconds;
            let waits_for = waits_for();
            if waits_for != Wait::Others && self.outbox.is_waiting() {
                let what = format!(
                    "results fill this stream's part of `memory_bytes_max` and none was taken for {seconds} s \
                     (`stall_seconds`): read while you write, from a second thread or batch by batch"
                );
                return Err(Stopped::AtOnce(Fault::new(Reason::ClientNotReading, what)));
            }
            if waits_for == Wait::Half {
                let what = "rows that wait for their span fill this stream's half of `memory_bytes_max`: \
                            send fewer, longer rows";
                return Err(Stopped::InOrder(Fault::new(Reason::SpanTooLarge, what)));
            }
            let what = format!("no room in `memory_bytes_max` for {seconds} s (`stall_seconds`): try again later");
            return Err(Stopped::InOrder(Fault::new(Reason::Busy, what)));
        }
    }

    /// Reads the rest of a request that has failed: a status cannot overtake what flow control holds back.
    async fn discard_request<F>(&self, frames: &mut F)
    where
        F: futures::Stream<Item = Result<FrameIn, Broken>> + Send + Unpin,
    {
        let seconds = Duration::from_secs(self.shared.config.discard_seconds);
        let _ = timeout(seconds, async { while let Some(Ok(_)) = frames.next().await {} }).await;
    }

    /// Waits until the client has taken everything, or has stopped taking.
    async fn drained(&self) -> Result<(), Option<Fault>> {
        let idle_after = Duration::from_secs(self.shared.config.idle_seconds);
        while self.outbox.is_waiting() {
            if timeout(idle_after, self.outbox.taken()).await.is_err() {
                self.outbox.discard();
                return Err(Some(Fault::idle(self.shared.config.idle_seconds)));
            }
        }
        Ok(())
    }

    /// Closes the connection under a client that takes nothing any more, not even the end. With an idle stream's patience:
    /// a slow reader's windows open in steps of megabytes.
    async fn close_if_unread(&self) {
        let patience = Duration::from_secs(self.shared.config.idle_seconds);
        let mut moved = Instant::now();
        while timeout_at(moved + patience, self.stop.cancelled()).await.is_err() {
            if self.outbox.last_taken() <= moved {
                self.connection.cancel();
                return;
            }
            moved = self.outbox.last_taken();
        }
    }
}

/// Ends a response whose task has panicked, so that no client waits for ever.
struct EndGuard<T>(Outbox<T>);

impl<T> Drop for EndGuard<T> {
    fn drop(&mut self) {
        self.0.end(Err(Fault::ours()));
    }
}
