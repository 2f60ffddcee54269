//! Work item by item: on the rayon pool in which it is called, side by side; elsewhere one after the other. The same results
//! in the same order.

use rayon::prelude::*;

use crate::execute::Cancelled;

/// The results of all items, or that nobody wants them.
pub(crate) fn map<T: Send, R: Send>(
    items: Vec<T>,
    each: impl Fn(T) -> Result<R, Cancelled> + Sync + Send,
) -> Result<Vec<R>, Cancelled> {
    if is_wide() { items.into_par_iter().map(each).collect() } else { items.into_iter().map(each).collect() }
}

/// Does something with each.
pub(crate) fn for_each<T: Send>(
    items: Vec<T>,
    each: impl Fn(T) -> Result<(), Cancelled> + Sync + Send,
) -> Result<(), Cancelled> {
    if is_wide() { items.into_par_iter().try_for_each(each) } else { items.into_iter().try_for_each(each) }
}

/// Elsewhere rayon would start a pool of its own.
fn is_wide() -> bool {
    rayon::current_thread_index().is_some()
}
