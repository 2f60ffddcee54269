//! Byte permits.
//!
//! A quarter of the bytes is for messages that arrive: an eighth is shared by large ones, which hold it until what is made of them has
//! room of its own. That is never the other way round, so nobody waits in a circle: a message waits for units to find room, and these for
//! results to leave. The other eighth is for small ones, one of each stream, and so they wait for nobody, however slowly others send.
//!
//! What one stream may hold depends on what is free: at most twice that, beside its first unit. Alone it holds half of all there is, two hold a
//! third each, and however many do not read, something is left for the others. (Dynamic thresholds, as in the shared buffers of switches.)

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// What one permit of a semaphore stands for, so that 32 bits of permits reach beyond any memory.
const GRAIN: usize = 1 << 10;
/// A reservation takes its bytes in portions, so that small units are not queued behind a large span.
const PORTION: u32 = 1 << 10;

/// Messages of so many bytes are small whatever the budget: one of each stream comes on top.
const SMALL_BYTES_MIN: usize = 64 << 10;

/// All bytes that may be in use. Clones share them.
#[derive(Debug, Clone)]
pub struct Budget {
    all: Arc<Semaphore>,
    /// For spans that are not complete: half of all bytes there are.
    spans: Arc<Semaphore>,
    /// For large messages that arrive, apart from `all`.
    landing: Arc<Semaphore>,
    landing_grains: u32,
    /// Messages of at most so many bytes are small.
    small_bytes: usize,
    /// How many messages have given their room back.
    landed: Arc<AtomicUsize>,
    bytes: usize,
}

/// How often a stream that holds its part looks whether there is more room, beside when it gives some back itself.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// One stream's part of the budget.
#[derive(Debug)]
pub struct Share {
    budget: Budget,
    own: Arc<Own>,
    /// What the last [`Share::acquire`] waits for, as a number.
    waits_for: AtomicU8,
    /// Bytes of its open span for which nothing has come.
    reserved: Arc<AtomicUsize>,
    /// Whether a message waits for room.
    is_landing: AtomicBool,
    /// Whether what comes is not wanted any more.
    is_given_up: AtomicBool,
}

/// Why there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Wait {
    /// All is in use.
    Others,
    /// The stream holds its part of what others have left.
    Part,
    /// The stream holds half of all there is.
    Half,
}

/// What a stream holds.
#[derive(Debug, Default)]
struct Own {
    grains: AtomicUsize,
    given_back: Notify,
}

/// Grains that count as a stream's own.
#[derive(Debug)]
struct Held {
    own: Arc<Own>,
    grains: usize,
}

/// Bytes of a message that arrives; given back when dropped.
#[derive(Debug)]
pub struct Landing {
    /// None where a reservation has the room already.
    permit: Option<OwnedSemaphorePermit>,
    landed: Arc<AtomicUsize>,
}

/// For so long no message has given its room back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stalled;

/// Bytes in use; given back when dropped.
#[derive(Debug)]
pub struct Permit {
    own: Held,
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

/// Tells a share, while it lives, that bytes are reserved. A stream has one span open at a time.
#[derive(Debug)]
struct Mark(Arc<AtomicUsize>);

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
    /// A budget of so many bytes, of messages of at most half as many, and of so many streams at once.
    pub fn new(bytes: usize, message_bytes_max: usize, streams_max: usize) -> Budget {
        let grains = bytes.div_ceil(GRAIN);
        let landing = (grains / 8).max(message_bytes_max.div_ceil(GRAIN)).min(grains / 2);
        // What computes keeps half.
        let small = (grains / 8).min(grains / 2 - landing);
        let small_bytes = (small * GRAIN / streams_max.max(1)).max(SMALL_BYTES_MIN);
        Budget {
            small_bytes,
            all: Arc::new(Semaphore::new(grains - landing - small)),
            spans: Arc::new(Semaphore::new(grains / 2)),
            landing: Arc::new(Semaphore::new(landing)),
            landing_grains: u32::try_from(landing).unwrap_or(u32::MAX),
            landed: Arc::default(),
            bytes,
        }
    }

    /// A new stream's share.
    pub fn share(&self) -> Share {
        Share {
            budget: self.clone(),
            own: Arc::default(),
            waits_for: AtomicU8::new(Wait::Others as u8),
            reserved: Arc::default(),
            is_landing: AtomicBool::new(false),
            is_given_up: AtomicBool::new(false),
        }
    }

    /// Bytes that nobody uses, with a small message's.
    #[cfg(test)]
    fn free(&self) -> usize {
        (self.all.available_permits() + self.landing.available_permits()) * GRAIN + self.small_bytes
    }

    /// The most that one stream, or all spans together, may hold.
    pub fn half(&self) -> usize {
        self.bytes / 2
    }
}

impl Share {
    /// Whether a message of so many bytes waits for no room. Until its rows have room, its stream is to take no other. One of a
    /// span that is open uses up what is reserved, as any other.
    pub fn lands_small(&self, bytes: usize) -> bool {
        let is_small = bytes <= self.budget.small_bytes;
        if is_small {
            let rest = |reserved: usize| Some(reserved.saturating_sub(bytes));
            let _ = self.reserved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest);
        }
        is_small
    }

    /// Waits for room for a message of so many bytes that is not small. It is to be held until its rows have room of their own. A message of
    /// a span that is open lands in what is reserved for it.
    ///
    /// # Errors
    /// [`Stalled`] if for `stall` nobody gives such room back.
    pub async fn land(&self, bytes: usize, stall: Duration) -> Result<Landing, Stalled> {
        if let Some(landing) = self.try_land(bytes) {
            return Ok(landing);
        }
        let mut permit = pin!(take(&self.budget.landing, self.landing_grains(bytes)));
        self.is_landing.store(true, Ordering::Relaxed);
        let landing = loop {
            let landed = self.budget.landed.load(Ordering::Relaxed);
            match timeout(stall, &mut permit).await {
                Ok(permit) => break Ok(Landing { permit: Some(permit), landed: Arc::clone(&self.budget.landed) }),
                Err(_) if self.budget.landed.load(Ordering::Relaxed) != landed => {}
                Err(_) => break Err(Stalled),
            }
        };
        self.is_landing.store(false, Ordering::Relaxed);
        landing
    }

    /// The same if there is room at once.
    pub fn try_land(&self, bytes: usize) -> Option<Landing> {
        let rest = |reserved: usize| reserved.checked_sub(bytes);
        let permit = match self.reserved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, rest) {
            Ok(_) => None,
            Err(_) => Some(Arc::clone(&self.budget.landing).try_acquire_many_owned(self.landing_grains(bytes)).ok()?),
        };
        Some(Landing { permit, landed: Arc::clone(&self.budget.landed) })
    }

    /// Whether a message waits for room: it is not the client who keeps us waiting.
    pub fn is_landing(&self) -> bool {
        self.is_landing.load(Ordering::Relaxed)
    }

    /// Nothing that comes is wanted any more: it needs no room.
    pub fn give_up(&self) {
        self.is_given_up.store(true, Ordering::Relaxed);
    }

    /// Whether it is so.
    pub fn is_given_up(&self) -> bool {
        self.is_given_up.load(Ordering::Relaxed)
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
        let own = missing.max(self.grains(results)?) as usize;
        let back = reserved.as_ref().map_or(0, |reserved| reserved.all.num_permits());
        let own = self.hold(own, missing as usize, back).await;
        self.set(Wait::Others);
        let mut all = take(&self.budget.all, missing).await;
        let span = reserved.map(|reserved| {
            all.merge(reserved.all);
            drop(reserved.mark);
            reserved.span
        });
        Ok(Permit { own, all, _span: span })
    }

    /// Waits until the stream may hold so much more, of which `missing` is free now. What a span has reserved comes `back`.
    async fn hold(&self, grains: usize, missing: usize, back: usize) -> Held {
        loop {
            let given_back = self.own.given_back.notified();
            let held = self.own.grains.load(Ordering::Relaxed);
            let free = (self.budget.all.available_permits() + back).saturating_sub(missing);
            let is_over_half = held + grains > self.budget.half().div_ceil(GRAIN);
            if held == 0 || !is_over_half && held + grains <= 2 * free {
                self.own.grains.fetch_add(grains, Ordering::Relaxed);
                return Held { own: Arc::clone(&self.own), grains };
            }
            self.set(if is_over_half { Wait::Half } else { Wait::Part });
            let _ = timeout(LOOK_EVERY, given_back).await;
        }
    }

    /// Waits for room for a whole span, of which so many bytes `came`.
    ///
    /// # Errors
    /// [`Refused`] for more than all spans may have.
    pub async fn reserve(&self, bytes: usize, came: usize) -> Result<Reservation, Refused> {
        let grains = self.grains(bytes)?;
        let span = take(&self.budget.spans, grains).await;
        let mut all = take(&self.budget.all, 0).await;
        let mut missing = grains;
        while missing > 0 {
            let portion = missing.min(PORTION);
            all.merge(take(&self.budget.all, portion).await);
            missing -= portion;
        }
        self.reserved.store(bytes.saturating_sub(came), Ordering::Relaxed);
        Ok(Reservation { all, span, bytes, mark: Mark(Arc::clone(&self.reserved)) })
    }

    /// What the last [`Share::acquire`] waits for, or waited for when it was given up.
    pub fn waits_for(&self) -> Wait {
        match self.waits_for.load(Ordering::Relaxed) {
            half if half == Wait::Half as u8 => Wait::Half,
            part if part == Wait::Part as u8 => Wait::Part,
            _ => Wait::Others,
        }
    }

    fn set(&self, wait: Wait) {
        self.waits_for.store(wait as u8, Ordering::Relaxed);
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

impl Held {
    fn shrink_to(&mut self, grains: usize) {
        let given = self.grains.saturating_sub(grains);
        self.grains -= given;
        self.own.grains.fetch_sub(given, Ordering::Relaxed);
        self.own.given_back.notify_waiters();
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if self.permit.take().is_some() {
            self.landed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Permit {
    /// Gives back all but `bytes`: the weights are gone, their result remains.
    pub fn shrink_to(&mut self, bytes: usize) {
        let keep = bytes.div_ceil(GRAIN);
        drop(self.all.split(self.all.num_permits().saturating_sub(keep)));
        self.own.shrink_to(keep);
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
        let budget = Budget::new(1024 * KIB, KIB, 1);
        let (greedy, modest) = (budget.share(), budget.share());
        let mut held = greedy.acquire(512 * KIB, KIB, None).await.unwrap();
        assert!(waits(greedy.acquire(KIB, KIB, None)).await);
        assert_eq!(greedy.waits_for(), Wait::Half);
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
    async fn however_many_take_what_they_get_something_is_left() {
        let budget = Budget::new(1024 * KIB, KIB, 1);
        let mut held = Vec::new();
        let mut took = Vec::new();
        for _ in 0..4 {
            let share = budget.share();
            let before = held.len();
            while let Ok(permit) = timeout(Duration::from_millis(30), share.acquire(8 * KIB, 8 * KIB, None)).await {
                held.push(permit.unwrap());
            }
            assert_eq!(share.waits_for(), if took.is_empty() { Wait::Half } else { Wait::Part });
            took.push((held.len() - before) * 8);
        }
        // Of 768: half of 1024; two thirds of what that left; and so on.
        assert_eq!(took, [512, 168, 56, 16]);
        let late = budget.share();
        drop(late.acquire(16 * KIB, KIB, None).await.unwrap());
        drop(held);
        assert_eq!(budget.free(), 1024 * KIB);
    }

    #[tokio::test]
    async fn spans_together_hold_at_most_half() {
        let budget = Budget::new(1024 * KIB, KIB, 1);
        let (first, second) = (budget.share(), budget.share());
        let held = first.reserve(400 * KIB, 0).await.unwrap();
        assert!(waits(second.reserve(200 * KIB, 0)).await);
        // The unit that closes a span draws on what the span holds, and waits for what is beyond it only.
        let unit = first.acquire(500 * KIB, 300 * KIB, Some(held)).await.unwrap();
        assert_eq!(budget.free(), 524 * KIB);
        // Its results count against the stream's half like any others.
        drop(first.acquire(70 * KIB, KIB, None).await.unwrap());
        assert_eq!(first.waits_for(), Wait::Others);
        assert!(waits(first.acquire(213 * KIB, KIB, None)).await);
        assert_eq!(first.waits_for(), Wait::Half);
        drop(unit);
        second.reserve(200 * KIB, 0).await.unwrap();
        assert_eq!(budget.free(), 1024 * KIB);
    }

    #[tokio::test]
    async fn messages_wait_for_one_another_and_not_for_what_computes_nor_for_an_open_span() {
        let budget = Budget::new(1024 * KIB, 256 * KIB, 1);
        let (first, second) = (budget.share(), budget.share());
        let unit = first.acquire(512 * KIB, KIB, None).await.unwrap();
        let landed = first.try_land(200 * KIB).unwrap();
        assert!(second.try_land(100 * KIB).is_none());
        let span = second.reserve(120 * KIB, 0).await.unwrap();
        drop(second.try_land(100 * KIB).unwrap());
        assert!(second.try_land(57 * KIB).is_none(), "what is reserved counts once");
        drop(span);
        let span = second.reserve(120 * KIB, 30 * KIB).await.unwrap();
        assert!(second.try_land(100 * KIB).is_none(), "what came counts too");
        assert!(second.lands_small(64 * KIB));
        assert!(second.try_land(57 * KIB).is_none(), "and small ones do");
        drop(span);
        assert!(second.try_land(100 * KIB).is_none());
        drop(landed);
        drop(second.try_land(100 * KIB).unwrap());
        // One larger than all there is for messages has all of it.
        let whole = second.try_land(300 * KIB).unwrap();
        assert!(first.try_land(KIB).is_none());
        let stall = Duration::from_millis(20);
        assert_eq!(first.land(KIB, stall).await.unwrap_err(), Stalled);
        drop((unit, whole));
        assert_eq!(budget.free(), 1024 * KIB);
    }

    #[test]
    fn small_messages_of_all_streams_fit_into_their_eighth() {
        let of =
            |mib: usize, message_mib: usize, streams| Budget::new(mib << 20, message_mib << 20, streams).small_bytes;
        assert_eq!(of(1024, 64, 32), 4 << 20);
        assert_eq!(of(1024, 64, 256), 512 << 10);
        assert_eq!(of(128, 64, 32), SMALL_BYTES_MIN, "one large message is half of it");
        assert_eq!(of(32, 8, 32), 128 << 10);
        let budget = Budget::new(64 << 20, 8 << 20, 32);
        let all = [&budget.all, &budget.landing].map(|part| part.available_permits() * GRAIN);
        assert_eq!(all, [48 << 20, 8 << 20]);
    }

    #[tokio::test]
    async fn a_span_that_closes_counts_what_it_has_reserved_as_free() {
        let budget = Budget::new(1024 * KIB, KIB, 1);
        let (one, other) = (budget.share(), budget.share());
        let charged = one.acquire(8 * KIB, 8 * KIB, None).await.unwrap();
        let span = one.reserve(500 * KIB, 0).await.unwrap();
        let held = other.acquire(250 * KIB, KIB, None).await.unwrap();
        drop(timeout(Duration::from_millis(20), one.acquire(500 * KIB, 100 * KIB, Some(span))).await.unwrap().unwrap());
        drop((charged, held));
    }
}
