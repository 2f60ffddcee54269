//! Recipes from files: YAML, or JSON, which is YAML too. The contract's own reader takes them, so nothing is ignored.

use std::{fs::File, io::Read, path::Path};

use quarrel_client::proto::{
    command,
    v1::{self, command::Verb, quantize::How},
};

use crate::failure::Failure;

/// The largest file that is read: as the contract bounds a command.
const BYTES_MAX: u64 = command::COMMAND_BYTES_MAX as u64;

/// The recipe in a file.
pub(crate) fn recipe(path: &Path) -> Result<v1::Recipe, Failure> {
    let unreadable = |error| Failure::file("cannot read the recipe", path, &error);
    let advice =
        "Write `rules: [{targets: [\"*\"], scheme: W4A16}]` and `ignore: [\"@standard\"]`; SPEC.md, section Commands.";
    let wrong = |detail: String| Failure::usage(format!("recipe `{}`: {detail}", path.display()), advice);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > BYTES_MAX {
        return Err(wrong(format!("it is longer than {BYTES_MAX} bytes")));
    }
    let text = String::from_utf8(bytes).map_err(|error| wrong(format!("it is no UTF-8: {error}")))?;
    // One reader for both: serde_json would take the last of two equal keys without a word.
    let recipe: serde_json::Value = serde_saphyr::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let command = serde_json::json!({ "quantize": { "recipe": recipe } });
    let command = command::parse(command.to_string().as_bytes()).map_err(|error| wrong(error.to_string()))?;
    match command.verb {
        Some(Verb::Quantize(v1::Quantize { how: Some(How::Recipe(recipe)), .. })) => Ok(recipe),
        _ => Err(wrong("it is empty".to_owned())),
    }
}
