//! SPEC.md says all that a client can meet: every reason, column and pattern of the code, and no other reason.

use std::collections::{BTreeMap, BTreeSet};

use quarrel_proto::Reason;
use regex::Regex;

use crate::{
    code::code,
    expect_none,
    files::{file, numbered},
};

const SPEC: &str = "proto/SPEC.md";

#[test]
fn reasons_are_those_of_the_contract() {
    let row = Regex::new(r"^\| *`(\w+)` *\|.*\|$").unwrap();
    let rows = section("Reasons").filter_map(|(number, line)| Some((number, row.captures(line)?[1].to_owned(), line)));
    let rows = Vec::from_iter(rows);
    let codes = codes();
    let mut findings = Vec::new();
    for &reason in Reason::ALL {
        // Rows say why they are kept; no stream ends with such a reason.
        let code = if reason.meaning().starts_with("Kept: ") { "(row)" } else { &codes[&format!("{reason:?}")] };
        let expected = format!("| `{reason}` | {} | {code} | {} |", reason.meaning(), reason.advice());
        match rows.iter().find(|(_, word, _)| word == reason.word()) {
            Some((.., line)) if *line == expected => {}
            Some((number, ..)) => findings.push(format!("{SPEC}:{number}: expected {expected}")),
            None => findings.push(format!("{SPEC}: missing {expected}")),
        }
    }
    let mut seen = BTreeSet::new();
    for (number, word, _) in &rows {
        if !Reason::ALL.iter().any(|reason| reason.word() == word) {
            findings.push(format!("{SPEC}:{number}: `{word}` is no reason of proto/src/reason.rs"));
        }
        if !seen.insert(word) {
            findings.push(format!("{SPEC}:{number}: `{word}` again"));
        }
    }
    expect_none(
        "the table under `## Reasons` is that of proto/src/reason.rs and of server/flight/src/status.rs",
        &findings,
    );
}

/// What status.rs makes of each reason: variant to gRPC's own name of the code.
fn codes() -> BTreeMap<String, String> {
    let source = code(file("server/flight/src/status.rs"));
    let arm = Regex::new(r"((?:\|?\s*Reason::\w+\s*)+)=> Code::(\w+)").unwrap();
    let reason = Regex::new(r"Reason::(\w+)").unwrap();
    let capital = Regex::new(r"([a-z])([A-Z])").unwrap();
    let mut codes = BTreeMap::new();
    for arm in arm.captures_iter(&source) {
        let name = capital.replace_all(&arm[2], "${1}_$2").to_uppercase();
        codes.extend(reason.captures_iter(&arm[1]).map(|reason| (reason[1].to_owned(), name.clone())));
    }
    assert_eq!(
        codes.len(),
        Reason::ALL.len(),
        "status.rs matches every reason in arms `Reason::A | Reason::B => Code::C`"
    );
    codes
}

#[test]
fn columns_are_in_the_contract() {
    named_in_spec("proto/src/column.rs", r#"(?m)^ *pub const \w+: &str = "(\w+)";"#);
}

#[test]
fn metadata_keys_are_in_the_contract() {
    named_in_spec("proto/src/metadata.rs", r#"(?m)^ *pub const \w+: &str = "([\w.]+)";"#);
}

#[test]
fn standard_patterns_are_in_the_contract() {
    let source = file("server/engine/src/recipe.rs");
    let array = Regex::new(r"(?s)pub const STANDARD: [^=]*= \[(.*?)\];").unwrap();
    let array = &array.captures(source).expect("server/engine/src/recipe.rs: no `pub const STANDARD`")[1];
    written_in_spec("server/engine/src/recipe.rs", array, r#""([^"]+)""#);
}

/// Every constant of `path` is written in SPEC.md, as code.
fn named_in_spec(path: &str, constant: &str) {
    written_in_spec(path, file(path), constant);
}

fn written_in_spec(path: &str, source: &str, constant: &str) {
    let spec = file(SPEC);
    let names = Vec::from_iter(Regex::new(constant).unwrap().captures_iter(source).map(|found| found[1].to_owned()));
    assert!(!names.is_empty(), "{path}: no constant was found");
    let missing = names.iter().filter(|name| !spec.contains(&format!("`{name}`")));
    let findings = Vec::from_iter(missing.map(|name| format!("{SPEC}: missing `{name}`")));
    expect_none(&format!("SPEC.md names all of {path}"), &findings);
}

/// Lines of SPEC.md under the heading `title`, whatever its number and level, up to the next one as high.
fn section(title: &str) -> impl Iterator<Item = (usize, &'static str)> {
    let heading = Regex::new(r"^(#+) (?:[\d.]+ )?(.*)$").unwrap();
    let mut inside = None;
    numbered(file(SPEC)).filter(move |(_, line)| {
        if let Some(found) = heading.captures(line) {
            let level = found[1].len();
            match inside {
                None if found[2] == *title => inside = Some(level),
                Some(of) if level <= of => inside = Some(0),
                _ => {}
            }
        }
        inside.is_some_and(|level| level > 0)
    })
}
