//! What cargo knows of the workspace and of every package that it is built from.

use std::{
    collections::{BTreeMap, VecDeque},
    process::Command,
    sync::LazyLock,
};

use serde_json::Value;

use crate::repository;

/// A package, ours or another's.
#[derive(Debug)]
pub struct Package {
    pub name: String,
    pub version: String,
    /// An SPDX expression, if the manifest says one.
    pub license: Option<String>,
    /// The folder of a workspace member, from the root of the repository.
    pub member: Option<String>,
    /// Roots of its crates: `lib.rs`, `main.rs`, tests, benches. From the root of the repository, members only.
    pub roots: Vec<String>,
    /// Ids of what it is built from; what only its tests need is not among them.
    pub built_from: Vec<String>,
}

/// Every package by its id, for Linux on this processor: the platform that is built, tested and shipped.
pub fn packages() -> &'static BTreeMap<String, Package> {
    static PACKAGES: LazyLock<BTreeMap<String, Package>> = LazyLock::new(|| {
        // Whoever runs this test has built it, so the packages are there; a fresh machine may lack some of another kind.
        let found = metadata(&["--offline"]).or_else(|_| metadata(&[])).unwrap_or_else(|error| panic!("{error}"));
        let edges =
            BTreeMap::from_iter(list(&found["resolve"]["nodes"]).map(|node| (text(&node["id"]), &node["deps"])));
        let members = Vec::from_iter(list(&found["workspace_members"]).map(text));
        let described = list(&found["packages"]).map(|package| {
            let id = text(&package["id"]);
            (id.clone(), describe(package, edges[&id], members.contains(&id)))
        });
        described.collect()
    });
    &PACKAGES
}

/// The packages of this repository.
pub fn members() -> impl Iterator<Item = (&'static String, &'static Package)> {
    packages().iter().filter(|(_, package)| package.member.is_some())
}

/// The shortest way from a package to each one that it is built from: names, itself first.
pub fn ways(from: &str) -> Vec<Vec<&'static str>> {
    let (from, first) = packages().get_key_value(from).unwrap();
    let mut ways = BTreeMap::from([(from, vec![first.name.as_str()])]);
    let mut queue = VecDeque::from([from]);
    while let Some(id) = queue.pop_front() {
        for next in &packages()[id].built_from {
            if !ways.contains_key(next) {
                let mut way = ways[id].clone();
                way.push(&packages()[next].name);
                ways.insert(next, way);
                queue.push_back(next);
            }
        }
    }
    ways.into_values().collect()
}

fn metadata(more: &[&str]) -> Result<Value, String> {
    let platform = format!("--filter-platform={}-unknown-linux-gnu", std::env::consts::ARCH);
    let done = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--locked", &platform])
        .args(more)
        .current_dir(repository())
        .output()
        .map_err(|error| error.to_string())?;
    match done.status.success() {
        true => serde_json::from_slice(&done.stdout).map_err(|error| error.to_string()),
        false => Err(String::from_utf8_lossy(&done.stderr).into_owned()),
    }
}

fn describe(package: &Value, edges: &Value, member: bool) -> Package {
    let root = format!("{}/", repository().to_str().unwrap());
    let inside = |path: &Value| text(path).strip_prefix(&root).unwrap().to_owned();
    let is_dev = |kind: &Value| kind["kind"] == "dev";
    let built = list(edges).filter(|edge| !list(&edge["dep_kinds"]).all(is_dev));
    Package {
        name: text(&package["name"]),
        version: text(&package["version"]),
        license: package["license"].as_str().map(str::to_owned),
        member: member.then(|| inside(&package["manifest_path"]).replace("/Cargo.toml", "")),
        roots: match member {
            true => list(&package["targets"]).map(|target| inside(&target["src_path"])).collect(),
            false => Vec::new(),
        },
        built_from: built.map(|edge| text(&edge["pkg"])).collect(),
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().unwrap().iter()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}
