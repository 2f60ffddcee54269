//! tokio to the threads that compute, and back.
//!
//! Each stream has a [`Lane`], first in, first out; threads take one job of each lane in turn, so that a small request waits for
//! a block of a large one and not for all of it. They sleep when there is nothing to do: rayon's own threads look for work
//! a while first, which cost a fifth of the server's time at messages of 1 MiB. What is too large for one thread is spread over
//! rayon's ([`Lane::run_wide`]).

use std::{
    any::Any,
    collections::VecDeque,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    thread,
};

use tokio::sync::oneshot;

/// Address space, not memory: pages that are not touched do not exist.
const STACK_BYTES: usize = 64 << 20;

/// The threads that compute. Clones share them; they end with the last.
#[derive(Debug, Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

/// One stream's jobs.
#[derive(Debug)]
pub struct Lane {
    shared: Arc<Shared>,
    jobs: Arc<Mutex<Jobs>>,
}

/// A computation panicked; the message is for the log, not for the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a computation panicked: {0}")]
pub struct Panicked(pub String);

/// The system gives no threads.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// Ours.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// rayon's.
    #[error(transparent)]
    Rayon(#[from] rayon::ThreadPoolBuildError),
}

type Job = Box<dyn FnOnce() + Send>;

#[derive(Debug)]
struct Shared {
    queue: Arc<Queue>,
    wide: Arc<rayon::ThreadPool>,
    threads: usize,
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    pushed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Lanes with jobs that no thread has taken, in the order of their turns.
    turns: VecDeque<Arc<Mutex<Jobs>>>,
    is_closed: bool,
}

#[derive(Default)]
struct Jobs(VecDeque<Job>);

impl std::fmt::Debug for Jobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Jobs").field(&self.0.len()).finish()
    }
}

impl Pool {
    /// A pool of so many threads.
    ///
    /// # Errors
    /// If the system gives no threads.
    pub fn new(threads: usize) -> Result<Pool, PoolError> {
        let wide = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            // A thread that waits for a stolen half takes up other work meanwhile, on the same stack.
            .stack_size(STACK_BYTES)
            .thread_name(|index| format!("quarrel-wide-{index}"))
            .build()?;
        let queue = Arc::new(Queue::default());
        // Dropped on an error, it ends the threads that there are.
        let pool = Pool { shared: Arc::new(Shared { queue: Arc::clone(&queue), wide: Arc::new(wide), threads }) };
        for index in 0..threads {
            let queue = Arc::clone(&queue);
            let thread = thread::Builder::new().name(format!("quarrel-compute-{index}")).stack_size(STACK_BYTES);
            thread.spawn(move || queue.work())?;
        }
        Ok(pool)
    }

    /// How many threads compute.
    pub fn threads(&self) -> usize {
        self.shared.threads
    }

    /// A new stream's lane.
    pub fn lane(&self) -> Lane {
        Lane { shared: Arc::clone(&self.shared), jobs: Arc::default() }
    }
}

impl Lane {
    /// Starts `f` when its turn comes; the future waits for its result. Dropping the future does not stop `f`.
    pub fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> Running<T> {
        let (sender, receiver) = oneshot::channel();
        let job = Box::new(move || {
            let result = catch_unwind(AssertUnwindSafe(f)).map_err(|panic| Panicked(message(panic.as_ref())));
            // Nobody waits any more: the stream is gone.
            let _ = sender.send(result);
        });
        self.shared.queue.push(&self.jobs, job);
        Running(receiver)
    }

    /// The same in rayon's pool, for work that is spread over threads there. It has the turn of one job.
    pub fn run_wide<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> Running<T> {
        let wide = Arc::clone(&self.shared.wide);
        self.run(move || wide.install(f))
    }
}

impl Queue {
    fn push(&self, jobs: &Arc<Mutex<Jobs>>, job: Job) {
        // A lane with jobs has its turn already. Locks in this order everywhere.
        let mut state = lock(&self.state);
        let mut own = lock(jobs);
        own.0.push_back(job);
        if own.0.len() == 1 {
            state.turns.push_back(Arc::clone(jobs));
        }
        drop((own, state));
        self.pushed.notify_one();
    }

    /// The next lane's next job; `None` once the pool is gone.
    fn pop(&self) -> Option<Job> {
        let mut state = lock(&self.state);
        loop {
            if let Some(lane) = state.turns.pop_front() {
                let mut jobs = lock(&lane);
                let job = jobs.0.pop_front();
                let is_left = !jobs.0.is_empty();
                drop(jobs);
                if is_left {
                    state.turns.push_back(lane);
                }
                if job.is_some() {
                    return job;
                }
            } else if state.is_closed {
                return None;
            } else {
                state = self.pushed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn work(&self) {
        while let Some(job) = self.pop() {
            job();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        lock(&self.queue.state).is_closed = true;
        self.queue.pushed.notify_all();
    }
}

/// A panic between two lines of this file leaves nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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

    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_a_value_and_the_pool_goes_on() {
        let lane = Pool::new(1).unwrap().lane();
        let broken: Result<(), _> = lane.run(|| panic!("on purpose")).await;
        assert_eq!(broken, Err(Panicked("on purpose".to_owned())));
        let broken: Result<(), _> = lane.run_wide(|| panic!("there too")).await;
        assert_eq!(broken, Err(Panicked("there too".to_owned())));
        assert_eq!(lane.run(|| 7).await, Ok(7));
        assert_eq!(lane.run_wide(rayon::current_num_threads).await, Ok(1));
    }

    #[tokio::test]
    async fn lanes_have_turns_and_each_is_first_in_first_out() {
        let pool = Pool::new(1).unwrap();
        let (bulk, small) = (pool.lane(), pool.lane());
        let (go_on, held_up) = mpsc::channel::<()>();
        let (taken, is_taken) = mpsc::channel::<()>();
        let (done, order) = mpsc::channel();
        let job = |name: &'static str| {
            let done = done.clone();
            move || done.send(name).unwrap()
        };
        let held = bulk.run(move || {
            taken.send(()).unwrap();
            held_up.recv().unwrap();
        });
        is_taken.recv().unwrap();
        let jobs = [bulk.run(job("bulk 1")), bulk.run(job("bulk 2")), bulk.run(job("bulk 3"))];
        let late = [small.run(job("small 1")), small.run(job("small 2"))];
        go_on.send(()).unwrap();
        held.await.unwrap();
        for job in jobs.into_iter().chain(late) {
            job.await.unwrap();
        }
        let order: Vec<&str> = order.try_iter().collect();
        assert_eq!(order, ["bulk 1", "small 1", "bulk 2", "small 2", "bulk 3"]);
    }

    #[tokio::test]
    async fn threads_end_with_the_pool_and_not_before_their_jobs() {
        let (done, ended) = mpsc::channel::<()>();
        let lane = Pool::new(2).unwrap().lane();
        let running = lane.run(move || drop(done));
        drop(lane);
        running.await.unwrap();
        assert!(ended.recv().is_err());
    }
}
