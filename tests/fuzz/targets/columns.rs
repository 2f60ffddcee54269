//! A file of layers in columns: Arrow IPC, as a file or as a stream, or Parquet.

#![forbid(unsafe_code)]
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarrel_checkpoint::{Columns, Location};
use quarrel_fuzz::{Folder, LIMITS, contain};

fuzz_target!(init: contain(), |input: &[u8]| {
    let folder = Folder::default();
    let name = if input.starts_with(b"PAR1") { "in.parquet" } else { "in.arrow" };
    folder.put(name, input);
    let Ok(mut columns) = Columns::open(&Location::disk(&folder.path(name)), LIMITS) else { return };
    while let Ok(Some(batch)) = columns.next_batch() {
        assert!(batch.num_rows() <= LIMITS.batch_rows_max);
    }
});
