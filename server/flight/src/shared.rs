//! What all streams of a server share.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use quarrel_checkpoint::CheckpointError;
use quarrel_engine::Level;
use quarrel_pool::{Budget, Pool};
use quarrel_proto::Reason;
use quarrel_shelf::Shelf;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};
use tokio_util::sync::CancellationToken;

use crate::{config::Config, jobs::Jobs, status::Fault};

/// One server's means.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) level: Level,
    pub(crate) pool: Pool,
    pub(crate) budget: Budget,
    pub(crate) shelf: Shelf,
    pub(crate) jobs: Jobs,
    /// No new streams.
    pub(crate) draining: CancellationToken,
    /// No streams at all.
    pub(crate) stopped: CancellationToken,
    streams: Arc<Semaphore>,
    opened: AtomicU64,
}

/// A stream's place among `streams_max`; given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) id: u64,
    _permits: [OwnedSemaphorePermit; 2],
}

impl Shared {
    pub(crate) fn new(config: Config, pool: Pool) -> Result<Shared, CheckpointError> {
        Ok(Shared {
            jobs: Jobs::new(&config)?,
            level: config.cpu_level.unwrap_or_else(Level::detect),
            pool,
            shelf: Shelf::default(),
            budget: Budget::new(config.memory_bytes_max, config.message_bytes_max, config.streams_max),
            draining: CancellationToken::new(),
            stopped: CancellationToken::new(),
            streams: Arc::new(Semaphore::new(config.streams_max)),
            opened: AtomicU64::new(0),
            config,
        })
    }

    /// A place for a new stream on a connection with places for so many.
    pub(crate) fn place(&self, connection: &Arc<Semaphore>) -> Result<Place, Fault> {
        if self.draining.is_cancelled() {
            return Err(Fault::new(Reason::Stopping, "the server is stopping: try another, or again later"));
        }
        let exceeded = |limit: &str, most: usize, advice: &str| {
            let what = format!("{most} streams are open, as many as `{limit}`: {advice}");
            move |_: TryAcquireError| Fault::new(Reason::StreamsExceeded, what)
        };
        let here = exceeded(
            "connection_streams_max",
            self.config.connection_streams_max,
            "open another connection, or try again later",
        );
        let anywhere = exceeded("streams_max", self.config.streams_max, "try again later");
        let permits = [
            Arc::clone(connection).try_acquire_owned().map_err(here)?,
            Arc::clone(&self.streams).try_acquire_owned().map_err(anywhere)?,
        ];
        Ok(Place { id: self.opened.fetch_add(1, Ordering::Relaxed) + 1, _permits: permits })
    }
}
