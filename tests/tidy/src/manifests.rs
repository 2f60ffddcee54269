//! Versions, features and profiles are chosen once, in the root's Cargo.toml.

use crate::{
    expect_none,
    files::{File, ending, file},
};

/// Workspaces of their own, which cannot take what the root chose, and why they are not members.
const APART: [(&str, &str); 1] =
    [("tests/fuzz/Cargo.toml", "it links with libFuzzer alone; built with the root's lock, so versions are the same")];

#[test]
fn members_take_every_dependency_as_the_root_chose_it() {
    let mut findings = Vec::new();
    for (path, _) in APART.iter().filter(|(path, _)| !file(path).contains("[workspace]\n")) {
        findings.push(format!("{path}:1: it is a member: take it off the list in tests/tidy/src/manifests.rs"));
    }
    for file in ending("/Cargo.toml").filter(|file| APART.iter().all(|(path, _)| file.path != *path)) {
        for (number, line) in dependencies(file).filter(|(_, line)| !line.ends_with(".workspace = true")) {
            findings.push(format!("{}:{number}: `{line}`: expected `name.workspace = true`", file.path));
        }
    }
    expect_none("features and versions of dependencies stand in the root's [workspace.dependencies] alone", &findings);
}

#[test]
fn a_panic_unwinds() {
    let mut findings = Vec::new();
    for file in ending("Cargo.toml") {
        let aborts = file.lines().filter(|(_, line)| {
            let setting: String = line.split('#').next().unwrap().split_whitespace().collect();
            setting == r#"panic="abort""#
        });
        findings.extend(aborts.map(|(number, _)| format!("{}:{number}: `panic = \"abort\"`", file.path)));
    }
    expect_none("a panic ends its stream, never the server", &findings);
}

#[test]
fn members_take_the_lints() {
    let bare = ending("/Cargo.toml").filter(|file| !file.text.contains("[lints]\nworkspace = true\n"));
    let findings = Vec::from_iter(bare.map(|file| format!("{}:1: no `[lints]` with `workspace = true`", file.path)));
    expect_none("every member takes the workspace's lints", &findings);
}

/// Lines of a manifest's dependency sections.
fn dependencies(file: &File) -> impl Iterator<Item = (usize, &str)> {
    let mut inside = false;
    file.lines().filter(move |(_, line)| {
        if line.starts_with('[') {
            // `[dependencies.name]` is a dependency of more than one line: it is found by its header.
            inside = line.contains("dependencies");
            return line.contains("dependencies.");
        }
        inside && !line.is_empty() && !line.starts_with('#')
    })
}
