//! One message of a request, however it came.

use arrow_buffer::Buffer;
use bytes::Bytes;
use quarrel_engine::is_light;
use quarrel_pool::Landing;

/// One message of a request, however it came.
#[derive(Debug, Default)]
pub(crate) struct FrameIn {
    /// The command, where the message has a descriptor.
    pub(crate) command: Option<Bytes>,
    /// An Arrow IPC message; empty for a message that carries none.
    pub(crate) header: Bytes,
    /// Its body.
    pub(crate) body: Buffer,
    /// The message's `app_metadata`.
    pub(crate) metadata: Bytes,
    /// Whether nothing comes after it, though the request may stay open.
    pub(crate) is_last: bool,
    /// The room that it takes, until its rows have room of their own and are computed.
    pub(crate) room: Option<Landing>,
}

impl FrameIn {
    /// Whether it is decoded where it came, and not on the pool.
    pub(crate) fn is_light(&self) -> bool {
        is_light(&self.header, self.body.len())
    }
}
