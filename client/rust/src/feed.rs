//! What several streams share: the layers that are still to be sent, the answers that nobody has taken yet.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use futures::{Stream, StreamExt, stream::BoxStream};
use quarrel_proto::v1;
use tokio::{
    sync::{Notify, mpsc},
    task::AbortHandle,
};

use crate::{error::Error, exchange::Verb};

/// Sending waits while more bytes of answers than this are untaken: enough for the network to go on, and no more memory
/// than a few runs.
const UNTAKEN_BYTES_MAX: usize = 16 << 20;

/// Layers of type `L`, in the order in which they are to be sent.
pub(crate) type Layers<L> = BoxStream<'static, Result<L, Error>>;

/// Layers for all streams of a call, and the way back for their answers.
pub(crate) struct Feed<V: Verb> {
    layers: tokio::sync::Mutex<Layers<V::Layer>>,
    /// Layers whose stream broke.
    again: Mutex<VecDeque<V::Layer>>,
    answers: mpsc::UnboundedSender<Result<(V::Answer, usize), Error>>,
    shared: Arc<Shared>,
}

/// What the consumer sees too.
#[derive(Debug, Default)]
struct Shared {
    untaken: AtomicUsize,
    room: Notify,
    answered: AtomicU64,
    effective: OnceLock<String>,
    summaries: Mutex<Vec<v1::Summary>>,
}

impl<V: Verb> Feed<V> {
    pub(crate) fn new(layers: Layers<V::Layer>) -> (Feed<V>, Answers<V::Answer>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let shared = Arc::<Shared>::default();
        let feed = Feed {
            layers: tokio::sync::Mutex::new(layers),
            again: Mutex::default(),
            answers: sender,
            shared: Arc::clone(&shared),
        };
        (feed, Answers { receiver, shared, streams: Vec::new(), failed: false })
    }

    /// The next layer to send. Dropping the wait loses none.
    pub(crate) async fn next(&self) -> Option<Result<V::Layer, Error>> {
        if let Some(layer) = lock(&self.again).pop_front() {
            return Some(Ok(layer));
        }
        self.layers.lock().await.next().await
    }

    /// Takes layers back that were not answered whole.
    pub(crate) fn give_back(&self, layers: impl Iterator<Item = V::Layer>) {
        lock(&self.again).extend(layers);
    }

    /// Waits until the consumer has taken enough.
    pub(crate) async fn room(&self) {
        loop {
            let room = self.shared.room.notified();
            if self.shared.untaken.load(Ordering::Acquire) <= UNTAKEN_BYTES_MAX {
                return;
            }
            room.await;
        }
    }

    pub(crate) fn answered(&self, answers: Vec<(V::Answer, usize)>) {
        self.shared.answered.fetch_add(answers.len() as u64, Ordering::Relaxed);
        for (answer, bytes) in answers {
            self.shared.untaken.fetch_add(bytes, Ordering::Release);
            // A consumer that is gone has stopped the streams too.
            let _ = self.answers.send(Ok((answer, bytes)));
        }
    }

    /// How many answers have come: whether a stream that broke had done anything.
    pub(crate) fn answers(&self) -> u64 {
        self.shared.answered.load(Ordering::Relaxed)
    }

    pub(crate) fn effective(&self, command: &str) {
        let _ = self.shared.effective.set(command.to_owned());
    }

    /// A stream's summary came; nothing of it may be unanswered.
    pub(crate) fn ended(&self, summary: v1::Summary, answered_all: bool) -> Result<(), Error> {
        if !answered_all {
            return Err(Error::Answer { detail: "its summary came before every row was answered".to_owned() });
        }
        lock(&self.shared.summaries).push(summary);
        Ok(())
    }

    pub(crate) fn failed(&self, error: Error) {
        let _ = self.answers.send(Err(error));
    }
}

/// The answers of a call, as they come: a [`Stream`]. It ends after the last answer, or after the first error. Dropping it
/// stops the call.
#[derive(Debug)]
pub struct Answers<T> {
    receiver: mpsc::UnboundedReceiver<Result<(T, usize), Error>>,
    shared: Arc<Shared>,
    streams: Vec<AbortHandle>,
    failed: bool,
}

impl<T> Answers<T> {
    pub(crate) fn stop_with_us(&mut self, stream: AbortHandle) {
        self.streams.push(stream);
    }

    /// The command with the server's defaults filled in, as JSON. Known once an answer has come.
    pub fn effective_command(&self) -> Option<&str> {
        self.shared.effective.get().map(String::as_str)
    }

    /// The summaries of the streams that have ended well so far; all of them at the end.
    pub fn summaries(&self) -> Vec<v1::Summary> {
        lock(&self.shared.summaries).clone()
    }

    fn stop(&self) {
        self.streams.iter().for_each(AbortHandle::abort);
    }
}

impl<T> Stream for Answers<T> {
    type Item = Result<T, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<T, Error>>> {
        if self.failed {
            return Poll::Ready(None);
        }
        match self.receiver.poll_recv(context) {
            Poll::Ready(Some(Ok((answer, bytes)))) => {
                self.shared.untaken.fetch_sub(bytes, Ordering::AcqRel);
                self.shared.room.notify_waiters();
                Poll::Ready(Some(Ok(answer)))
            }
            Poll::Ready(Some(Err(error))) => {
                self.failed = true;
                self.stop();
                Poll::Ready(Some(Err(error)))
            }
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<T> Drop for Answers<T> {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A panic is an error of the whole call: nobody goes on with what it may have left half-done.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
