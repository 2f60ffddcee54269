//! Results to answers in the order of their units, whichever thread has computed them.
//!
//! The thread that finishes the next result makes replies of it, and of those behind it that are ready, so that no result waits
//! for another thread to wake.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use quarrel_engine::{Cancelled, Output};
use quarrel_pool::Permit;
use quarrel_proto::Reason;
use tokio::{sync::Notify, time::Instant};

use crate::{outbox::Outbox, replies::Replies, status::Fault};

/// The writing half of a stream.
pub(crate) struct Sequence<R: Replies> {
    state: Mutex<State<R>>,
    outbox: Outbox<R::Item>,
    /// All that was asked for is answered, or nothing more will be.
    settled: Notify,
    /// A unit is computed.
    computed: Notify,
}

struct State<R> {
    /// Tickets given out, and those answered.
    issued: u64,
    answered: u64,
    /// Bytes of units that are not computed yet.
    pending_bytes: usize,
    /// What waits for those before it; absent where computing has failed.
    ready: BTreeMap<u64, Option<(quarrel_engine::Result, Permit)>>,
    /// Absent while a thread makes replies with it.
    writer: Option<Writer<R>>,
    /// Why nothing more is answered; `None` within if there is nobody to tell.
    broken: Option<Option<Fault>>,
    /// How long units waited, and were computed.
    queue: Duration,
    kernel: Duration,
}

struct Writer<R> {
    output: Output,
    replies: R,
}

/// A unit's place in the order. Dropped without a result, which a panic does, it breaks the stream.
pub(crate) struct Ticket<R: Replies> {
    sequence: Arc<Sequence<R>>,
    index: u64,
    /// The room that the unit holds. It travels with the result.
    permit: Option<Permit>,
    bytes_in: usize,
    bytes_out: usize,
    queued: Instant,
    is_spent: bool,
}

impl<R: Replies> Sequence<R> {
    pub(crate) fn new(output: Output, replies: R, outbox: Outbox<R::Item>) -> Arc<Sequence<R>> {
        let state = State {
            issued: 0,
            answered: 0,
            pending_bytes: 0,
            ready: BTreeMap::new(),
            writer: Some(Writer { output, replies }),
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
    pub(crate) fn ticket(self: &Arc<Self>, permit: Permit, bytes_in: usize, bytes_out: usize) -> Ticket<R> {
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

    async fn settled(&self, is_done: impl Fn(&State<R>) -> bool) -> Result<(), Option<Fault>> {
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

    /// The last reply, after all answers: the stream's totals.
    pub(crate) fn summary(&self, started: Instant) -> Result<R::Item, Fault> {
        let mut state = self.state();
        let (queue, kernel) = (state.queue, state.kernel);
        let Some(writer) = &mut state.writer else {
            return Err(Fault::new(Reason::Internal, "the stream ended before its answers"));
        };
        let mut summary = writer.output.summary();
        summary.queue_seconds = queue.as_secs_f64();
        summary.kernel_seconds = kernel.as_secs_f64();
        summary.total_seconds = started.elapsed().as_secs_f64();
        writer.replies.summary(summary)
    }

    /// Takes a unit's result, and makes replies of all that is next. One that failed breaks the stream in its place.
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
            let (replies, ended) = writer.answers(result);
            self.outbox.push(replies, Some(permit));
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

    fn state(&self) -> MutexGuard<'_, State<R>> {
        // A panic between two lines of this file leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<R: Replies> Ticket<R> {
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

impl<R: Replies> Drop for Ticket<R> {
    fn drop(&mut self) {
        if !self.is_spent {
            tracing::error!("a bug, a unit was not computed or answered: please report it");
            match self.permit {
                Some(_) => self.sequence.answer(self.index, None),
                // Whoever makes replies of it has the writer, and does not bring it back.
                None => self.sequence.break_off(Some(Fault::ours())),
            }
        }
    }
}

impl<R: Replies> Writer<R> {
    /// Answers of one result, as replies; and the fault that ends the stream after them.
    fn answers(&mut self, result: quarrel_engine::Result) -> (Vec<R::Item>, Result<(), Fault>) {
        let (answers, ended) = self.output.take(result);
        let replies: Result<_, _> = answers.into_iter().map(|answer| self.replies.answer(answer)).collect();
        match replies {
            Ok(replies) => (replies, ended.map_err(Fault::from)),
            Err(fault) => (Vec::new(), Err(fault)),
        }
    }
}
