//! Nothing in the tree knows the machine that it was written on: whoever clones it has another registry, another folder.

use regex::Regex;

use crate::{expect_none, files::files};

/// Hosts of registries, in pieces: this file is looked at too.
const HOSTS: [&[&str]; 16] = [
    &["index.", "crates", ".io"],
    &["static.", "crates", ".io"],
    &["pypi", ".org"],
    &["python", "hosted.org"],
    &["deb.", "debian", ".org"],
    &["security.", "debian", ".org"],
    &["archive.", "ubuntu", ".com"],
    &["registry.", "npmjs", ".org"],
    &["registry-1.", "docker", ".io"],
    &["registry.", "hub.docker", ".com"],
    &["gh", "cr.io"],
    &["gc", "r.io"],
    &["qu", "ay.io"],
    &["proxy.", "golang", ".org"],
    &["conda.", "anaconda", ".org"],
    &["hugging", "face.co"],
];

/// Settings that name one.
const SETTINGS: [&[&str]; 3] = [&["index", "-url"], &["index", "_url"], &["replace", "-with"]];

/// Folders of one machine, at the root.
const FOLDERS: [&str; 5] = ["work", "root", "home", "Users", "workspace"];

/// cargo writes the registry's name on each package of the lock; whatever else stands there is looked at.
const LOCK: (&str, &str) = ("Cargo.lock", r#"source = "registry+"#);

#[test]
fn no_file_names_a_registry() {
    expect_none("a registry is the reader's choice", &findings(&registries()));
}

#[test]
fn no_file_names_a_folder_of_one_machine() {
    expect_none("paths are relative to the checkout", &findings(&folders()));
}

#[test]
fn each_pattern_finds_what_it_bans() {
    for host in HOSTS.iter().chain(&SETTINGS).map(|pieces| pieces.concat()) {
        assert!(registries().is_match(&format!("see https://{host}/simple")), "{host}");
    }
    for folder in FOLDERS {
        let path = format!("/{folder}/x");
        for line in
            [path.clone(), format!("cd {path}"), format!("\"{path}\""), format!("P={path}"), format!("file://{path}")]
        {
            assert!(folders().is_match(&line), "{line}");
        }
        for line in [format!("target{path}"), format!("..{path}"), format!("$HOME{path}")] {
            assert!(!folders().is_match(&line), "{line}");
        }
    }
}

fn registries() -> Regex {
    let words = HOSTS.iter().chain(&SETTINGS).map(|pieces| regex::escape(&pieces.concat()));
    Regex::new(&Vec::from_iter(words).join("|")).unwrap()
}

fn folders() -> Regex {
    Regex::new(&format!(r"(?:^|//|[^\w./~}}*)-])/(?:{})/", FOLDERS.join("|"))).unwrap()
}

fn findings(pattern: &Regex) -> Vec<String> {
    let mut findings = Vec::new();
    for file in files() {
        for (number, line) in file.lines().filter(|(_, line)| !(file.path == LOCK.0 && line.starts_with(LOCK.1))) {
            findings.extend(pattern.find(line).map(|found| format!("{}:{number}: `{}`", file.path, found.as_str())));
        }
    }
    findings
}
