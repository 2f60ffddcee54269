//! Commands as bytes: protobuf or proto3 JSON in, JSON out.
//!
//! Nothing is ignored: a field that this version does not know is an error, in JSON and in protobuf, at any depth. What
//! the words in a command mean is not decided here but in the plan (`engine`).

use prost::{
    Message,
    encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field},
};
use prost_reflect::{DeserializeOptions, DynamicMessage, Kind, MessageDescriptor, Value};

use crate::{Reason, json, v1};

/// The largest command that is read, in bytes. A recipe that names every layer of a large model takes about 100 KiB.
pub const COMMAND_BYTES_MAX: usize = 1 << 20;

/// The most things that a command is made of: messages, lists' items and fields. As a message in memory each takes hundreds of bytes, whatever it
/// took on the way.
pub const COMMAND_ITEMS_MAX: usize = 1 << 16;

/// Why bytes are no command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No bytes at all.
    #[error(
        "the descriptor holds no command: expected `cmd` bytes, a quarrel.v1.Command in protobuf or JSON, \
         for example `{{\"quantize\": {{\"scheme\": \"W4A16\"}}}}`"
    )]
    Missing,
    /// Neither of the two encodings.
    #[error("the {bytes} bytes are no {message} in {encoding}: {detail}")]
    Malformed {
        /// What they should be: `quarrel.v1.Command`.
        message: &'static str,
        /// The length of what came.
        bytes: usize,
        /// `JSON` or `protobuf`, by the first byte.
        encoding: &'static str,
        /// What the decoder says.
        detail: String,
    },
    /// A well-formed command that names nothing to do.
    #[error("the command names no verb: expected one of `quantize`, `dequantize`, `measure`")]
    NoVerb,
    /// A field that this version does not know.
    #[error("unknown field: {detail}")]
    UnknownField {
        /// Which, and where.
        detail: String,
    },
}

impl CommandError {
    /// The contract's word for it.
    pub fn reason(&self) -> Reason {
        match self {
            CommandError::Missing => Reason::CommandMissing,
            CommandError::Malformed { .. } | CommandError::NoVerb => Reason::CommandMalformed,
            CommandError::UnknownField { .. } => Reason::FieldUnknown,
        }
    }
}

/// Reads a command: JSON if the first byte after white space is `{`, protobuf otherwise.
///
/// # Errors
/// [`CommandError`] for bytes that are neither, that hold an unknown field, or that name no verb.
pub fn parse(bytes: &[u8]) -> Result<v1::Command, CommandError> {
    let command: v1::Command = decode("quarrel.v1.Command", bytes)?;
    match command.verb {
        Some(_) => Ok(command),
        None => Err(CommandError::NoVerb),
    }
}

/// Reads the body of `job.submit`, likewise.
///
/// # Errors
/// As [`parse`].
pub fn parse_job_request(bytes: &[u8]) -> Result<v1::JobRequest, CommandError> {
    let request: v1::JobRequest = decode("quarrel.v1.JobRequest", bytes)?;
    match request.command.as_ref().and_then(|command| command.verb.as_ref()) {
        Some(_) => Ok(request),
        None => Err(CommandError::NoVerb),
    }
}

/// Reads the body of `job.status` and `job.cancel`, likewise.
///
/// # Errors
/// As [`parse`].
pub fn parse_job_name(bytes: &[u8]) -> Result<v1::JobName, CommandError> {
    decode("quarrel.v1.JobName", bytes)
}

fn decode<M: Message + Default>(message: &'static str, bytes: &[u8]) -> Result<M, CommandError> {
    let Some(first) = bytes.iter().find(|byte| !byte.is_ascii_whitespace()) else {
        return Err(CommandError::Missing);
    };
    let encoding = if *first == b'{' { "JSON" } else { "protobuf" };
    let malformed = |detail: String| CommandError::Malformed { message, bytes: bytes.len(), encoding, detail };
    if bytes.len() > COMMAND_BYTES_MAX {
        return Err(malformed(format!("expected at most {COMMAND_BYTES_MAX} bytes")));
    }
    let descriptor = json::descriptor(message);
    let items = match encoding {
        // At least as many as there are: they may stand in texts too.
        "JSON" => bytes.iter().filter(|byte| b"{[,".contains(byte)).count(),
        _ => items(&descriptor, bytes),
    };
    if items > COMMAND_ITEMS_MAX {
        return Err(malformed(format!("it has {items} items or more: expected at most {COMMAND_ITEMS_MAX}")));
    }
    let dynamic = match encoding {
        "JSON" => from_json(descriptor, bytes).map_err(|detail| match detail.contains("unrecognized field") {
            true => CommandError::UnknownField { detail },
            false => malformed(detail),
        })?,
        _ => DynamicMessage::decode(descriptor, bytes).map_err(|error| malformed(error.to_string()))?,
    };
    if let Some(detail) = unknown_field(&dynamic) {
        return Err(CommandError::UnknownField { detail });
    }
    dynamic.transcode_to().map_err(|error| malformed(error.to_string()))
}

/// The command as proto3 JSON with the proto's own field names: what the reply's schema metadata echoes.
pub fn to_json(command: &v1::Command) -> String {
    json::sparse("quarrel.v1.Command", command)
}

/// How many fields a message has, with those of messages in it. What is no message has as many as could be read, and is told by the decoder.
fn items(descriptor: &MessageDescriptor, mut bytes: &[u8]) -> usize {
    let mut count = 0;
    while let Ok((tag, wire)) = decode_key(&mut bytes) {
        count += 1;
        let Ok(length) = (match wire {
            WireType::LengthDelimited => decode_varint(&mut bytes),
            _ => skip_field(wire, tag, &mut bytes, DecodeContext::default()).map(|()| 0),
        }) else {
            break;
        };
        let Some((inner, rest)) = usize::try_from(length).ok().and_then(|length| bytes.split_at_checked(length)) else {
            break;
        };
        bytes = rest;
        if let Some(Kind::Message(descriptor)) = descriptor.get_field(tag).map(|field| field.kind()) {
            count += items(&descriptor, inner);
        }
    }
    count
}

fn from_json(descriptor: MessageDescriptor, bytes: &[u8]) -> Result<DynamicMessage, String> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let options = DeserializeOptions::new().deny_unknown_fields(true);
    let message = DynamicMessage::deserialize_with_options(descriptor, &mut deserializer, &options)
        .map_err(|error| located(&error, bytes))?;
    deserializer.end().map_err(|error| located(&error, bytes))?;
    Ok(message)
}

/// The reader's words, and what it had read by then: it names no field.
fn located(error: &serde_json::Error, bytes: &[u8]) -> String {
    const SHOWN: usize = 40;
    let line = bytes.split(|byte| *byte == b'\n').nth(error.line().saturating_sub(1)).unwrap_or_default();
    let read = &line[..error.column().min(line.len())];
    let shown = String::from_utf8_lossy(&read[read.len().saturating_sub(SHOWN)..]);
    format!("{error}, after `{}`", shown.trim())
}

/// The first unknown field at any depth, as a sentence.
fn unknown_field(message: &DynamicMessage) -> Option<String> {
    if let Some(field) = message.unknown_fields().next() {
        return Some(format!("field number {} of `{}`", field.number(), message_name(message)));
    }
    message.fields().find_map(|(_, value)| match value {
        Value::Message(inner) => unknown_field(inner),
        Value::List(values) => values.iter().filter_map(Value::as_message).find_map(unknown_field),
        _ => None,
    })
}

fn message_name(message: &DynamicMessage) -> String {
    use prost_reflect::ReflectMessage;
    message.descriptor().name().to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test")]

    use super::*;
    use crate::v1::{Command, Quantize, command::Verb, quantize::How};

    fn w4a16() -> Command {
        let quantize = Quantize { how: Some(How::Scheme("W4A16".into())), ..Default::default() };
        Command { verb: Some(Verb::Quantize(quantize)), ..Default::default() }
    }

    #[test]
    fn json_and_protobuf_mean_the_same() {
        assert_eq!(parse(b" \n{\"quantize\": {\"scheme\": \"W4A16\"}}").unwrap(), w4a16());
        assert_eq!(parse(&w4a16().encode_to_vec()).unwrap(), w4a16());
        assert_eq!(parse(to_json(&w4a16()).as_bytes()).unwrap(), w4a16());
        assert_eq!(to_json(&w4a16()), r#"{"quantize":{"scheme":"W4A16"}}"#);
    }

    #[test]
    fn many_things_in_few_bytes_are_refused_before_they_are_made() {
        let of = |rules: usize| {
            let length = |bytes: Vec<u8>| {
                let mut out = Vec::new();
                prost::encoding::encode_varint(bytes.len() as u64, &mut out);
                [out, bytes].concat()
            };
            let recipe = [0x0a, 0x00].repeat(rules);
            [vec![0x12], length([vec![0x12], length(recipe)].concat())].concat()
        };
        assert_eq!(parse(&of(1000)).unwrap().encode_to_vec(), of(1000));
        let json =
            |items: usize| format!(r#"{{"quantize": {{"recipe": {{"ignore": [{}"x"]}}}}}}"#, r#""","#.repeat(items));
        assert!(parse(json(1000).as_bytes()).is_ok());
        for bytes in [of(500_000), of(COMMAND_ITEMS_MAX), json(COMMAND_ITEMS_MAX).into_bytes()] {
            let error = parse(&bytes).unwrap_err();
            assert_eq!(error.reason(), Reason::CommandMalformed);
            assert!(error.to_string().contains("expected at most 65536"), "{error}");
        }
    }

    #[test]
    fn nothing_is_ignored() {
        let deep = [0x12, 0x08, 0x12, 0x06, 0x0a, 0x04, 0x12, 0x00, 0x78, 0x01]; // field 15 of a rule
        let cases: [(&[u8], Reason); 11] = [
            (b"", Reason::CommandMissing),
            (b"  ", Reason::CommandMissing),
            (b"\xff\xfe\xfd", Reason::CommandMalformed),
            (b"{", Reason::CommandMalformed),
            (b"{}", Reason::CommandMalformed),
            (br#"{"quantize": {"scheme": 4}}"#, Reason::CommandMalformed),
            (br#"{"quantize": {"scheme": "W8A8"}} x"#, Reason::CommandMalformed),
            (br#"{"quantize": {"shceme": "W8A8"}}"#, Reason::FieldUnknown),
            (br#"{"quantize": {"recipe": {"rules": [{"target": ["*"]}]}}}"#, Reason::FieldUnknown),
            (&[0xa0, 0x06, 0x01], Reason::FieldUnknown),
            (&deep, Reason::FieldUnknown),
        ];
        for (bytes, reason) in cases {
            let error = parse(bytes).unwrap_err();
            assert_eq!(error.reason(), reason, "{bytes:?}: {error}");
        }
    }

    #[test]
    fn a_value_that_cannot_be_is_shown_with_its_field() {
        let error = parse(br#"{"quantize": {"scheme": "int4", "group_size": -1}}"#).unwrap_err();
        assert!(error.to_string().contains(r#""group_size": -1"#), "{error}");
    }

    #[test]
    fn no_protobuf_command_begins_like_json() {
        for field in json::descriptor("quarrel.v1.Command").fields() {
            assert!(![1, 4, 15].contains(&field.number()), "{}", field.name());
        }
    }
}
