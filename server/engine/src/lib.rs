//! What a command means for each layer, and the computing of it: synchronous, pure, deterministic.
//!
//! In the order in which a byte meets them: a [`Plan`] is made of a command before any data comes; `rows` and
//! `coded_rows` turn batches into units of work, layer by layer; `execute` and `decode` compute a unit on borrowed
//! bytes; `answer` turns results into batches again. Memory, threads and time are not decided here: that is `pool`.

#![forbid(unsafe_code)]

mod answer;
mod arrow_in;
mod coded_columns;
mod coded_head;
mod coded_rows;
mod compare;
mod contained;
mod decode;
mod execute;
mod extras;
mod faults;
mod importance;
mod ipc;
mod layer;
mod names;
mod nested;
mod parallel;
mod plan;
mod presets;
mod recipe;
mod rows;
mod scales;
mod schemas;
mod scheme;
mod shape;
mod stream;
mod tally;

pub use answer::Answer;
pub use arrow_in::ColumnError;
pub use compare::{Compared, to_f32};
pub use contained::contained;
pub use execute::{Cancel, Cancelled, amax};
pub use ipc::{Decoded, Decoder, body_bytes, is_light};
pub use layer::{LayerError, Limits, Note};
pub use names::check_rows;
pub use nested::{NESTED_BLOCK, NESTED_VALUES, decoded_scales};
pub use plan::{Plan, PlanError};
pub use presets::{PRESETS, Preset};
pub use quarrel_kernels::{
    Block, Codebook, Codes, Format, Level, LevelError, MxRule, Packing, Scaling, e4m3_bits, e4m3_value, packed_bytes,
};
pub use recipe::STANDARD;
pub use scheme::{Granularity, Scheme, SchemeError};
pub use stream::{Intake, Need, Output, Result, Unit};
pub use tally::listing;

/// The text within `max` bytes: a long one loses its middle, so that both ends stay readable.
pub fn shorten(text: &str, max: usize) -> String {
    if text.len() <= max {
        return text.to_owned();
    }
    let half = max.saturating_sub(3) / 2;
    let head = text.floor_char_boundary(half);
    let tail = text.ceil_char_boundary(text.len() - half);
    format!("{}...{}", &text[..head], &text[tail..])
}
