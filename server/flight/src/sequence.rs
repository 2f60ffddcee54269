//! Results to answers in the order of their units, whichever thread has computed them.
//!
//! The thread that finishes the next result makes frames of it, and of those behind it that are ready, so that no result waits
//! for another thread to wake.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use arrow_array::RecordBatch;
use quarrel_engine::{Cancelled, Output};
use quarrel_pool::Permit;
use quarrel_proto::{Reason, json};
use quarrel_wire::{Encoder, FrameOut};
use tokio::{sync::Notify, time::Instant};

use crate::{outbox::Outbox, status::Fault};

/// The writing half of a stream.
pub(crate) struct Sequence {
    state: Mutex<State>,
    outbox: Outbox,
    /// All that was asked for is answered, or nothing more will be.
    settled: Notify,
    /// A unit is computed.
    computed: Notify,
}

struct State {
    /// Tickets given out, and those answered.
    issued: u64,
    answered: u64,
    /// Bytes of units that are not computed yet.
    pending_bytes: usize,
    /// What waits for those before it; absent where computing has failed.
    ready: BTreeMap<u64, Option<(quarrel_engine::Result, Permit)>>,
    /// Absent while a thread makes frames with it.
    writer: Option<Writer>,
    /// Why nothing more is answered; `None` within if there is nobody to tell.
    broken: Option<Option<Fault>>,
    /// How long units waited, and were computed.
    queue: Duration,
    kernel: Duration,
}

struct Writer {
    output: Output,
    encoder: Encoder,
}

/// A unit's place in the order. Dropped without a result, which a panic does, it breaks the stream.
pub(crate) struct Ticket {
    sequence: Arc<Sequence>,
    index: u64,
    /// The room that the unit holds. It travels with the result.
    permit: Option<Permit>,
    bytes_in: usize,
    bytes_out: usize,
    queued: Instant,
    is_spent: bool,
}

impl Sequence {
    pub(crate) fn new(output: Output, encoder: Encoder, outbox: Outbox) -> Arc<Sequence> {
        let state = State {
            issued: 0,
            answered: 0,
            pending_bytes: 0,
            ready: BTreeMap::new(),
            writer: Some(Writer { output, encoder }),
            broken: None,
            queue: Duration::ZERO,
            kernel: Duration::ZERO,
        };
        Arc::new(Sequence { state: Mutex::new(state), outbox, settled: Notify::new(), computed: Notify::new() })
    }

    /// Waits until what waits to be computed, with so many bytes more, is at most `most`. One unit there may always be.
    pub(crate) async fn turn(&self, bytes: usize, most: usize) {
        loop {
            let computed = self.computed.notified();
            let pending = self.state().pending_bytes;
            if pending == 0 || pending + bytes <= most {
                return;
            }
            computed.await;
        }
    }

    /// The next place. `permit` is for the unit, which has `bytes_in`, and its results, which take `bytes_out` of it.
    pub(crate) fn ticket(self: &Arc<Self>, permit: Permit, bytes_in: usize, bytes_out: usize) -> Ticket {
        let mut state = self.state();
        let index = state.issued;
        state.issued += 1;
        state.pending_bytes += bytes_in;
        Ticket {
            sequence: Arc::clone(self),
            index,
            permit: Some(permit),
            bytes_in,
            bytes_out,
            queued: Instant::now(),
            is_spent: false,
        }
    }

    /// Whether results are missing.
    pub(crate) fn is_working(&self) -> bool {
        let state = self.state();
        state.answered < state.issued && state.broken.is_none()
    }

    /// Waits until every ticket is answered.
    ///
    /// # Errors
    /// Why not all will be.
    pub(crate) async fn answered(&self) -> Result<(), Option<Fault>> {
        self.settled(|state| state.answered == state.issued).await
    }

    /// Waits until nothing more will be answered, and why.
    pub(crate) async fn broken(&self) -> Option<Fault> {
        self.settled(|_| false).await.err().flatten()
    }

    async fn settled(&self, is_done: impl Fn(&State) -> bool) -> Result<(), Option<Fault>> {
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            // From here on, so that nothing is missed between the look and the wait.
            settled.as_mut().enable();
            {
                let mut state = self.state();
                if let Some(fault) = &mut state.broken {
                    return Err(fault.take());
                }
                if is_done(&state) {
                    return Ok(());
                }
            }
            settled.await;
        }
    }

    /// The last frame, after all answers: the stream's totals.
    pub(crate) fn summary(&self, started: Instant) -> Result<FrameOut, Fault> {
        let mut state = self.state();
        let (queue, kernel) = (state.queue, state.kernel);
        let Some(writer) = &mut state.writer else {
            return Err(Fault::new(Reason::Internal, "the stream ended before its answers"));
        };
        let mut summary = writer.output.summary();
        summary.queue_seconds = queue.as_secs_f64();
        summary.kernel_seconds = kernel.as_secs_f64();
        summary.total_seconds = started.elapsed().as_secs_f64();
        let empty = RecordBatch::new_empty(Arc::clone(writer.output.schema_ref()));
        writer.encoder.batch(&empty, json::summary(&summary)).map_err(encoding)
    }

    /// Takes a unit's result, and makes frames of all that is next. One that failed breaks the stream in its place.
    fn answer(&self, index: u64, result: Option<(quarrel_engine::Result, Permit)>) {
        let mut state = self.state();
        if state.broken.is_some() {
            return;
        }
        state.ready.insert(index, result);
        while let Some(mut writer) = state.writer.take() {
            let next = state.answered;
            let Some(result) = state.ready.remove(&next) else {
                state.writer = Some(writer);
                break;
            };
            drop(state);
            let Some((result, permit)) = result else { return self.break_off(Some(Fault::ours())) };
            let (frames, ended) = writer.answers(result);
            self.outbox.push(frames, Some(permit));
            if let Err(fault) = ended {
                return self.break_off(Some(fault));
            }
            state = self.state();
            state.answered += 1;
            state.writer = Some(writer);
        }
        if state.answered == state.issued {
            drop(state);
            self.settled.notify_waiters();
        }
    }

    fn break_off(&self, why: Option<Fault>) {
        let mut state = self.state();
        state.broken.get_or_insert(why);
        let ready = std::mem::take(&mut state.ready);
        drop(state);
        drop(ready);
        self.settled.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic between two lines of this file leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket {
    /// Computes the unit and answers it, and what waited for it.
    pub(crate) fn run(mut self, compute: impl FnOnce() -> Result<quarrel_engine::Result, Cancelled>) {
        let began = Instant::now();
        let result = compute();
        self.sequence.state().pending_bytes -= self.bytes_in;
        self.sequence.computed.notify_one();
        match (result, self.permit.take()) {
            (Ok(result), Some(mut permit)) => {
                permit.shrink_to(self.bytes_out);
                let mut state = self.sequence.state();
                state.queue += began - self.queued;
                state.kernel += began.elapsed();
                drop(state);
                self.sequence.answer(self.index, Some((result, permit)));
            }
            // Cancelled: there is nobody to tell.
            _ => self.sequence.break_off(None),
        }
        self.is_spent = true;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.is_spent {
            tracing::error!("a bug, a unit was not computed or answered: please report it");
            match self.permit {
                Some(_) => self.sequence.answer(self.index, None),
                // Whoever makes frames of it has the writer, and does not bring it back.
                None => self.sequence.break_off(Some(Fault::ours())),
            }
        }
    }
}

impl Writer {
    /// Answers of one result, as frames; and the fault that ends the stream after them.
    fn answers(&mut self, result: quarrel_engine::Result) -> (Vec<FrameOut>, Result<(), Fault>) {
        let (answers, ended) = self.output.take(result);
        let frames: Result<_, _> = answers
            .iter()
            .map(|answer| self.encoder.batch(&answer.batch, json::progress(&answer.progress)).map_err(encoding))
            .collect();
        match frames {
            Ok(frames) => (frames, ended.map_err(Fault::from)),
            Err(fault) => (Vec::new(), Err(fault)),
        }
    }
}

fn encoding(error: arrow_schema::ArrowError) -> Fault {
    tracing::error!(%error, "an answer cannot be encoded");
    Fault::new(Reason::Internal, "an answer cannot be encoded; the server's log says more")
}
