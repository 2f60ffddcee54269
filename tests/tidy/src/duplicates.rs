//! One version of each package: two are built twice, shipped twice, and their types do not fit each other.

use std::collections::BTreeMap;

use crate::{expect_none, metadata::packages};

/// Older versions that are there in spite of it: whose they are. The newest of each needs no row.
const OLDER: [(&str, &str, &str); 11] = [
    ("base64", "0.22", "tonic 0.14 and prost-reflect 0.16; arrow-flight is ahead"),
    ("crypto-common", "0.1", "digest 0.10"),
    ("digest", "0.10", "crc-fast 1.10, of object_store, which is ahead"),
    ("foldhash", "0.1", "hashbrown 0.15 and petgraph, of prost-build: tests alone, nothing that is shipped"),
    ("getrandom", "0.2", "const-random, which ahash has for WebAssembly alone: in the lock, never built here"),
    ("getrandom", "0.3", "ahash 0.8, of arrow-array; proptest's rand is ahead"),
    ("hashbrown", "0.15", "petgraph, of prost-build: tests alone, nothing that is shipped"),
    ("hashbrown", "0.16", "safetensors 0.8; the rest is ahead"),
    ("itertools", "0.14", "prost-build: tests alone, nothing that is shipped"),
    ("unicode-width", "0.1", "miette, of protox: tests alone, nothing that is shipped"),
    ("syn", "2.0", "macros of prost, tracing and zerocopy: in the build, not in the binary"),
];

#[test]
fn no_package_comes_in_two_versions() {
    let mut versions = BTreeMap::<_, Vec<_>>::new();
    for package in packages().values() {
        versions.entry(package.name.as_str()).or_default().push(package.version.as_str());
    }
    let mut unused = Vec::from(OLDER);
    let mut findings = Vec::new();
    for (name, mut versions) in versions {
        versions.sort_by_key(|version| order(version));
        let newest = versions.pop().unwrap_or_default();
        for version in versions {
            let rows = unused.len();
            unused.retain(|(of, older, _)| !(*of == name && version.starts_with(&format!("{older}."))));
            if unused.len() == rows {
                findings.push(format!(
                    "Cargo.lock: {name} {version} beside {newest}: see `cargo tree -i {name}@{version}`"
                ));
            }
        }
    }
    for (name, version, _) in unused {
        findings.push(format!("tests/tidy/src/duplicates.rs: {name} {version} is gone: take it off the list"));
    }
    expect_none("a package comes in one version, or its older one stands in tests/tidy/src/duplicates.rs", &findings);
}

/// Sorts versions by their numbers.
fn order(version: &str) -> Vec<u64> {
    let numbers = version.split(['-', '+']).next().unwrap_or_default().split('.');
    numbers.map(|number| number.parse().unwrap()).collect()
}
