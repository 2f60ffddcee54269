//! The progress bar, on standard error, if that is a terminal.

use std::{collections::HashMap, time::Duration};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::{args::OutputArgs, table::clean};

/// How far a verb is, in bytes of the source.
pub(crate) struct Progress {
    bar: ProgressBar,
    /// Bytes done of layers that are not complete. A layer that is sent again begins anew.
    open: HashMap<String, u64>,
    complete: u64,
}

impl Progress {
    pub(crate) fn new(total: u64, output: OutputArgs) -> Progress {
        let target = if output.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let style =
            ProgressStyle::with_template("{bar:32} {bytes:>10} of {total_bytes}  {bytes_per_sec}  {eta}  {wide_msg}");
        let bar = ProgressBar::with_draw_target(Some(total), target);
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(200));
        Progress { bar, open: HashMap::new(), complete: 0 }
    }

    /// So many bytes of a layer are done; `all` of them if it is complete.
    pub(crate) fn at(&mut self, layer: &str, bytes: u64, is_complete: bool) {
        if is_complete {
            self.open.remove(layer);
            self.complete += bytes;
        } else {
            self.open.insert(layer.to_owned(), bytes);
        }
        self.bar.set_position(self.complete + self.open.values().sum::<u64>());
        self.bar.set_message(clean(layer));
    }

    /// So many bytes were done before.
    pub(crate) fn skip(&mut self, bytes: u64) {
        self.complete += bytes;
    }

    /// What takes time beside the layers.
    pub(crate) fn say(&self, what: &'static str) {
        self.bar.set_message(what);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
