//! Panics of libraries over bytes from outside: they are the caller's fault, and end in an error.

use std::{
    cell::Cell,
    panic::{self, AssertUnwindSafe, catch_unwind},
    sync::Once,
};

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

static HUSHED: Once = Once::new();

/// What `act` makes of bytes from outside; none if it panics over them. What it was changing then is not to be used again.
///
/// From the first call on, the process says nothing of such panics: its hook is asked about all others alone.
pub fn contained<T>(act: impl FnOnce() -> T) -> Option<T> {
    HUSHED.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !CONTAINED.with(Cell::get) {
                before(panic);
            }
        }));
    });
    CONTAINED.with(|contained| contained.set(true));
    let result = catch_unwind(AssertUnwindSafe(act));
    CONTAINED.with(|contained| contained.set(false));
    result.ok()
}
