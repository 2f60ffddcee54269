//! Panics of libraries over bytes from outside: they are the caller's fault, and end in an error.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
};

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// What `act` makes of bytes from outside; none if it panics over them. What it was changing then is not to be used again.
pub fn contained<T>(act: impl FnOnce() -> T) -> Option<T> {
    CONTAINED.with(|contained| contained.set(true));
    let result = catch_unwind(AssertUnwindSafe(act));
    CONTAINED.with(|contained| contained.set(false));
    result.ok()
}

/// Whether a panic on this thread is one that [`contained`] turns into an error, and so no news for the log.
pub fn panics_are_contained() -> bool {
    CONTAINED.with(Cell::get)
}
