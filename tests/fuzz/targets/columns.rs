//! A file of layers in columns: Arrow IPC, as a file or as a stream.

#![forbid(unsafe_code)]
#![no_main]

use std::{backtrace::Backtrace, panic};

use libfuzzer_sys::fuzz_target;
use quarrel_checkpoint::{Columns, Limits, Location};
use quarrel_engine::panics_are_contained;
use quarrel_fuzz::Folder;

const LIMITS: Limits = Limits {
    message_bytes_max: 1 << 20,
    span_bytes_max: 1 << 20,
    batch_rows_max: 1 << 10,
    layers_max: 1 << 10,
    name_bytes_max: 1 << 10,
};

fuzz_target!(init: contain(), |input: &[u8]| {
    let folder = Folder::default();
    folder.put("in.arrow", input);
    let Ok(mut columns) = Columns::open(&Location::disk(&folder.path("in.arrow")), LIMITS) else { return };
    while let Ok(Some(batch)) = columns.next_batch() {
        assert!(batch.num_rows() <= LIMITS.batch_rows_max);
    }
});

/// libFuzzer's crate ends the process at every panic: those that the decoder turns into errors are none.
fn contain() {
    panic::set_hook(Box::new(|panicked| {
        if !panics_are_contained() {
            eprintln!("{panicked}\n{}", Backtrace::force_capture());
        }
    }));
}
