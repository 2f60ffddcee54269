//! The contract of Quarrel: commands, column names, metadata keys and reasons.
//!
//! SPEC.md beside this crate is the contract in prose; what can be held in types or constants is here, and nothing else
//! is: no transport, no Arrow, no numbers. Both ends depend on it, so a change here is a change of the contract.

#![forbid(unsafe_code)]

pub mod column;
pub mod command;
mod generated;
pub mod json;
pub mod metadata;
mod reason;

pub use generated::quarrel_v1 as v1;
pub use reason::Reason;

/// The version of the contract, `major.minor`. A reader accepts any minor of its own major.
pub const VERSION: &str = "1.9";
