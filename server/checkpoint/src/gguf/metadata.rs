//! What a GGUF file says beside its tensors: keys and values, in order, as bytes.

use bytes::Bytes;

/// Keys and values, in their order. Values stay the bytes that they were read as.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Metadata(Vec<(String, Value)>);

/// A value: its kind, and what follows on it in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Value {
    pub(super) kind: u32,
    pub(super) bytes: Bytes,
}

const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
pub(super) const STRING: u32 = 8;
pub(super) const ARRAY: u32 = 9;

/// Bytes of a number; none for strings, arrays and what is no kind.
pub(super) fn width(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

impl Metadata {
    pub(super) fn push(&mut self, key: String, value: Value) {
        self.0.push((key, value));
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &(String, Value)> {
        self.0.iter()
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.0.iter().find(|(other, _)| other == key).map(|(_, value)| value)
    }

    /// Whether a key is there.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// A text.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        let value = self.get(key).filter(|value| value.kind == STRING)?;
        std::str::from_utf8(value.bytes.get(8..)?).ok()
    }

    /// A whole number, or the first of several.
    pub(crate) fn number(&self, key: &str) -> Option<u64> {
        let value = self.get(key)?;
        match value.kind {
            ARRAY => {
                let kind = u32::from_le_bytes(*value.bytes.first_chunk()?);
                number(kind, value.bytes.get(12..)?)
            }
            kind => number(kind, &value.bytes),
        }
    }

    /// Sets a number, as llama.cpp does: it is the last key then, wherever it stood.
    pub(crate) fn put_u32(&mut self, key: &str, number: u32) {
        self.put(key, U32, number.to_le_bytes().to_vec());
    }

    pub(crate) fn put_f32(&mut self, key: &str, number: f32) {
        self.put(key, F32, number.to_le_bytes().to_vec());
    }

    pub(crate) fn put_bool(&mut self, key: &str, is: bool) {
        self.put(key, BOOL, vec![u8::from(is)]);
    }

    pub(crate) fn put_text(&mut self, key: &str, text: &str) {
        let mut bytes = Vec::new();
        put_text(&mut bytes, text);
        self.put(key, STRING, bytes);
    }

    pub(crate) fn put_texts<'a>(&mut self, key: &str, texts: impl ExactSizeIterator<Item = &'a str>) {
        let mut bytes = [&STRING.to_le_bytes()[..], &(texts.len() as u64).to_le_bytes()].concat();
        texts.for_each(|text| put_text(&mut bytes, text));
        self.put(key, ARRAY, bytes);
    }

    pub(crate) fn put_f32s(&mut self, key: &str, numbers: &[f32]) {
        let numbers = numbers.iter().flat_map(|number| number.to_le_bytes());
        self.put_numbers(key, F32, numbers);
    }

    pub(crate) fn put_i32s(&mut self, key: &str, numbers: &[i32]) {
        let numbers = numbers.iter().flat_map(|number| number.to_le_bytes());
        self.put_numbers(key, I32, numbers);
    }

    /// Numbers of four bytes.
    fn put_numbers(&mut self, key: &str, kind: u32, numbers: impl Iterator<Item = u8>) {
        let numbers = Vec::from_iter(numbers);
        let count = (numbers.len() / 4) as u64;
        self.put(key, ARRAY, [&kind.to_le_bytes()[..], &count.to_le_bytes(), &numbers].concat());
    }

    fn put(&mut self, key: &str, kind: u32, bytes: Vec<u8>) {
        self.remove(key);
        self.push(key.to_owned(), Value { kind, bytes: Bytes::from(bytes) });
    }

    /// The same keys and values, and those of another behind them.
    pub(crate) fn extend(&mut self, other: Metadata) {
        other.0.into_iter().for_each(|(key, value)| {
            self.remove(&key);
            self.push(key, value);
        });
    }

    /// Takes a key out.
    pub(crate) fn remove(&mut self, key: &str) {
        self.0.retain(|(other, _)| other != key);
    }

    /// For people: numbers and short texts as they are, of others how many there are.
    pub(crate) fn shown(&self) -> impl Iterator<Item = (String, String)> + '_ {
        self.0.iter().map(|(key, value)| (key.clone(), value.shown()))
    }
}

pub(super) fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

impl Value {
    fn shown(&self) -> String {
        let bytes = &self.bytes;
        let text = match self.kind {
            STRING => bytes.get(8..).map(|text| String::from_utf8_lossy(text).into_owned()),
            ARRAY => bytes.get(4..12).and_then(|count| count.first_chunk()).map(|count| {
                let count = u64::from_le_bytes(*count);
                format!("[{count} values]")
            }),
            0 => bytes.first().map(u8::to_string),
            1 => bytes.first().map(|byte| (*byte as i8).to_string()),
            7 => bytes.first().map(|byte| (*byte != 0).to_string()),
            2 => bytes.first_chunk().map(|bytes| u16::from_le_bytes(*bytes).to_string()),
            3 => bytes.first_chunk().map(|bytes| i16::from_le_bytes(*bytes).to_string()),
            4 => bytes.first_chunk().map(|bytes| u32::from_le_bytes(*bytes).to_string()),
            5 => bytes.first_chunk().map(|bytes| i32::from_le_bytes(*bytes).to_string()),
            6 => bytes.first_chunk().map(|bytes| f32::from_le_bytes(*bytes).to_string()),
            10 => bytes.first_chunk().map(|bytes| u64::from_le_bytes(*bytes).to_string()),
            11 => bytes.first_chunk().map(|bytes| i64::from_le_bytes(*bytes).to_string()),
            12 => bytes.first_chunk().map(|bytes| f64::from_le_bytes(*bytes).to_string()),
            _ => None,
        };
        quarrel_engine::shorten(&text.unwrap_or_default(), 200)
    }
}

/// A whole number of a kind that is not less than zero.
fn number(kind: u32, bytes: &[u8]) -> Option<u64> {
    match kind {
        0 => bytes.first().map(|byte| u64::from(*byte)),
        2 => bytes.first_chunk().map(|bytes| u64::from(u16::from_le_bytes(*bytes))),
        4 => bytes.first_chunk().map(|bytes| u64::from(u32::from_le_bytes(*bytes))),
        5 => bytes.first_chunk().and_then(|bytes| u64::try_from(i32::from_le_bytes(*bytes)).ok()),
        10 => bytes.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)),
        11 => bytes.first_chunk().and_then(|bytes| u64::try_from(i64::from_le_bytes(*bytes)).ok()),
        _ => None,
    }
}
