//! What is special about a tokenizer's tokens, and how a conversation is written down in them.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::{Files, Tokenizer, json};
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
    let mut ends_with = None;
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
                    // Then that is what ends a text, and the other what ends a turn.
                    ends_with = text("eos").filter(|eos| *eos != last).and(token(last));
                    added.insert("eos", true);
                }
            }
            _ => {}
        }
    }
    if let Some(end) = ends_with {
        if let Some(turn) = found.number("tokenizer.ggml.eos_token_id") {
            found.put_u32("tokenizer.ggml.eot_token_id", turn as u32);
        }
        found.put_u32("tokenizer.ggml.eos_token_id", end as u32);
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

/// How a conversation is written down: a template, or several with a name each.
///
/// # Errors
/// What is no such thing.
pub(super) fn templates(found: &mut Metadata, configuration: &Map<String, Value>, files: &Files) -> Result<(), String> {
    let said = configuration.get("chat_template").filter(|value| !value.is_null()).cloned();
    let said = match (said, &files.template, &files.template_json) {
        (Some(said), ..) => Some(said),
        (None, Some(bytes), _) => {
            let text = String::from_utf8(bytes.to_vec());
            Some(Value::String(text.map_err(|_| "its chat_template.jinja is no UTF-8".to_owned())?))
        }
        (None, None, Some(bytes)) => json::<Map<String, Value>>(bytes, "chat_template.json")?.remove("chat_template"),
        (None, None, None) => None,
    };
    let several = match said {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::String(template)) => {
            found.put_text("tokenizer.chat_template", &template);
            return Ok(());
        }
        Some(Value::Array(several)) => several,
        Some(_) => return Err("its `chat_template` is neither a text nor a list of them".to_owned()),
    };
    let mut names = Vec::new();
    for one in &several {
        let part = |key: &str| one.get(key).and_then(Value::as_str);
        let (Some(name), Some(template)) = (part("name"), part("template")) else {
            return Err("its `chat_template` lists one without a name or a template".to_owned());
        };
        let plain = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '_' };
        match name.chars().map(plain).collect::<String>() {
            name if name == "default" => found.put_text("tokenizer.chat_template", template),
            name => {
                found.put_text(&format!("tokenizer.chat_template.{name}"), template);
                names.push(name);
            }
        }
    }
    if !names.is_empty() {
        found.put_texts("tokenizer.chat_templates", names.iter().map(String::as_str));
    }
    Ok(())
}
