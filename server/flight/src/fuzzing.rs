//! What `tests/fuzz` sees of this crate, and nobody else: it is there in builds for fuzzing alone.

use arrow_buffer::Buffer;
use bytes::Bytes;
use quarrel_engine::Limits;

pub use crate::decode::Decoded;
use crate::decode::{self, FrameIn, panics_are_contained};

/// Arrow IPC in, as DoExchange reads it.
#[derive(Debug)]
pub struct Decoder(decode::Decoder);

impl Decoder {
    /// Before the first message.
    pub fn new(limits: Limits) -> Decoder {
        Decoder(decode::Decoder::new(limits))
    }

    /// The next message; an error as it is told to the client.
    ///
    /// # Errors
    /// What ends the stream.
    pub fn decode(&mut self, header: Bytes, body: &[u8]) -> Result<Decoded, String> {
        let frame = FrameIn { header, body: Buffer::from(body), ..FrameIn::default() };
        // The exchange asks first, of any bytes.
        let _ = frame.is_light();
        self.0.decode(&frame).map_err(|fault| fault.to_string())
    }
}

/// Whether a panic on this thread is one that the decoder turns into an error.
pub fn is_contained() -> bool {
    panics_are_contained()
}
