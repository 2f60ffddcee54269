//! Words that stand in certain files alone, or nowhere.

use regex::Regex;

use crate::{
    code::code,
    expect_none,
    files::{ending, numbered},
};

struct Ban {
    rule: &'static str,
    /// What is not to be found in code; comments and literals are not looked at.
    pattern: &'static str,
    /// Beginnings of the paths that are looked at.
    within: &'static [&'static str],
    /// Beginnings of the paths that are free.
    but: &'static [&'static str],
}

const EVERYWHERE: &[&str] = &[""];

const BANS: [Ban; 8] = [
    Ban {
        rule: "`unsafe` lives in server/kernels",
        pattern: r"\bunsafe\b",
        within: EVERYWHERE,
        but: &["server/kernels/"],
    },
    Ban {
        rule: "gRPC codes are named in server/flight/src/status.rs and client/rust/src/error.rs alone",
        // `Status::internal(..)` and its like name a code too.
        pattern: r"\bCode::|\btonic::Code\b|\bStatus::(?:ok|unknown|internal|aborted|cancelled|unavailable|data_loss|\w+_\w+)\(",
        within: EVERYWHERE,
        but: &["server/flight/src/status.rs", "client/rust/src/error.rs", "tests/"],
    },
    Ban {
        rule: "the environment is seen by server/flight/src/config.rs and the command line's arguments alone",
        pattern: r"\benv::(?:set_|remove_)?vars?(?:_os)?\b|\benv\s*=[^=]",
        within: EVERYWHERE,
        but: &["server/flight/src/config.rs", "client/cli/src/args.rs", "tests/", "server/kernels/tests/"],
    },
    Ban { rule: "nothing is left to do", pattern: r"\b(?:todo|unimplemented|dbg)!", within: EVERYWHERE, but: &[] },
    Ban {
        rule: "a library does not print: `tracing` does, or the caller",
        pattern: r"\be?print(?:ln)?!",
        within: &["proto/src/", "server/", "client/rust/src/"],
        but: &["server/kernels/benches/"],
    },
    Ban {
        rule: "nobody sleeps on a thread: wait for the event",
        pattern: r"\bthread::sleep\b|\bsleep_ms\b",
        within: EVERYWHERE,
        but: &[],
    },
    Ban {
        rule: "kernels and engine are synchronous",
        pattern: r"\basync\b|\.await\b",
        within: &["server/kernels/", "server/engine/"],
        but: &[],
    },
    Ban {
        rule: "kernels know no clock, thread, file, socket or environment",
        pattern: r"\bstd::(?:time|thread|fs|net|env|process)\b",
        within: &["server/kernels/src/"],
        but: &[],
    },
];

#[test]
fn banned_words_stand_nowhere_else() {
    let sources = Vec::from_iter(ending(".rs").map(|file| (&file.path, code(&file.text))));
    let begins = |path: &str, with: &[&str]| with.iter().any(|start| path.starts_with(start));
    let mut findings = Vec::new();
    for ban in &BANS {
        let pattern = Regex::new(ban.pattern).unwrap();
        for (path, code) in sources.iter().filter(|(path, _)| begins(path, ban.within) && !begins(path, ban.but)) {
            let found = numbered(code).filter_map(|(number, line)| Some((number, pattern.find(line)?.as_str())));
            findings.extend(found.map(|(number, word)| format!("{path}:{number}: `{word}`: {}", ban.rule)));
        }
    }
    expect_none("words that are banned there", &findings);
}

#[test]
fn each_pattern_finds_what_it_bans() {
    let examples = [
        &["unsafe { x }", "unsafe fn f()"][..],
        &["Code::Internal", "use tonic::Code;", "Status::invalid_argument(text)", "Status::internal(text)"],
        &["std::env::var(name)", "env::var_os(name)", "env::vars()", "#[arg(long, env = \"\")]"],
        &["todo!()", "dbg!(x)"],
        &["println!(\"\")", "eprint!(\"\")"],
        &["std::thread::sleep(d)"],
        &["async fn f()", "f().await"],
        &["use std::time::Instant;"],
    ];
    let fine = ["Status::new(code, text)", "let env == 1", "unsafe_code", "env!(\"\")", "asynchronous", "awaited"];
    for (ban, examples) in BANS.iter().zip(examples) {
        let pattern = Regex::new(ban.pattern).unwrap();
        for example in examples {
            assert!(pattern.is_match(example), "{}: misses {example}", ban.rule);
        }
        for example in fine {
            assert!(!pattern.is_match(example), "{}: bans {example}", ban.rule);
        }
    }
}
