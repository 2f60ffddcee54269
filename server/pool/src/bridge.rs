//! tokio to rayon and back.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::sync::oneshot;

/// Address space, not memory: pages that are not touched do not exist.
const STACK_BYTES: usize = 64 << 20;

/// The threads that compute. Clones share them.
#[derive(Debug, Clone)]
pub struct Pool {
    threads: Arc<rayon::ThreadPool>,
}

/// A computation panicked; the message is for the log, not for the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a computation panicked: {0}")]
pub struct Panicked(pub String);

impl Pool {
    /// A pool of so many threads.
    ///
    /// # Errors
    /// If the system gives no threads.
    pub fn new(threads: usize) -> Result<Pool, rayon::ThreadPoolBuildError> {
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            // A thread that waits for a stolen half takes up other work meanwhile, on the same stack.
            .stack_size(STACK_BYTES)
            .thread_name(|index| format!("quarrel-compute-{index}"))
            .build()?;
        Ok(Pool { threads: Arc::new(threads) })
    }

    /// How many threads compute.
    pub fn threads(&self) -> usize {
        self.threads.current_num_threads()
    }

    /// Starts `f` on the pool at once; the future waits for its result. Dropping the future does not stop `f`.
    pub fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> Running<T> {
        let (sender, receiver) = oneshot::channel();
        // First in, first out: rows come back in the order in which they came.
        self.threads.spawn_fifo(move || {
            let result = catch_unwind(AssertUnwindSafe(f)).map_err(|panic| Panicked(message(panic.as_ref())));
            // Nobody waits any more: the stream is gone.
            let _ = sender.send(result);
        });
        Running(receiver)
    }
}

/// A computation under way, as a future of its result.
#[derive(Debug)]
pub struct Running<T>(oneshot::Receiver<Result<T, Panicked>>);

impl<T> Future for Running<T> {
    type Output = Result<T, Panicked>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let gone = || Err(Panicked("its thread is gone".to_owned()));
        Pin::new(&mut self.0).poll(context).map(|received| received.unwrap_or_else(|_| gone()))
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[tokio::test]
    async fn a_panic_is_a_value_and_the_pool_goes_on() {
        let pool = Pool::new(1).unwrap();
        let broken: Result<(), _> = pool.run(|| panic!("on purpose")).await;
        assert_eq!(broken, Err(Panicked("on purpose".to_owned())));
        assert_eq!(pool.run(|| 7).await, Ok(7));
    }
}
