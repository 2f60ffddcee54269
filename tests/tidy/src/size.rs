//! A file tells one thing. At 400 lines, ask what the second subject is.

use crate::{expect_none, files::files};

const LINES_MAX: usize = 400;

/// Longer files: how long each may become, and why it is one.
const LONGER: [(&str, usize, &str); 6] = [
    ("client/python/src/quarrel/reasons.py", 600, "the contract's reasons, one after another"),
    ("server/engine/src/answer.rs", 500, "one batch: its columns are built side by side from the same lines"),
    ("server/engine/src/coded_rows.rs", 500, "the inverse of rows.rs: one state machine"),
    ("server/engine/src/execute.rs", 550, "one pass in two halves (ranges, codes) over the same cells"),
    ("server/engine/src/plan.rs", 500, "what a command means: each option beside the errors that it can make"),
    ("server/engine/src/rows.rs", 550, "one state machine: a layer's every transition is in sight"),
];

#[test]
fn files_tell_one_thing() {
    let sources = files().iter().filter(|file| file.path.ends_with(".rs") || file.path.ends_with(".py"));
    let mut findings = Vec::new();
    let mut needed = Vec::new();
    for file in sources.filter(|file| !is_free(&file.path)) {
        let lines = lines(&file.text);
        let longer = LONGER.iter().find(|(path, ..)| *path == file.path);
        let most = longer.map_or(LINES_MAX, |(_, most, _)| *most);
        if lines > most {
            findings.push(format!("{}:{}: {lines} lines, expected at most {most}", file.path, most + 1));
        }
        if lines > LINES_MAX {
            needed.push(&file.path);
        }
    }
    for (path, ..) in LONGER.iter().filter(|(path, ..)| !needed.iter().any(|needed| needed == path)) {
        findings.push(format!("tests/tidy/src/size.rs: `{path}` is no longer that long: take it off the list"));
    }
    expect_none("files have at most 400 lines without their tests, or a reason in tests/tidy/src/size.rs", &findings);
}

/// Tests are long because they have many cases, generated code because nobody reads it.
fn is_free(path: &str) -> bool {
    path.starts_with("tests/")
        || path.contains("/tests/")
        || path.ends_with("/tests.rs")
        || path.contains("/generated/")
}

/// Lines without the tests at the end.
fn lines(text: &str) -> usize {
    text.split("#[cfg(test)]\nmod ").next().unwrap().lines().count()
}
