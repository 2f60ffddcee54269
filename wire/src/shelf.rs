//! Memory for bodies, used again: fresh pages cost more than the copies into them, and the allocator gives what one thread frees back to
//! another slowly.

use std::sync::{Arc, Mutex, PoisonError};

use arrow_buffer::{Buffer, MutableBuffer};
use bytes::Bytes;

/// Smaller ones are the allocator's business.
const SHELVED_BYTES_MIN: usize = 64 << 10;
/// What lies idle at most, over all streams.
const IDLE_BYTES_MAX: usize = 4 << 20;

/// Buffers that nobody uses. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Shelf {
    idle: Arc<Mutex<Idle>>,
}

#[derive(Debug, Default)]
struct Idle {
    buffers: Vec<MutableBuffer>,
    bytes: usize,
}

impl Shelf {
    /// An empty buffer with room for so many bytes, aligned for Arrow.
    pub(crate) fn take(&self, bytes: usize) -> MutableBuffer {
        if bytes < SHELVED_BYTES_MIN {
            return MutableBuffer::with_capacity(bytes);
        }
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // The last one that fits and is not much too large.
        let fits = |buffer: &MutableBuffer| (bytes..=bytes + bytes / 4).contains(&buffer.capacity());
        let Some(at) = idle.buffers.iter().rposition(fits) else { return MutableBuffer::with_capacity(bytes) };
        let mut buffer = idle.buffers.swap_remove(at);
        idle.bytes -= buffer.capacity();
        buffer.clear();
        buffer
    }

    /// The same as Arrow's: it comes back when nobody uses it any more.
    pub(crate) fn lend(&self, buffer: MutableBuffer) -> Buffer {
        if buffer.capacity() < SHELVED_BYTES_MIN {
            return Buffer::from(buffer);
        }
        Buffer::from(Bytes::from_owner(Lent { buffer, shelf: self.clone() }))
    }

    fn put(&self, buffer: MutableBuffer) {
        if buffer.capacity() > IDLE_BYTES_MAX {
            return;
        }
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.bytes += buffer.capacity();
        idle.buffers.push(buffer);
        // The oldest go: nobody has asked for their size.
        while idle.bytes > IDLE_BYTES_MAX {
            idle.bytes -= idle.buffers.remove(0).capacity();
        }
    }
}

struct Lent {
    buffer: MutableBuffer,
    shelf: Shelf,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.buffer.as_slice()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.shelf.put(std::mem::replace(&mut self.buffer, MutableBuffer::new(0)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_when_its_last_user_is_gone_and_no_more_than_so_many_are_kept() {
        let shelf = Shelf::default();
        let mut buffer = shelf.take(1 << 20);
        buffer.extend_from_slice(&[7u8; 100]);
        let at = buffer.as_ptr();
        let lent = shelf.lend(buffer);
        let slice = lent.slice(50);
        drop(lent);
        assert_ne!(shelf.take(1 << 20).as_ptr(), at);
        assert_eq!(slice.as_slice(), [7; 50]);
        drop(slice);
        let again = shelf.take(900 << 10);
        drop(shelf.lend(MutableBuffer::new(0)));
        assert!(shelf.idle.lock().is_ok_and(|idle| idle.buffers.is_empty()), "small ones are not kept");
        assert_eq!((again.as_ptr(), again.len()), (at, 0));
        drop(shelf.lend(again));
        assert_ne!(shelf.take(100).as_ptr(), at, "much too large");

        let many: Vec<Buffer> = (0..40).map(|_| shelf.lend(MutableBuffer::with_capacity(1 << 20))).collect();
        drop(many);
        assert!(shelf.idle.lock().is_ok_and(|idle| idle.bytes <= IDLE_BYTES_MAX && idle.buffers.len() >= 3));
    }
}
