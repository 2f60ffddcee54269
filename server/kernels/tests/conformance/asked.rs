//! What the environment asks of a run, in one place: `QUARREL_TEST_LEVELS`, names with commas between (every level of this CPU
//! otherwise), and `QUARREL_TEST_QUICK`, for tools that make a run fifty times slower.

use std::{env, sync::LazyLock};

use proptest::test_runner::Config;
use quarrel_kernels::Level;

/// The lengths at which loops begin, end or turn: around registers, packed words, groups and tiles.
const TURNS: [usize; 26] =
    [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 200, 255, 256, 257, 300];

/// The levels to test.
pub fn levels() -> &'static [Level] {
    static LEVELS: LazyLock<Vec<Level>> = LazyLock::new(|| match env::var("QUARREL_TEST_LEVELS") {
        Ok(names) => names.split(',').map(|name| Level::named(name).unwrap()).collect(),
        Err(_) => Level::available(),
    });
    &LEVELS
}

/// The level that the others must equal.
pub fn scalar() -> Level {
    Level::named("scalar").unwrap()
}

/// Every length of a channel.
pub fn lengths() -> impl Iterator<Item = usize> {
    (0..=300).filter(|len| !is_quick() || TURNS.contains(len))
}

/// How often something random is tried.
pub fn times(all: u32) -> u32 {
    if is_quick() { all.div_ceil(100) } else { all }
}

/// Every so many of what there is.
pub fn stride(quick: usize) -> usize {
    if is_quick() { quick } else { 1 }
}

/// A property's configuration.
pub fn cases(all: u32) -> Config {
    Config::with_cases(times(all))
}

/// Whether a tool runs the tests that is fifty times slower, and no CPU: valgrind.
pub fn is_quick() -> bool {
    env::var_os("QUARREL_TEST_QUICK").is_some()
}
