//! A model's tokenizer, as llama.cpp wants it in a file: SentencePiece's own file, or what transformers writes of byte-level BPE and of SentencePiece.
//!
//! Source: `conversion/base.py` and `gguf-py/gguf/vocab.py` of llama.cpp as of PyPI's llama-cpp-python 0.3.36. That tells the way text is cut before BPE by running it; here
//! it is told by the patterns that `tokenizer.json` names, and what is not known is an error, not a guess.

mod special;

use std::collections::HashMap;

use bytes::Bytes;
use prost::Message;
use serde::Deserialize;
use serde_json::{Map, Value};

use self::special::{special, templates};
use super::metadata::Metadata;

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// More than any tokenizer has.
const TOKENS_MAX: u64 = 1 << 22;

/// What a token is, and how it is preferred.
struct Tokens {
    texts: Vec<String>,
    scores: Vec<f32>,
    kinds: Vec<i32>,
}

/// What the files of a tokenizer hold, by name; none where there is no such file.
pub(crate) struct Files {
    /// `tokenizer.model`.
    pub(crate) pieces: Option<Bytes>,
    /// `tokenizer.json`.
    pub(crate) tokenizer: Option<Bytes>,
    /// `tokenizer_config.json`.
    pub(crate) configuration: Option<Bytes>,
    /// `added_tokens.json`.
    pub(crate) added: Option<Bytes>,
    /// `chat_template.jinja`.
    pub(crate) template: Option<Bytes>,
    /// `chat_template.json`.
    pub(crate) template_json: Option<Bytes>,
}

/// What a file says of a tokenizer; `config` is the model's.
///
/// # Errors
/// What lacks, or cannot be understood, as a sentence.
pub(crate) fn metadata(files: &Files, config: &Map<String, Value>) -> Result<Metadata, String> {
    let size = config.get("vocab_size").and_then(Value::as_u64).filter(|size| *size <= TOKENS_MAX);
    let size = size.ok_or("its config.json has no `vocab_size`, or a larger one than any tokenizer has")? as usize;
    let configuration: Map<String, Value> = match &files.configuration {
        Some(bytes) => json(bytes, "tokenizer_config.json")?,
        None => Map::new(),
    };
    let tokenizer: Option<Tokenizer> =
        files.tokenizer.as_ref().map(|bytes| json(bytes, "tokenizer.json")).transpose()?;
    let mut found = Metadata::default();
    if let Some(is) = configuration.get("add_prefix_space").and_then(Value::as_bool) {
        found.put_bool("tokenizer.ggml.add_space_prefix", is);
    }
    let is_byte_level = match (&files.pieces, &tokenizer) {
        (Some(pieces), _) => {
            of_pieces(pieces, files, &configuration, size)?.put(&mut found, true);
            false
        }
        (None, Some(tokenizer)) if tokenizer.model.byte_fallback => {
            tokenizer.fallback_tokens(size)?.put(&mut found, true);
            false
        }
        (None, Some(tokenizer)) => {
            found.put_text("tokenizer.ggml.model", "gpt2");
            found.put_text("tokenizer.ggml.pre", tokenizer.cut()?);
            tokenizer.tokens(size)?.put(&mut found, false);
            let merges = tokenizer.model.merges();
            found.put_texts("tokenizer.ggml.merges", merges.iter().map(String::as_str));
            true
        }
        (None, None) => {
            return Err("it has no tokenizer (`tokenizer.model` or `tokenizer.json`)".to_owned());
        }
    };
    special(&mut found, tokenizer.as_ref(), (&configuration, config), size);
    templates(&mut found, &configuration, files)?;
    match size {
        // CodeLlama's; Granite's.
        32_016 if !is_byte_level => {
            for (token, at) in [("prefix", 32_007), ("suffix", 32_008), ("middle", 32_009), ("eot", 32_010)] {
                found.put_u32(&format!("tokenizer.ggml.{token}_token_id"), at);
            }
        }
        49_152 => found.put_bool("tokenizer.ggml.add_bos_token", false),
        _ => {}
    }
    Ok(found)
}

fn json<'a, T: Deserialize<'a>>(bytes: &'a Bytes, name: &str) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("its {name} is no JSON of the kind: {error}"))
}

impl Tokens {
    fn of(size: usize) -> Tokens {
        Tokens {
            texts: (0..size).map(|at| format!("[PAD{at}]")).collect(),
            scores: vec![-10_000.0; size],
            kinds: vec![UNUSED; size],
        }
    }

    fn set(&mut self, at: usize, text: &str, score: f32, kind: i32) {
        if at < self.texts.len() {
            (self.texts[at], self.scores[at], self.kinds[at]) = (text.to_owned(), score, kind);
        }
    }

    /// A token that was added: of people's own, spaces are spaces.
    fn add(&mut self, at: usize, text: &str, is_special: bool) {
        match is_special || looks_special(text) {
            true => self.set(at, text, -1_000.0, CONTROL),
            false => self.set(at, &text.replace('\u{2581}', " "), -1_000.0, USER_DEFINED),
        }
    }

    fn put(&self, found: &mut Metadata, of_pieces: bool) {
        if of_pieces {
            found.put_text("tokenizer.ggml.model", "llama");
            found.put_text("tokenizer.ggml.pre", "default");
        }
        found.put_texts("tokenizer.ggml.tokens", self.texts.iter().map(String::as_str));
        if of_pieces {
            found.put_f32s("tokenizer.ggml.scores", &self.scores);
        }
        found.put_i32s("tokenizer.ggml.token_type", &self.kinds);
    }
}

fn looks_special(text: &str) -> bool {
    let between = |start, end| text.starts_with(start) && text.ends_with(end);
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&text)
        || between("<|", "|>")
        || between("<\u{ff5c}", "\u{ff5c}>")
        || between("<unused", ">")
}

/// SentencePiece's file, as far as it is read: `sentencepiece_model.proto`.
#[derive(Clone, PartialEq, Message)]
struct Pieces {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

fn of_pieces(bytes: &Bytes, files: &Files, configuration: &Map<String, Value>, size: usize) -> Result<Tokens, String> {
    let model =
        Pieces::decode(bytes.clone()).map_err(|error| format!("its tokenizer.model cannot be read: {error}"))?;
    if model.pieces.is_empty() {
        return Err("its tokenizer.model has no pieces".to_owned());
    }
    let mut tokens = Tokens::of(size);
    for (at, piece) in model.pieces.iter().enumerate().take(size) {
        let kind = match piece.kind.unwrap_or(NORMAL) {
            kind @ (UNKNOWN | CONTROL | UNUSED | BYTE) => kind,
            _ => NORMAL,
        };
        tokens.set(at, piece.piece.as_deref().unwrap_or_default(), piece.score.unwrap_or(0.0), kind);
    }
    if let Some(bytes) = &files.added {
        let added: HashMap<String, usize> = json(bytes, "added_tokens.json")?;
        added.iter().for_each(|(text, at)| tokens.set(*at, text, -1_000.0, USER_DEFINED));
    }
    let added = configuration.get("added_tokens_decoder").and_then(Value::as_object);
    for (at, token) in added.into_iter().flatten() {
        let text = token.get("content").and_then(Value::as_str);
        if let (Ok(at), Some(text)) = (at.parse::<usize>(), text) {
            tokens.add(at, text, token.get("special").and_then(Value::as_bool).unwrap_or(false));
        }
    }
    Ok(tokens)
}

/// `tokenizer.json`, as far as it is read.
#[derive(Deserialize)]
struct Tokenizer {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<Added>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: HashMap<String, usize>,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// Of two tokens, with a space between them or apart.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair(String, String),
}

#[derive(Deserialize)]
struct Added {
    id: usize,
    content: String,
    #[serde(default)]
    special: bool,
}

impl Model {
    /// Two tokens with a space between them: one within is another letter, as in byte-level BPE.
    fn merges(&self) -> Vec<String> {
        let within = |part: &str| part.replace(' ', "\u{120}");
        let text = |merge: &Merge| match merge {
            Merge::Text(text) => text.clone(),
            Merge::Pair(one, other) => format!("{} {}", within(one), within(other)),
        };
        self.merges.iter().map(text).collect()
    }

    fn check(&self) -> Result<(), String> {
        match self.kind.as_deref() {
            None | Some("BPE") => Ok(()),
            Some(kind) => Err(format!("its tokenizer.json is of `{kind}`: expected BPE")),
        }
    }
}

impl Tokenizer {
    /// Whether all of its tokens are below a size.
    fn check(&self, size: usize) -> Result<(), String> {
        self.model.check()?;
        let added = self.added_tokens.iter().map(|token| (&token.content, token.id));
        match self.model.vocab.iter().map(|(text, at)| (text, *at)).chain(added).find(|(_, at)| *at >= size) {
            Some((text, at)) => {
                let text = quarrel_engine::shorten(text, 100);
                Err(format!("token `{text}` has number {at}, and `vocab_size` is {size}"))
            }
            None => Ok(()),
        }
    }

    /// Of byte-level BPE.
    fn tokens(&self, size: usize) -> Result<Tokens, String> {
        self.check(size)?;
        let mut tokens = Tokens::of(size);
        self.model.vocab.iter().for_each(|(text, at)| tokens.set(*at, text, 0.0, NORMAL));
        self.added_tokens.iter().for_each(|token| tokens.add(token.id, &token.content, token.special));
        Ok(tokens)
    }

    /// Of SentencePiece's BPE, whose scores are gone: what is merged first is preferred.
    fn fallback_tokens(&self, size: usize) -> Result<Tokens, String> {
        self.check(size)?;
        let mut ranks = HashMap::<String, usize>::new();
        for (rank, merge) in self.model.merges.iter().enumerate() {
            let whole = match merge {
                Merge::Text(text) => text.replacen(' ', "", 1),
                Merge::Pair(one, other) => format!("{one}{other}"),
            };
            ranks.entry(whole).or_insert(rank);
        }
        let mut tokens = Tokens::of(size);
        for (text, at) in &self.model.vocab {
            let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            let is_byte = digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok());
            let kind = match (is_byte, text.as_str()) {
                (true, _) => BYTE,
                (false, "<unk>") => UNKNOWN,
                (false, _) => NORMAL,
            };
            // Letters are no merge, and behind all of them.
            let last = self.model.merges.len();
            let score = if kind == NORMAL { -(ranks.get(text).copied().unwrap_or(last) as f32) } else { 0.0 };
            tokens.set(*at, text, score, kind);
        }
        for token in self.added_tokens.iter().filter(|token| token.content != "<unk>") {
            tokens.add(token.id, &token.content, token.special);
        }
        Ok(tokens)
    }

    /// llama.cpp's word for the way text is cut before BPE.
    fn cut(&self) -> Result<&'static str, String> {
        const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let one = |step: &Value| -> String {
            let is = |key: &str, usual: bool| step.get(key).and_then(Value::as_bool).unwrap_or(usual);
            match step.get("type").and_then(Value::as_str).unwrap_or_default() {
                "ByteLevel" if is("use_regex", true) => "bytes by words".to_owned(),
                "ByteLevel" => "bytes".to_owned(),
                "Digits" if is("individual_digits", false) => "digits".to_owned(),
                "Split" => step["pattern"]["Regex"].as_str().unwrap_or_default().to_owned(),
                other => other.to_owned(),
            }
        };
        let steps = match &self.pre_tokenizer {
            None => Vec::new(),
            Some(whole) => match whole.get("pretokenizers").and_then(Value::as_array) {
                Some(steps) => steps.iter().map(one).collect(),
                None => vec![one(whole)],
            },
        };
        let steps = Vec::from_iter(steps.iter().map(String::as_str));
        match (steps.as_slice(), self.model.ignore_merges) {
            (["bytes by words"], false) => Ok("gpt-2"),
            (["digits", "bytes by words"], false) => Ok("smollm"),
            ([LLAMA_3, "bytes"], true) => Ok("llama-bpe"),
            ([TEKKEN, "bytes"], true) => Ok("tekken"),
            _ => Err("the way its tokenizer.json cuts text before BPE is none of those that are known here (GPT-2's, SmolLM's, Llama 3's, \
                      Mistral's Tekken)"
                .to_owned()),
        }
    }
}
