//! proto3 JSON of the contract's messages, with the proto's own field names and 64-bit integers as numbers.

use std::sync::LazyLock;

use prost::Message;
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor, SerializeOptions};

use crate::{generated::DESCRIPTOR_SET, v1};

/// Progress of a stream, complete with zeros.
pub fn progress(progress: &v1::Progress) -> String {
    full("quarrel.v1.Progress", progress)
}

/// Summary of a stream, complete with zeros; what is undefined is absent.
pub fn summary(summary: &v1::Summary) -> String {
    full("quarrel.v1.Summary", summary)
}

/// Body of the action `server.info`.
pub fn server_info(info: &v1::ServerInfo) -> String {
    full("quarrel.v1.ServerInfo", info)
}

/// Body of the action `schemes.list`.
pub fn schemes(schemes: &v1::Schemes) -> String {
    full("quarrel.v1.Schemes", schemes)
}

/// A job, complete with zeros; what is undefined is absent.
pub fn job(job: &v1::Job) -> String {
    full("quarrel.v1.Job", job)
}

/// What [`job`] writes.
///
/// # Errors
/// What is wrong with the bytes.
pub fn read_job(bytes: &[u8]) -> Result<v1::Job, String> {
    read("quarrel.v1.Job", bytes)
}

/// A summary, as [`summary`] writes it. Fields of a newer minor version are passed over.
///
/// # Errors
/// What is wrong with the bytes.
pub fn read_summary(bytes: &[u8]) -> Result<v1::Summary, String> {
    read("quarrel.v1.Summary", bytes)
}

/// What [`server_info`] writes.
///
/// # Errors
/// What is wrong with the bytes.
pub fn read_server_info(bytes: &[u8]) -> Result<v1::ServerInfo, String> {
    read("quarrel.v1.ServerInfo", bytes)
}

/// What [`schemes`] writes.
///
/// # Errors
/// What is wrong with the bytes.
pub fn read_schemes(bytes: &[u8]) -> Result<v1::Schemes, String> {
    read("quarrel.v1.Schemes", bytes)
}

fn read<M: Message + Default>(name: &str, bytes: &[u8]) -> Result<M, String> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let options = DeserializeOptions::new().deny_unknown_fields(false);
    let message = DynamicMessage::deserialize_with_options(descriptor(name), &mut deserializer, &options);
    message.map_err(|error| error.to_string())?.transcode_to().map_err(|error| error.to_string())
}

/// Only the fields that are set.
pub(crate) fn sparse<M: Message>(name: &str, message: &M) -> String {
    print(name, message, &options().skip_default_fields(true))
}

fn full<M: Message>(name: &str, message: &M) -> String {
    print(name, message, &options().skip_default_fields(false))
}

fn options() -> SerializeOptions {
    // proto3 JSON parsers take 64-bit integers as strings or numbers; people who call `json.loads` want numbers.
    SerializeOptions::new().use_proto_field_name(true).stringify_64_bit_integers(false)
}

/// The descriptor of a message of `quarrel/v1`, by its full name.
pub(crate) fn descriptor(name: &str) -> MessageDescriptor {
    static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
        DescriptorPool::decode(DESCRIPTOR_SET).expect("the checked-in descriptor set is tested to be protox's output")
    });
    POOL.get_message_by_name(name).expect("only names of quarrel/v1 are asked for")
}

fn print<M: Message>(name: &str, message: &M, options: &SerializeOptions) -> String {
    let mut dynamic = DynamicMessage::new(descriptor(name));
    dynamic.transcode_from(message).expect("the descriptor is the message's own");
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::new(&mut out);
    dynamic.serialize_with_options(&mut serializer, options).expect("a Vec takes every byte");
    String::from_utf8(out).expect("serde_json writes UTF-8")
}
