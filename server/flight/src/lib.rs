//! The Arrow Flight server: sockets, frames, and the path between them.
//!
//! Start at `exchange`: the whole path of a stream in one function. `stack` listens, `service` has a line for each
//! RPC, `wire` is the bytes of DoExchange and DoPut, `status` is the one file that knows gRPC codes.

#![forbid(unsafe_code)]

mod admin;
mod command;
mod config;
mod exchange;
mod frame;
mod get;
mod jobs;
mod outbox;
mod put;
mod reader;
mod replies;
mod sequence;
mod service;
mod shared;
mod sinks;
mod stack;
mod status;
mod telemetry;
mod wire;

pub use config::{Config, ConfigError, Listen};
pub use quarrel_engine::Level;
pub use stack::{Bound, Dial, bind, local, run};
pub use telemetry::{LogFormat, start as start_telemetry};
