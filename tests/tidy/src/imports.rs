//! Who may import whom: the arrows of ARCHITECTURE.md. A new one is an architecture change: this table and that page in
//! one commit.

use std::collections::BTreeSet;

use crate::{
    expect_none,
    metadata::{Package, members, packages, ways},
};

/// Every crate of ours, by its folder: ours that it may import, and others' that must not even come in through a third.
/// (A name stands for the whole family: `arrow` is `arrow-array` too.)
const CRATES: [(&str, &[&str], &[&str]); 12] = [
    ("proto", &[], &["arrow", "tonic", "tokio", "hyper", "tracing"]),
    ("shelf", &[], &["tonic", "tokio", "rayon", "clap"]),
    ("wire", &["quarrel-shelf"], &["rayon", "clap", "tracing-subscriber"]),
    ("server/kernels", &[], &["arrow", "tonic", "tokio", "futures", "tracing", "log", "rayon", "clap"]),
    (
        "server/engine",
        &["quarrel-kernels", "quarrel-proto", "quarrel-shelf"],
        &["tonic", "tokio", "futures", "tracing", "clap"],
    ),
    ("server/pool", &[], &["arrow", "tonic", "hyper", "clap"]),
    ("server/checkpoint", &["quarrel-engine", "quarrel-pool", "quarrel-proto", "quarrel-shelf"], &["tonic", "clap"]),
    (
        "server/flight",
        &["quarrel-checkpoint", "quarrel-engine", "quarrel-pool", "quarrel-proto", "quarrel-shelf", "quarrel-wire"],
        &[],
    ),
    ("client/rust", &["quarrel-proto", "quarrel-shelf", "quarrel-wire"], &["clap", "rayon"]),
    ("client/cli", &["quarrel-checkpoint", "quarrel-client", "quarrel-flight"], &[]),
    ("tests/interop", &[], &[]),
    ("tests/tidy", &[], &[]),
];

#[test]
fn crates_import_only_downwards() {
    let mut findings = Vec::new();
    let mut rows = BTreeSet::from(CRATES.map(|(folder, ..)| folder));
    for (_, package) in members() {
        let folder = package.member.as_deref().unwrap();
        rows.remove(folder);
        let Some((_, ours, _)) = CRATES.iter().find(|(of, ..)| *of == folder) else {
            findings.push(format!("{folder}/Cargo.toml: `{}` has no row in tests/tidy/src/imports.rs", package.name));
            continue;
        };
        for import in imported(package).filter(|import| !ours.contains(import)) {
            findings.push(format!("{folder}/Cargo.toml: `{}` must not import `{import}`", package.name));
        }
    }
    findings.extend(rows.iter().map(|folder| format!("tests/tidy/src/imports.rs: `{folder}` is no member any more")));
    expect_none("crates import only what imports.rs allows", &findings);
}

#[test]
fn low_crates_stay_free_of_the_network_and_of_arrow() {
    let mut findings = Vec::new();
    for (id, package) in members() {
        let folder = package.member.as_deref().unwrap();
        let banned = CRATES.iter().find(|(of, ..)| *of == folder).map_or(&[][..], |(.., banned)| banned);
        for way in ways(id) {
            let last = way.last().unwrap();
            if banned.iter().any(|family| in_family(last, family)) {
                findings.push(format!("{folder}/Cargo.toml: must not be built from `{last}` ({})", way.join(" -> ")));
            }
        }
    }
    expect_none("crates are not built from what imports.rs bans", &findings);
}

/// Packages of ours that it is built from.
fn imported(package: &Package) -> impl Iterator<Item = &'static str> {
    let ours = package.built_from.iter().map(|id| &packages()[id]).filter(|package| package.member.is_some());
    ours.map(|package| package.name.as_str())
}

fn in_family(name: &str, family: &str) -> bool {
    name.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}
