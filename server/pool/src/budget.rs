//! Byte permits.
//!
//! A part of the bytes is for messages that arrive, and they hold it until what is made of them has room of its own. That is
//! never the other way round, so nobody waits in a circle: a message waits for units to find room, and these for results to leave.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What one permit of a semaphore stands for, so that 32 bits of permits reach beyond any memory.
const GRAIN: usize = 1 << 10;
/// A reservation takes its bytes in portions, so that small units are not queued behind a large span.
const PORTION: u32 = 1 << 10;

/// All bytes that may be in use. Clones share them.
#[derive(Debug, Clone)]
pub struct Budget {
    all: Arc<Semaphore>,
    /// For spans that are not complete: half of all bytes there are.
    spans: Arc<Semaphore>,
    /// For messages that arrive, apart from `all`.
    landing: Arc<Semaphore>,
    landing_grains: u32,
    bytes: usize,
}

/// One stream's part of the budget: at most half.
#[derive(Debug)]
pub struct Share {
    budget: Budget,
    own: Arc<Semaphore>,
    /// Whether the last [`Share::acquire`] waits, or was given up, for the stream's own half.
    waits_for_own: AtomicBool,
    /// Bytes of its open span.
    reserved: Arc<AtomicUsize>,
}

/// Bytes of a message that arrives; given back when dropped.
#[derive(Debug)]
pub struct Landing {
    /// None where a reservation has the room already.
    _permit: Option<OwnedSemaphorePermit>,
}

/// Bytes in use; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    own: OwnedSemaphorePermit,
    all: OwnedSemaphorePermit,
    _span: Option<OwnedSemaphorePermit>,
}

/// Bytes held for a span until it is complete.
#[derive(Debug)]
pub struct Reservation {
    all: OwnedSemaphorePermit,
    span: OwnedSemaphorePermit,
    bytes: usize,
    mark: Mark,
}

/// Tells a share, while it lives, that so many bytes are reserved.
#[derive(Debug)]
struct Mark {
    reserved: Arc<AtomicUsize>,
    bytes: usize,
}

/// More bytes than can ever be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{asked} bytes, more than the {most} that one stream may hold (half of `memory_bytes_max`)")]
pub struct Refused {
    /// What was asked for.
    pub asked: usize,
    /// What there is at most.
    pub most: usize,
}

impl Budget {
    /// A budget of so many bytes, of messages of at most half as many.
    pub fn new(bytes: usize, message_bytes_max: usize) -> Budget {
        let grains = bytes.div_ceil(GRAIN);
        let landing = (grains / 4).max(message_bytes_max.div_ceil(GRAIN)).min(grains / 2);
        Budget {
            all: Arc::new(Semaphore::new(grains - landing)),
            spans: Arc::new(Semaphore::new(grains / 2)),
            landing: Arc::new(Semaphore::new(landing)),
            landing_grains: u32::try_from(landing).unwrap_or(u32::MAX),
            bytes,
        }
    }

    /// A new stream's share.
    pub fn share(&self) -> Share {
        Share {
            budget: self.clone(),
            own: Arc::new(Semaphore::new(self.bytes.div_ceil(GRAIN) / 2)),
            waits_for_own: AtomicBool::new(false),
            reserved: Arc::default(),
        }
    }

    /// Bytes that nobody uses.
    #[cfg(test)]
    fn free(&self) -> usize {
        (self.all.available_permits() + self.landing.available_permits()) * GRAIN
    }

    /// The most that one stream, or all spans together, may hold.
    pub fn half(&self) -> usize {
        self.bytes / 2
    }
}

impl Share {
    /// Waits for room for a message of so many bytes. It is to be held until its rows have room of their own. A message of
    /// a span that is open lands in what is reserved for it.
    pub async fn land(&self, bytes: usize) -> Landing {
        match self.try_land(bytes) {
            Some(landing) => landing,
            None => Landing { _permit: Some(take(&self.budget.landing, self.landing_grains(bytes)).await) },
        }
    }

    /// The same if there is room at once.
    pub fn try_land(&self, bytes: usize) -> Option<Landing> {
        if bytes <= self.reserved.load(Ordering::Relaxed) {
            return Some(Landing { _permit: None });
        }
        let permit = Arc::clone(&self.budget.landing).try_acquire_many_owned(self.landing_grains(bytes)).ok()?;
        Some(Landing { _permit: Some(permit) })
    }

    fn landing_grains(&self, bytes: usize) -> u32 {
        u32::try_from(bytes.div_ceil(GRAIN)).unwrap_or(u32::MAX).min(self.budget.landing_grains)
    }

    /// Waits for room for a unit of so many bytes, of which `results` stay until the client has taken them; of a span's
    /// room, where it has one, no more than what is missing is waited for. Results always count against the share.
    ///
    /// # Errors
    /// [`Refused`] for more than the share.
    pub async fn acquire(
        &self,
        bytes: usize,
        results: usize,
        reserved: Option<Reservation>,
    ) -> Result<Permit, Refused> {
        let held = reserved.as_ref().map_or(0, |reserved| reserved.bytes);
        let missing = self.grains(bytes.saturating_sub(held))?;
        let own = missing.max(self.grains(results)?);
        self.waits_for_own.store(true, Ordering::Relaxed);
        let own = take(&self.own, own).await;
        self.waits_for_own.store(false, Ordering::Relaxed);
        let mut all = take(&self.budget.all, missing).await;
        let span = reserved.map(|reserved| {
            all.merge(reserved.all);
            drop(reserved.mark);
            reserved.span
        });
        Ok(Permit { own, all, _span: span })
    }

    /// Waits for room for a whole span.
    ///
    /// # Errors
    /// [`Refused`] for more than all spans may have.
    pub async fn reserve(&self, bytes: usize) -> Result<Reservation, Refused> {
        let grains = self.grains(bytes)?;
        let span = take(&self.budget.spans, grains).await;
        let mut all = take(&self.budget.all, 0).await;
        let mut missing = grains;
        while missing > 0 {
            let portion = missing.min(PORTION);
            all.merge(take(&self.budget.all, portion).await);
            missing -= portion;
        }
        self.reserved.fetch_add(bytes, Ordering::Relaxed);
        Ok(Reservation { all, span, bytes, mark: Mark { reserved: Arc::clone(&self.reserved), bytes } })
    }

    /// Whether it is the stream's own half that the last [`Share::acquire`] waits for, and not the whole budget.
    pub fn is_used_up(&self) -> bool {
        self.waits_for_own.load(Ordering::Relaxed)
    }

    fn grains(&self, bytes: usize) -> Result<u32, Refused> {
        let most = self.budget.half();
        u32::try_from(bytes.div_ceil(GRAIN)).ok().filter(|_| bytes <= most).ok_or(Refused { asked: bytes, most })
    }
}

async fn take(semaphore: &Arc<Semaphore>, grains: u32) -> OwnedSemaphorePermit {
    let taken = Arc::clone(semaphore).acquire_many_owned(grains).await;
    taken.expect("the semaphores of a budget are never closed")
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.reserved.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Permit {
    /// Gives back all but `bytes`: the weights are gone, their result remains.
    pub fn shrink_to(&mut self, bytes: usize) {
        let keep = bytes.div_ceil(GRAIN);
        drop(self.all.split(self.all.num_permits().saturating_sub(keep)));
        drop(self.own.split(self.own.num_permits().saturating_sub(keep)));
        self._span = None;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const KIB: usize = 1 << 10;

    async fn waits<T>(future: impl Future<Output = T>) -> bool {
        timeout(Duration::from_millis(20), future).await.is_err()
    }

    #[tokio::test]
    async fn a_stream_holds_at_most_half_and_another_goes_on() {
        let budget = Budget::new(1024 * KIB, KIB);
        let (greedy, modest) = (budget.share(), budget.share());
        let mut held = greedy.acquire(512 * KIB, KIB, None).await.unwrap();
        assert!(waits(greedy.acquire(KIB, KIB, None)).await);
        // A quarter is for messages.
        let other = modest.acquire(256 * KIB, KIB, None).await.unwrap();
        assert_eq!(budget.free(), 256 * KIB);
        assert!(waits(modest.acquire(KIB, KIB, None)).await);
        held.shrink_to(KIB);
        assert_eq!(budget.free(), 767 * KIB);
        drop((held, other));
        assert_eq!(budget.free(), 1024 * KIB);
        assert_eq!(
            greedy.acquire(513 * KIB, KIB, None).await.unwrap_err(),
            Refused { asked: 513 * KIB, most: 512 * KIB }
        );
    }

    #[tokio::test]
    async fn spans_together_hold_at_most_half() {
        let budget = Budget::new(1024 * KIB, KIB);
        let (first, second) = (budget.share(), budget.share());
        let held = first.reserve(400 * KIB).await.unwrap();
        assert!(waits(second.reserve(200 * KIB)).await);
        // The unit that closes a span draws on what the span holds, and waits for what is beyond it only.
        let unit = first.acquire(500 * KIB, 300 * KIB, Some(held)).await.unwrap();
        assert_eq!(budget.free(), 524 * KIB);
        // Its results count against the stream's half like any others.
        drop(first.acquire(212 * KIB, KIB, None).await.unwrap());
        assert!(!first.is_used_up());
        assert!(waits(first.acquire(213 * KIB, KIB, None)).await);
        assert!(first.is_used_up());
        drop(unit);
        second.reserve(200 * KIB).await.unwrap();
        assert_eq!(budget.free(), 1024 * KIB);
    }

    #[tokio::test]
    async fn messages_wait_for_one_another_and_not_for_what_computes_nor_for_an_open_span() {
        let budget = Budget::new(1024 * KIB, KIB);
        let (first, second) = (budget.share(), budget.share());
        let unit = first.acquire(512 * KIB, KIB, None).await.unwrap();
        let landed = first.land(200 * KIB).await;
        assert!(waits(second.land(100 * KIB)).await);
        let span = second.reserve(150 * KIB).await.unwrap();
        drop(second.land(100 * KIB).await);
        assert!(waits(second.land(151 * KIB)).await);
        drop(span);
        assert!(waits(second.land(100 * KIB)).await);
        drop(landed);
        drop(second.land(100 * KIB).await);
        // One larger than the quarter has all of it.
        let whole = second.land(300 * KIB).await;
        assert!(waits(first.land(KIB)).await);
        drop((unit, whole));
        assert_eq!(budget.free(), 1024 * KIB);
    }
}
