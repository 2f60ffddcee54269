//! Where results wait for the client: a queue whose bound is the permits that its items hold.
//!
//! hyper takes an item only when the connection has a window for it, so the time of the last taking tells a slow reader
//! from one that does not read.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use quarrel_pool::Permit;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::status::Fault;

/// The writing end. Clones share it.
#[derive(Debug)]
pub(crate) struct Outbox<T> {
    inner: Arc<Inner<T>>,
}

impl<T> Clone for Outbox<T> {
    fn clone(&self) -> Outbox<T> {
        Outbox { inner: Arc::clone(&self.inner) }
    }
}

#[derive(Debug)]
struct Inner<T> {
    state: Mutex<State<T>>,
    taken: Notify,
}

#[derive(Debug)]
struct State<T> {
    queue: VecDeque<(T, Option<Permit>)>,
    end: Option<Result<(), Fault>>,
    /// Bytes of the item taken last are in hyper's hands until it asks for the next.
    in_hand: Option<Permit>,
    last_taken: Instant,
    waker: Option<Waker>,
    /// Nothing is accepted any more but the end.
    closed: bool,
}

/// The reading end: the body of the response. Dropping it stops the stream's task.
#[derive(Debug)]
pub(crate) struct Responses<T> {
    inner: Arc<Inner<T>>,
    stop: CancellationToken,
}

/// A new outbox; `stop` is cancelled when the client is gone.
pub(crate) fn outbox<T>(stop: CancellationToken) -> (Outbox<T>, Responses<T>) {
    let state = State {
        queue: VecDeque::new(),
        end: None,
        in_hand: None,
        last_taken: Instant::now(),
        waker: None,
        closed: false,
    };
    let inner = Arc::new(Inner { state: Mutex::new(state), taken: Notify::new() });
    (Outbox { inner: Arc::clone(&inner) }, Responses { inner, stop })
}

impl<T> Inner<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        // A panic between two lines of this file leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Outbox<T> {
    /// Adds items; the last of them carries the permit.
    pub(crate) fn push(&self, items: Vec<T>, permit: Option<Permit>) {
        let mut state = self.inner.state();
        if state.closed {
            return;
        }
        let last = items.len().saturating_sub(1);
        let mut permit = permit;
        for (index, item) in items.into_iter().enumerate() {
            let permit = if index == last { permit.take() } else { None };
            state.queue.push_back((item, permit));
        }
        wake(state);
    }

    /// Ends the response after what is queued.
    pub(crate) fn end(&self, end: Result<(), Fault>) {
        let mut state = self.inner.state();
        state.closed = true;
        state.end.get_or_insert(end);
        wake(state);
    }

    /// Drops what is queued and accepts nothing more but the end.
    pub(crate) fn discard(&self) {
        let mut state = self.inner.state();
        state.closed = true;
        let dropped = std::mem::take(&mut state.queue);
        let in_hand = state.in_hand.take();
        drop(state);
        drop((dropped, in_hand));
    }

    /// When an item was taken last.
    pub(crate) fn last_taken(&self) -> Instant {
        self.inner.state().last_taken
    }

    /// Whether items wait to be taken.
    pub(crate) fn is_waiting(&self) -> bool {
        !self.inner.state().queue.is_empty()
    }

    /// Waits until an item is taken.
    pub(crate) async fn taken(&self) {
        self.inner.taken.notified().await;
    }
}

fn wake<T>(mut state: MutexGuard<'_, State<T>>) {
    let waker = state.waker.take();
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}

impl<T> Responses<T> {
    /// What was taken last is still being worked on: that is no standstill.
    pub(crate) fn still_takes(&self) {
        self.inner.state().last_taken = Instant::now();
    }
}

impl<T> futures::Stream for Responses<T> {
    type Item = Result<T, Fault>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.inner.state();
        state.in_hand = None;
        let item = match state.queue.pop_front() {
            Some((item, permit)) => {
                state.in_hand = permit;
                Some(Ok(item))
            }
            None => match &mut state.end {
                None => {
                    state.waker = Some(context.waker().clone());
                    return Poll::Pending;
                }
                Some(end) => std::mem::replace(end, Ok(())).err().map(Err),
            },
        };
        state.last_taken = Instant::now();
        drop(state);
        self.inner.taken.notify_one();
        Poll::Ready(item)
    }
}

impl<T> Drop for Responses<T> {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
