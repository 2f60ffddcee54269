//! What is special about a tokenizer's tokens, and how a conversation is written down in them.

use std::collections::HashMap;

use bytes::Bytes;
use serde_json::{Map, Value};

use super::{Files, Tokenizer};
use crate::gguf::Metadata;

/// Which tokens are special, and which of them are added to text.
pub(super) fn special(
    found: &mut Metadata,
    tokenizer: Option<&Tokenizer>,
    (configuration, config): (&Map<String, Value>, &Map<String, Value>),
    size: usize,
) {
    const KINDS: [(&str, &str); 7] = [
        ("bos", "bos"),
        ("eos", "eos"),
        ("unk", "unknown"),
        ("sep", "seperator"),
        ("pad", "padding"),
        ("cls", "cls"),
        ("mask", "mask"),
    ];
    let text = |kind: &str| {
        let said = configuration.get(&format!("{kind}_token"))?;
        said.as_str().or_else(|| said.get("content")?.as_str())
    };
    let token = |text: &str| {
        let added = tokenizer.into_iter().flat_map(|tokenizer| &tokenizer.added_tokens);
        added.into_iter().find(|token| token.content == text).map(|token| token.id)
    };
    let by_config = |kind: &str| config.get(&format!("{kind}_token_id")).and_then(Value::as_u64).map(|at| at as usize);
    for (kind, word) in KINDS {
        let at = text(kind).and_then(token).or_else(|| by_config(kind)).filter(|at| *at < size);
        if let Some(at) = at {
            found.put_u32(&format!("tokenizer.ggml.{word}_token_id"), at as u32);
        }
    }
    let mut added = HashMap::<&str, bool>::new();
    let whole = tokenizer.and_then(|tokenizer| tokenizer.post_processor.as_ref());
    let steps = whole.map(|whole| match whole.get("processors").and_then(Value::as_array) {
        Some(steps) => steps.iter().collect(),
        None => vec![whole],
    });
    for step in steps.into_iter().flatten() {
        match step.get("type").and_then(Value::as_str) {
            Some("ByteLevel") => ["bos", "eos"].iter().for_each(|kind| {
                added.entry(kind).or_insert(false);
            }),
            Some("TemplateProcessing") => {
                let parts = step.get("single").and_then(Value::as_array).filter(|parts| parts.len() > 1);
                if let Some(first) = parts.and_then(|parts| special_name(parts.first()?)) {
                    added.insert("bos", text("bos").is_none_or(|bos| bos == first));
                }
                if let Some(last) = parts.and_then(|parts| special_name(parts.last()?)) {
                    added.insert("eos", text("eos").is_none_or(|eos| eos == last));
                }
            }
            _ => {}
        }
    }
    for kind in ["bos", "eos", "sep"] {
        let said = configuration.get(&format!("add_{kind}_token")).and_then(Value::as_bool);
        if let Some(is) = added.get(kind).copied().or(said) {
            found.put_bool(&format!("tokenizer.ggml.add_{kind}_token"), is);
        }
    }
}

/// The special token that a part of a template is.
fn special_name(part: &Value) -> Option<&str> {
    part.get("SpecialToken")?.get("id")?.as_str()
}

/// How a conversation is written down.
pub(super) fn template(configuration: &Map<String, Value>, files: &Files) -> Result<Option<String>, String> {
    if let Some(template) = configuration.get("chat_template").and_then(Value::as_str) {
        return Ok(Some(template.to_owned()));
    }
    let text =
        |bytes: &Bytes| String::from_utf8(bytes.to_vec()).map_err(|_| "its chat_template.jinja is no UTF-8".to_owned());
    files.template.as_ref().map(text).transpose()
}
