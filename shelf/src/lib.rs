//! Memory for large buffers, used again: fresh pages, and zeros in them, cost more than what is written there, and the allocator gives
//! what one thread frees back to another slowly.

#![forbid(unsafe_code)]

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
};

use arrow_buffer::{Buffer, MutableBuffer};
use bytes::Bytes;

/// Smaller ones are the allocator's business.
const SHELVED_BYTES_MIN: usize = 64 << 10;
/// What lies idle at most, over all streams.
const IDLE_BYTES_MAX: usize = 8 << 20;

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
    pub fn empty(&self, bytes: usize) -> MutableBuffer {
        let mut buffer = self.take(bytes).unwrap_or_else(|| MutableBuffer::with_capacity(bytes));
        buffer.clear();
        buffer
    }

    /// So many bytes, aligned for Arrow, of which each is to be written: they hold whatever was written there before.
    pub fn room(&self, bytes: usize) -> Room {
        let mut buffer = self.take(bytes).unwrap_or_else(|| MutableBuffer::from_len_zeroed(bytes));
        // What was shorter before grows by zeros.
        buffer.resize(bytes, 0);
        Room { buffer, shelf: self.clone() }
    }

    /// The same as Arrow's: it comes back when nobody uses it any more.
    pub fn lend(&self, buffer: MutableBuffer) -> Buffer {
        if buffer.capacity() < SHELVED_BYTES_MIN {
            return Buffer::from(buffer);
        }
        Buffer::from(Bytes::from_owner(Lent { buffer, shelf: self.clone() }))
    }

    fn take(&self, bytes: usize) -> Option<MutableBuffer> {
        if bytes < SHELVED_BYTES_MIN {
            return None;
        }
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        // The last one that fits and is not much too large.
        let fits = |buffer: &MutableBuffer| (bytes..=bytes + bytes / 4).contains(&buffer.capacity());
        let at = idle.buffers.iter().rposition(fits)?;
        let buffer = idle.buffers.remove(at);
        idle.bytes -= buffer.capacity();
        Some(buffer)
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

/// Bytes to be written, of a [`Shelf`].
#[derive(Debug)]
pub struct Room {
    buffer: MutableBuffer,
    shelf: Shelf,
}

impl Room {
    /// A copy of those bytes, one slice after the other.
    pub fn joined(slices: &[&[u8]]) -> Room {
        let mut buffer = MutableBuffer::with_capacity(slices.iter().map(|slice| slice.len()).sum());
        for slice in slices {
            buffer.extend_from_slice(slice);
        }
        Room { buffer, shelf: Shelf::default() }
    }

    /// What was written, as Arrow's.
    pub fn lent(self) -> Buffer {
        self.shelf.lend(self.buffer)
    }
}

impl Default for Room {
    /// No bytes.
    fn default() -> Room {
        Room::joined(&[])
    }
}

impl Deref for Room {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer
    }
}

impl DerefMut for Room {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buffer
    }
}

/// What is lent.
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
    fn room_is_as_long_as_it_is_asked_for_whatever_lay_there() {
        let shelf = Shelf::default();
        for (bytes, before) in [(100_000, 0), (90_000, 7), (99_000, 7), (10, 0)] {
            let mut room = shelf.room(bytes);
            assert_eq!((room.len(), room[0], room[bytes - 1] == 7), (bytes, before, before == 7 && bytes < 95_000));
            room.fill(7);
            assert_eq!(room.lent().as_slice(), vec![7; bytes]);
        }
        assert!(Room::default().is_empty());
        assert_eq!(*Room::joined(&[&[1, 2], &[], &[3]]), [1, 2, 3]);
    }

    #[test]
    fn a_buffer_comes_back_when_its_last_user_is_gone_and_no_more_than_so_many_are_kept() {
        let shelf = Shelf::default();
        let mut buffer = shelf.empty(1 << 20);
        buffer.extend_from_slice(&[7u8; 100]);
        let at = buffer.as_ptr();
        let lent = shelf.lend(buffer);
        let slice = lent.slice(50);
        drop(lent);
        assert_ne!(shelf.empty(1 << 20).as_ptr(), at);
        assert_eq!(slice.as_slice(), [7; 50]);
        drop(slice);
        let again = shelf.empty(900 << 10);
        drop(shelf.lend(MutableBuffer::new(0)));
        assert!(shelf.idle.lock().is_ok_and(|idle| idle.buffers.is_empty()), "small ones are not kept");
        assert_eq!((again.as_ptr(), again.len()), (at, 0));
        drop(shelf.lend(again));
        assert_ne!(shelf.empty(100).as_ptr(), at, "much too large");

        let many: Vec<Buffer> = (0..40).map(|_| shelf.lend(MutableBuffer::with_capacity(1 << 20))).collect();
        drop(many);
        assert!(shelf.idle.lock().is_ok_and(|idle| idle.bytes <= IDLE_BYTES_MAX && idle.buffers.len() >= 3));
    }
}
