//! Unsafe is rented: it lives in the kernels crate, and each use says what makes it sound.

use std::collections::BTreeSet;

use crate::{
    code::code,
    expect_none,
    files::{ending, file, numbered},
    metadata::members,
};

const KERNELS: &str = "server/kernels";

#[test]
fn every_crate_but_kernels_forbids_unsafe_code() {
    let roots = members().filter(|(_, package)| package.member.as_deref() != Some(KERNELS));
    let roots = BTreeSet::from_iter(roots.flat_map(|(_, package)| &package.roots));
    let bare = roots.iter().filter(|path| !code(file(path)).contains("#![forbid(unsafe_code)]"));
    let findings = Vec::from_iter(bare.map(|path| format!("{path}:1: no `#![forbid(unsafe_code)]`")));
    expect_none("every crate but kernels forbids unsafe code", &findings);
}

#[test]
fn every_unsafe_says_why_it_is_sound() {
    let mut findings = Vec::new();
    for file in ending(".rs").filter(|file| file.path.starts_with(KERNELS)) {
        for number in unexplained(&file.text) {
            findings.push(format!("{}:{number}: no `// SAFETY:` right above", file.path));
        }
    }
    expect_none("every `unsafe` has a `// SAFETY:` comment", &findings);
}

/// Lines with an `unsafe` that no comment explains: one that ends right above, attributes not counted, or above the
/// beginning of its statement, at most 2 lines further up.
fn unexplained(text: &str) -> Vec<usize> {
    let lines = Vec::from_iter(text.lines().map(str::trim));
    let is_comment = |line: &&&str| line.starts_with("//");
    let explained = |number: usize| {
        let mut above = lines[..number - 1].iter().rev().filter(|line| !line.starts_with("#[")).peekable();
        for _ in 0..2 {
            above.next_if(|line| !is_comment(line));
        }
        above.take_while(is_comment).any(|line| line.contains("SAFETY: ") || line.contains("# Safety"))
    };
    let is_unsafe = |line: &str| line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe");
    let code = code(text);
    numbered(&code).filter(|&(number, line)| is_unsafe(line) && !explained(number)).map(|(number, _)| number).collect()
}

#[test]
fn a_safety_comment_counts_only_where_it_is_read() {
    let cases = [
        ("// SAFETY: a fact\nunsafe { f() }", vec![]),
        ("// SAFETY: a fact\n// in two lines\n#[cfg(x)]\nlet a = unsafe { f() };", vec![]),
        ("// SAFETY: a fact\nlet a =\n    g(\n    unsafe { f() });", vec![]),
        ("unsafe { f() }", vec![1]),
        ("// SAFETY: a fact\nunsafe { f() }\n// other\nunsafe { g() }", vec![4]),
        ("// SAFETY: a fact\na\nb\nc\nd\nunsafe { g() }", vec![6]),
        ("/// # Safety\n/// The CPU has it.\n#[inline]\npub unsafe fn f() {}", vec![]),
        ("// unsafe is a word here\n#![deny(unsafe_code)]", vec![]),
    ];
    for (text, expected) in cases {
        assert_eq!(unexplained(text), expected, "{text}");
    }
}
