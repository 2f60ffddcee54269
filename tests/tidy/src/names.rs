//! Names that say nothing.

use crate::{expect_none, files::files};

const BANNED: [&str; 10] =
    ["util", "utils", "common", "commons", "helper", "helpers", "manager", "managers", "misc", "stuff"];

#[test]
fn modules_are_named_for_what_they_hold() {
    let sources = files().iter().filter(|file| file.path.ends_with(".rs") || file.path.ends_with(".py"));
    let mut findings = Vec::new();
    for file in sources {
        let path = file.path.rsplit_once('.').unwrap().0;
        for name in path.split('/').filter(|name| BANNED.contains(&name.trim_start_matches('_'))) {
            findings.push(format!("{}:1: `{name}`", file.path));
        }
    }
    expect_none(
        "no module is named `utils`, `common`, `helper` or `manager`: if the honest name is long, split",
        &findings,
    );
}
