//! Whoever ships the server may do so: every package that it is built or tested from has a licence that asks for no more
//! than a notice.

use crate::{expect_none, metadata::packages, spdx::satisfied};

const ALLOWED: [&str; 12] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Zlib",
];

#[test]
fn every_package_has_a_licence_that_asks_only_for_a_notice() {
    let mut findings = Vec::new();
    for package in packages().values() {
        let said = package.license.as_deref().ok_or_else(|| "no `license` in its manifest".to_owned());
        let problem = match said.and_then(|license| satisfied(license, |name| ALLOWED.contains(&name))) {
            Ok(true) => continue,
            Ok(false) => format!("`{}`", package.license.as_deref().unwrap_or_default()),
            Err(problem) => problem,
        };
        findings.push(format!("Cargo.lock: {} {}: {problem}", package.name, package.version));
    }
    expect_none("licences can be met with those of tests/tidy/src/licences.rs", &findings);
}

#[test]
fn what_is_ours_is_apache() {
    let ours = packages().values().filter(|package| package.member.is_some());
    let findings = ours.filter(|package| package.license.as_deref() != Some("Apache-2.0"));
    let findings = Vec::from_iter(findings.map(|package| format!("{}: {:?}", package.name, package.license)));
    expect_none("every member says `license.workspace = true`", &findings);
}
