//! The rules of this repository, as tests: what a reviewer would otherwise have to remember.
//!
//! A rule reads the checkout or `cargo metadata`, and fails with one line a finding: file, line, what is wrong. A rule
//! with exceptions lists them beside it, each with its reason, and fails as well when one is no longer needed.

#![cfg(test)]
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "tests")]

// What the rules read.
mod code;
mod files;
mod metadata;
mod spdx;

// The rules.
mod bans;
mod docker;
mod duplicates;
mod imports;
mod licences;
mod machines;
mod manifests;
mod names;
mod proto;
mod size;
mod spec;
mod unsafe_code;

use std::path::{Path, PathBuf};

/// The root of the checkout.
fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// Fails with every finding at once, so that one run is enough to mend them all.
#[track_caller]
fn expect_none(rule: &str, findings: &[String]) {
    assert!(findings.is_empty(), "{rule}:\n  {}\n", findings.join("\n  "));
}
