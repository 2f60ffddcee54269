//! The forms of a file of tensors: what its header says, and where tensors lie behind it.

use std::collections::BTreeMap;

use safetensors::tensor::{Metadata, TensorInfo};
use serde::{Serialize, Serializer, ser::SerializeMap};

use crate::{
    gguf::{self, Head},
    stored::Entry,
};

/// What a file is, and what it says beside its tensors.
#[derive(Debug, Clone)]
pub(crate) enum Form {
    /// With this `__metadata__`.
    Safetensors(BTreeMap<String, String>),
    Gguf(Head),
}

impl Form {
    /// Puts tensors in the order of the format's own library.
    pub(crate) fn sort<T>(&self, entries: &mut [T], entry: impl Fn(&T) -> &Entry) {
        match self {
            // Whatever needs alignment first, then by name.
            Form::Safetensors(_) => entries.sort_by(|a, b| {
                let (a, b) = (entry(a), entry(b));
                b.1.plain().cmp(&a.1.plain()).then_with(|| a.0.cmp(&b.0))
            }),
            Form::Gguf(_) => entries.sort_by(|a, b| gguf::natural(&entry(a).0, &entry(b).0)),
        }
    }

    /// Where the next tensor may begin.
    pub(crate) fn aligned(&self, at: u64) -> u64 {
        match self {
            Form::Safetensors(_) => at,
            Form::Gguf(_) => at.next_multiple_of(gguf::ALIGNMENT),
        }
    }

    /// All bytes before the first of tensors in their order, each with its bytes.
    ///
    /// # Errors
    /// What is wrong with a tensor.
    pub(crate) fn header(&self, tensors: &[(&Entry, u64)]) -> Result<Vec<u8>, String> {
        match self {
            Form::Safetensors(metadata) => safetensors_header(tensors, metadata),
            Form::Gguf(head) => head.bytes(tensors.iter().copied()),
        }
    }
}

fn safetensors_header(tensors: &[(&Entry, u64)], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, String> {
    let mut offset = 0;
    let tensors = tensors.iter().map(|((name, element, shape), bytes)| {
        let dtype = element.plain().ok_or_else(|| format!("tensor `{name}`: safetensors has no type {element}"))?;
        let start = offset;
        offset += *bytes as usize;
        let shape = shape.iter().map(|dimension| *dimension as usize).collect();
        Ok((name.clone(), TensorInfo { dtype, shape, data_offsets: (start, offset) }))
    });
    let tensors = tensors.collect::<Result<Vec<_>, String>>()?;
    // This checks every tensor's bytes against its shape.
    Metadata::new(None, tensors.clone()).map_err(|error| error.to_string())?;
    let mut json = serde_json::to_vec(&Header { metadata, tensors }).map_err(|error| error.to_string())?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([&(json.len() as u64).to_le_bytes(), json.as_slice()].concat())
}

/// A header whose bytes depend on nothing but what is in it: the library's own writes metadata in the order of a hash map.
struct Header<'a> {
    metadata: &'a BTreeMap<String, String>,
    tensors: Vec<(String, TensorInfo)>,
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry("__metadata__", self.metadata)?;
        }
        for (name, info) in &self.tensors {
            map.serialize_entry(name, info)?;
        }
        map.end()
    }
}
