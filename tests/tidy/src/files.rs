//! The text files of the checkout: those that git tracks, and new ones that it does not ignore, so that a rule speaks
//! before the commit and not after.

use std::{path::Path, process::Command, sync::LazyLock};

use crate::repository;

/// A file and what stands in it.
pub struct File {
    /// From the root of the repository, with `/`.
    pub path: String,
    pub text: String,
}

/// Every text file.
pub fn files() -> &'static [File] {
    static FILES: LazyLock<Vec<File>> = LazyLock::new(|| {
        let read = |path: String| {
            // Not read: binary files, and those deleted from the checkout but not yet from git.
            let text = String::from_utf8(std::fs::read(repository().join(&path)).ok()?).ok()?;
            Some(File { path, text })
        };
        let mut found = Vec::from_iter(listed().unwrap_or_else(walked).into_iter().filter_map(read));
        found.sort_by(|a, b| a.path.cmp(&b.path));
        assert!(found.iter().any(|file| file.path == "Cargo.toml"), "found no checkout at {:?}", repository());
        found
    });
    &FILES
}

/// Files whose name ends so.
pub fn ending(end: &str) -> impl Iterator<Item = &'static File> {
    files().iter().filter(move |file| file.path.ends_with(end))
}

/// The file at `path`, which must be there.
pub fn file(path: &str) -> &'static str {
    &files().iter().find(|file| file.path == path).unwrap_or_else(|| panic!("{path} is missing")).text
}

impl File {
    /// Lines with their numbers, from 1.
    pub fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        numbered(&self.text)
    }
}

/// Lines of `text` with their numbers, from 1.
pub fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(index, line)| (index + 1, line))
}

/// What git says; nothing where git or its folder is absent, as in an unpacked archive.
fn listed() -> Option<Vec<String>> {
    let arguments = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let done = Command::new("git").args(arguments).current_dir(repository()).output().ok()?;
    let names = String::from_utf8(done.stdout).ok()?;
    let names = Vec::from_iter(names.split_terminator('\0').map(str::to_owned));
    (done.status.success() && !names.is_empty()).then_some(names)
}

/// Every file but those in folders that tools make: `target` and hidden ones.
fn walked() -> Vec<String> {
    fn walk(folder: &Path, prefix: &str, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let name = entry.file_name().into_string().unwrap();
            let path = format!("{prefix}{name}");
            let made = (name.starts_with('.') && name != ".ci") || ["target", "__pycache__"].contains(&name.as_str());
            match entry.file_type().unwrap().is_dir() {
                true if made => {}
                true => walk(&entry.path(), &format!("{path}/"), found),
                false => found.push(path),
            }
        }
    }
    let mut found = Vec::new();
    walk(&repository(), "", &mut found);
    found
}

#[test]
fn without_git_the_same_sources_are_found() {
    let walked = walked();
    for file in files().iter().filter(|file| file.path.ends_with(".rs")) {
        assert!(walked.contains(&file.path), "{} is listed, but the walk does not meet it", file.path);
    }
}
