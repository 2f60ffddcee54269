//! Memory and threads: what streams (and jobs, when they come) share.
//!
//! [`Pool`] bridges tokio to threads that compute: nothing that computes runs on an async thread, streams have turns, and a panic is a value.
//! [`Budget`] hands out bytes: a unit of work takes a [`Permit`] before it is computed and gives it back when its
//! result has left. A stream holds at most half of the budget, and the less the less is free; all open spans together hold at most half. So neither
//! clients that do not read nor one that stops half-way can take everything.

#![forbid(unsafe_code)]

mod bridge;
mod budget;

pub use bridge::{Lane, Panicked, Pool, PoolError, Running};
pub use budget::{Budget, Landing, Permit, Refused, Reservation, Share, Stalled, Wait};
