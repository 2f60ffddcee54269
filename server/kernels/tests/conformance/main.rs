//! One suite for every format, element type, arithmetic and CPU level. Each test crosses what can matter to it, and no more:
//!
//! | what | formats | levels | lengths | element types | groups | beside |
//! |---|---|---|---|---|---|---|
//! | `levels` | all | all | 0..=300 | all | all of F32, one of the others in turn | alignments 0..64 of every length, element type and group in turn |
//! | `formulas` | all | all | random | random | random | both arithmetics, adversarial numbers, given grids |
//! | `division` | symmetric integers | all | 1, 16, 256 | F32 | one, and each its own | each code's ties and ends, all scales |
//! | `invariants` | all | one in turn | up to 5,000 | all | all | cuts, orders, requantizing |
//! | `searching` | integers | all | 0..=300 | all in turn | one in turn | both searches: errors, cut channels, ranges that overflow |
//! | `conversion` | - | all | 0..=300 | all | - | every narrow number |
//! | `bounds` | all | all | 0..=300 | all | one in turn | both ends of a page |
//! | `blocks` | ggml's | all | whole blocks up to 2,304 | all | - | alignments, any bytes as blocks, both ends of a page |
//! | `nested` | `nf4`, `fp4` | all | 32..640 | F32 | 32 | scales other than the magnitudes |
//! | `metrics`, `contract` | cases | one | cases | F32 | one | what is undefined, what panics |
//!
//! The levels come first: what holds of all of them is then often tried at one. `oracle` says what must come out, `data` what
//! goes in; `channel` is where the API is called. `QUARREL_TEST_LEVELS` and `QUARREL_TEST_QUICK`: see `asked`.

#![allow(clippy::unwrap_used, reason = "tests")]

mod asked;
mod blocks;
mod bounds;
mod channel;
mod contract;
mod conversion;
mod data;
mod division;
mod formulas;
mod invariants;
mod levels;
mod metrics;
mod nested;
mod oracle;
mod place;
mod searching;
