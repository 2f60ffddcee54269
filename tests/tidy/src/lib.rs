//! The rules of this repository, as tests: what a reviewer would otherwise have to remember.

#![cfg(test)]
#![allow(clippy::unwrap_used, reason = "tests")]

mod proto;

use std::path::{Path, PathBuf};

/// The root of the checkout.
fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}
