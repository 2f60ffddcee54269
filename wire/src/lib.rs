//! Flight messages as bytes of gRPC, without the copies that tonic's codec and arrow-flight make: each body lands once, aligned for Arrow, and
//! leaves from where it lies. What server and client share beside the contract.
//!
//! ```text
//! RecordBatch -> Encoder -> FrameOut -> pieces -> bytes of a request or a response
//! bytes -> Messages -> Received -> (decoded by whoever reads)
//! ```
//!
//! Not here: HTTP/2 (hyper's business), statuses, and how much room a message may take.

#![forbid(unsafe_code)]

mod encode;
mod receive;
mod send;

pub use encode::{Encoder, FrameOut, schema_frame};
pub use receive::{FIELDS_BYTES_MAX, Malformed, Messages, Received, Step};
pub use send::{TooLong, pieces};

/// The request path of a call to DoExchange.
pub const DO_EXCHANGE: &str = "/arrow.flight.protocol.FlightService/DoExchange";

/// That of a call to DoPut.
pub const DO_PUT: &str = "/arrow.flight.protocol.FlightService/DoPut";

/// The field of `FlightData` that is the body.
const BODY_TAG: u32 = 1000;
/// A gRPC message's prefix: a flag, and its length.
const PREFIX_BYTES: usize = 5;
