//! The contract from outside: clients that use nothing of ours, against the server's binary.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "tests")]

// What is sent, to whom, and what must come back.
mod answers;
mod layers;
mod server;

// Who sends it.
mod plain;
mod stock;

#[test]
fn nothing_of_ours_is_used() {
    let manifest = include_str!("../../Cargo.toml");
    let ours = Vec::from_iter(manifest.lines().filter(|line| line.starts_with("quarrel")));
    assert!(ours.is_empty(), "dependencies of ours: {ours:?}");
    let plain = [
        ("answers.rs", include_str!("answers.rs")),
        ("layers.rs", include_str!("layers.rs")),
        ("plain.rs", include_str!("plain.rs")),
        ("plain/ipc.rs", include_str!("plain/ipc.rs")),
        ("server.rs", include_str!("server.rs")),
    ];
    for (path, source) in plain {
        assert!(!source.contains("arrow_flight"), "{path} uses arrow-flight: stock.rs alone may");
    }
}
