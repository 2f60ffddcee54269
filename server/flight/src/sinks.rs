//! Who writes where: no two jobs or streams of a server write to one place, or to one within the other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use quarrel_checkpoint::Location;
use quarrel_proto::Reason;

use crate::status::Fault;

/// The places that are being written.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sinks(Arc<Mutex<Vec<Arc<Taken>>>>);

#[derive(Debug)]
struct Taken {
    sink: Location,
    by: String,
}

/// A place that is one's own until this is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    taken: Arc<Taken>,
    sinks: Sinks,
}

impl Sinks {
    /// Takes a place for somebody.
    pub(crate) fn claim(&self, sink: &Location, by: String) -> Result<Claim, Fault> {
        let mut all = self.lock();
        if let Some(other) = all.iter().find(|taken| taken.sink.overlaps(sink)) {
            let what = format!("`{}` is being written by {}", sink.shown().display(), other.by);
            return Err(Fault::new(Reason::SinkTaken, what));
        }
        let taken = Arc::new(Taken { sink: sink.clone(), by });
        all.push(Arc::clone(&taken));
        drop(all);
        Ok(Claim { taken, sinks: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Taken>>> {
        // A panic between two lines of this file leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.sinks.lock().retain(|taken| !Arc::ptr_eq(taken, &self.taken));
    }
}
