//! Memory that shows when it is read or written beside: at any alignment, or against a page that cannot be touched.

use std::ops::{Deref, DerefMut};

/// Where a buffer lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In an allocation of just its size, which AddressSanitizer and valgrind watch.
    Own,
    /// So many elements after a multiple of 64 bytes; what lies beside it must stay as it is.
    Shifted(usize),
    /// Its last byte is the last that can be touched.
    #[cfg(unix)]
    BeforeGuard,
    /// Its first byte is the first that can be touched.
    #[cfg(unix)]
    AfterGuard,
}

/// A buffer.
pub struct Room<T: Plain> {
    memory: Memory<T>,
    start: usize,
    len: usize,
}

/// What may be seen in any bytes.
pub trait Plain: Copy + PartialEq {}
impl Plain for u8 {}
impl Plain for f32 {}
impl Plain for i32 {}

enum Memory<T> {
    Owned(Vec<T>),
    /// With what lies beside the room.
    Watched(Vec<T>, T),
    #[cfg(unix)]
    Guarded(guarded::Region),
}

impl Place {
    /// A buffer of so many elements, which hold `fill`.
    pub fn room<T: Plain>(self, len: usize, fill: T) -> Room<T> {
        let (memory, start) = match self {
            Place::Own => (Memory::Owned(vec![fill; len]), 0),
            Place::Shifted(by) => {
                let watched = vec![fill; by + len + 128 / size_of::<T>()];
                let start = watched.as_ptr().align_offset(64) + by;
                (Memory::Watched(watched, fill), start)
            }
            #[cfg(unix)]
            Place::BeforeGuard => (Memory::Guarded(guarded::Region::new()), guarded::BYTES / size_of::<T>() - len),
            #[cfg(unix)]
            Place::AfterGuard => (Memory::Guarded(guarded::Region::new()), 0),
        };
        let mut room = Room { memory, start, len };
        room.fill(fill);
        room
    }

    /// A buffer that holds a copy of `values`.
    pub fn holding<T: Plain>(self, values: &[T], beside: T) -> Room<T> {
        let mut room = self.room(values.len(), beside);
        room.copy_from_slice(values);
        room
    }
}

impl<T: Plain> Deref for Room<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        let all = match &self.memory {
            Memory::Owned(memory) | Memory::Watched(memory, _) => &memory[..],
            #[cfg(unix)]
            Memory::Guarded(region) => region.all(),
        };
        &all[self.start..self.start + self.len]
    }
}

impl<T: Plain> DerefMut for Room<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let all = match &mut self.memory {
            Memory::Owned(memory) | Memory::Watched(memory, _) => &mut memory[..],
            #[cfg(unix)]
            Memory::Guarded(region) => region.all_mut(),
        };
        &mut all[self.start..self.start + self.len]
    }
}

impl<T: Plain> Drop for Room<T> {
    fn drop(&mut self) {
        if let (Memory::Watched(memory, fill), false) = (&self.memory, std::thread::panicking()) {
            let (before, after) = (&memory[..self.start], &memory[self.start + self.len..]);
            assert!(before.iter().chain(after).all(|value| value == fill), "something was written beside a buffer");
        }
    }
}

#[cfg(unix)]
mod guarded {
    use std::{cell::RefCell, ffi::c_void, ptr::null_mut};

    use super::Plain;

    /// Of a region between its guards, and of each guard: a multiple of every page size there is.
    pub const BYTES: usize = 65_536;

    // Two functions do not need `libc`. The constants are the same on every Unix but for one.
    const PROT_NONE: i32 = 0;
    const PROT_READ_WRITE: i32 = 1 | 2;
    const MAP_PRIVATE: i32 = 2;
    const MAP_ANONYMOUS: i32 = if cfg!(any(target_os = "linux", target_os = "android")) { 0x20 } else { 0x1000 };

    // SAFETY: the C library's own declarations; `off_t` has 64 bits on every 64-bit Unix.
    unsafe extern "C" {
        fn mmap(at: *mut c_void, len: usize, protection: i32, flags: i32, file: i32, offset: i64) -> *mut c_void;
        fn mprotect(at: *mut c_void, len: usize, protection: i32) -> i32;
    }

    thread_local! {
        // Mapping takes longer than a kernel runs: regions are used again, and never unmapped.
        static FREE: RefCell<Vec<*mut u8>> = const { RefCell::new(Vec::new()) };
    }

    /// Memory with pages on either side that cannot be touched.
    pub struct Region(*mut u8);

    impl Region {
        pub fn new() -> Region {
            Region(FREE.with_borrow_mut(Vec::pop).unwrap_or_else(mapped))
        }

        pub fn all<T: Plain>(&self) -> &[T] {
            // SAFETY: `mapped` made `BYTES` bytes readable here, at a page's start. This region alone has them, and is borrowed
            // for as long; any bits are a `Plain`.
            unsafe { std::slice::from_raw_parts(self.0.cast(), BYTES / size_of::<T>()) }
        }

        pub fn all_mut<T: Plain>(&mut self) -> &mut [T] {
            // SAFETY: as in `all`, writable too, and exclusively borrowed.
            unsafe { std::slice::from_raw_parts_mut(self.0.cast(), BYTES / size_of::<T>()) }
        }
    }

    impl Drop for Region {
        fn drop(&mut self) {
            FREE.with_borrow_mut(|free| free.push(self.0));
        }
    }

    fn mapped() -> *mut u8 {
        // SAFETY: a new mapping, where the system likes, of no file.
        let base = unsafe { mmap(null_mut(), 3 * BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) };
        assert!(base as isize != -1, "mmap: {}", std::io::Error::last_os_error());
        let inside = base.cast::<u8>().wrapping_add(BYTES);
        // SAFETY: the middle third of the mapping made above, which nobody else knows of yet.
        let refused = unsafe { mprotect(inside.cast(), BYTES, PROT_READ_WRITE) };
        assert!(refused == 0, "mprotect: {}", std::io::Error::last_os_error());
        inside
    }
}
