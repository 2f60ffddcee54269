//! The image is built by what CI runs. No container engine runs there, so the Dockerfile is read instead.

use regex::Regex;

use crate::{
    expect_none,
    files::{file, numbered},
    metadata::members,
};

const DOCKERFILE: &str = "deploy/docker/Dockerfile";

#[test]
fn the_image_runs_what_ci_runs() {
    let targets = |text: &str| Vec::from_iter(text.split_whitespace().map(str::to_owned));
    let image = Vec::from_iter(instructions("RUN").flat_map(|(number, arguments)| {
        let made =
            arguments.strip_prefix("make ").unwrap_or_else(|| panic!("{DOCKERFILE}:{number}: expected `RUN make`"));
        targets(made)
    }));
    let ci = file(".ci/run").lines().filter_map(|line| line.trim().strip_prefix("make ")).flat_map(targets);
    let ci = Vec::from_iter(ci.filter(|target| target.starts_with("docker-")));
    assert_eq!(image, ci, "the RUN lines of {DOCKERFILE} (left) are the `make docker-` targets of .ci/run (right)");
    let makefile = file("Makefile");
    let missing = image.iter().filter(|target| !makefile.contains(&format!("\n{target}:")));
    let findings = Vec::from_iter(missing.map(|target| format!("Makefile: no target `{target}`")));
    expect_none("what the image runs is a target of the Makefile", &findings);
}

#[test]
fn the_image_is_built_from_images_that_anybody_can_pull() {
    // The one registry that needs no name, and a version.
    let official = Regex::new(r"^[a-z]+:[a-z0-9.-]*(?: AS [a-z]+)?$").unwrap();
    let odd = instructions("FROM").filter(|(_, image)| !official.is_match(image) || image.contains(":latest"));
    let findings = Vec::from_iter(odd.map(|(number, image)| format!("{DOCKERFILE}:{number}: `{image}`")));
    expect_none("an image is an official one, with its version", &findings);

    let manifest = file("Cargo.toml");
    let version = Regex::new(r#"rust-version = "([\d.]+)""#).unwrap().captures(manifest).unwrap()[1].to_owned();
    let (_, build) = instructions("FROM").next().unwrap();
    assert!(build.starts_with(&format!("rust:{version}-")), "{DOCKERFILE}: `{build}` is not Cargo.toml's {version}");
}

#[test]
fn the_image_does_not_run_as_root() {
    let (number, user) = instructions("USER").last().expect("a USER");
    assert!(Some(number) > instructions("FROM").last().map(|(number, _)| number), "USER is not of the final stage");
    let id = user.split(':').next().unwrap().parse::<u32>();
    assert!(id.is_ok_and(|id| id > 0), "{DOCKERFILE}:{number}: `{user}`: expected a number above 0");
}

#[test]
fn the_image_is_built_from_every_member() {
    let let_in = Vec::from_iter(file(".dockerignore").lines().filter_map(|line| line.strip_prefix('!')));
    let within = |folder: &str| let_in.iter().any(|path| folder == *path || folder.starts_with(&format!("{path}/")));
    let folders = members().map(|(_, package)| package.member.as_deref().unwrap());
    let findings =
        Vec::from_iter(folders.filter(|folder| !within(folder)).map(|folder| format!(".dockerignore: no `!{folder}`")));
    expect_none("cargo needs every member's manifest, so .dockerignore lets each in", &findings);
}

/// Instructions of one kind, with the line and the arguments of each. None goes on in a second line.
fn instructions(kind: &'static str) -> impl Iterator<Item = (usize, &'static str)> {
    numbered(file(DOCKERFILE)).filter_map(move |(number, line)| {
        assert!(!line.ends_with('\\'), "{DOCKERFILE}:{number}: this test reads one line at a time");
        Some((number, line.strip_prefix(kind)?.strip_prefix(' ')?.trim()))
    })
}
