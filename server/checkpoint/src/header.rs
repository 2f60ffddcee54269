//! The header of a file of safetensors: JSON of whoever wrote the file.
//!
//! Not the library's own reading of it: of two tensors of one name that keeps the last, and it holds all of the JSON a second time, as values
//! many times as large. Whether the tensors lie one after the other is still the library's to say.

use std::{
    collections::{HashMap, HashSet},
    fmt,
};

use safetensors::tensor::{Metadata, TensorInfo};
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};

/// Reads it, every tensor's bytes checked against its shape.
///
/// # Errors
/// What is wrong with it, as a sentence about the file.
pub(crate) fn read(header: &[u8]) -> Result<Metadata, String> {
    let Entries { metadata, mut tensors } =
        serde_json::from_slice(header).map_err(|error| format!("its header is wrong: {error}"))?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    if let Some((name, info)) = tensors.iter().find(|(_, info)| !fits(info)) {
        let (start, end) = info.data_offsets;
        return Err(format!("tensor `{name}` of {:?} {:?} has bytes {start}..{end}", info.dtype, info.shape));
    }
    Metadata::new(metadata, tensors).map_err(|error| format!("its header is wrong: {error}"))
}

/// Whether a tensor has as many bytes as its shape: the library says only that one has not.
fn fits(info: &TensorInfo) -> bool {
    let (start, end) = info.data_offsets;
    let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |bits, dimension| bits.checked_mul(*dimension));
    bits.is_some_and(|bits| bits.is_multiple_of(8) && end.checked_sub(start) == Some(bits / 8))
}

/// What stands in it, in its order.
#[derive(Default)]
struct Entries {
    metadata: Option<HashMap<String, String>>,
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries, D::Error> {
        deserializer.deserialize_map(Once)
    }
}

/// Each name once.
struct Once;

impl<'de> Visitor<'de> for Once {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        let (mut entries, mut seen) = (Entries::default(), HashSet::new());
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format_args!("`{name}` is there twice")));
            }
            let wrong = |error: A::Error| A::Error::custom(format_args!("`{name}`: {error}"));
            match name.as_str() {
                "__metadata__" => entries.metadata = map.next_value().map_err(wrong)?,
                _ => {
                    let info = map.next_value().map_err(wrong)?;
                    entries.tensors.push((name, info));
                }
            }
        }
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(header: &str, says: &str) {
        let Err(error) = read(header.as_bytes()) else { panic!("{header}: expected `{says}`") };
        assert!(error.contains(says), "{header}: {error}");
    }

    #[test]
    fn a_header_says_each_thing_once_and_each_tensor_fits_its_shape() {
        let tensor = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
        assert!(read(format!(r#"{{"a":{tensor},"__metadata__":{{"k":"v"}}}}"#).as_bytes()).is_ok());
        // The library takes the last of them.
        check(&format!(r#"{{"a":{tensor},"a":{tensor}}}"#), "`a` is there twice");
        check(&format!(r#"{{"__metadata__":{{}},"a":{tensor},"__metadata__":{{}}}}"#), "`__metadata__` is there twice");
        check(&format!(r#"{{"a":{tensor},"b":{tensor}}}"#), "`b`");
        check(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, "`a` of F32 [3] has bytes 0..8");
        check(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, "`a` of F32 [2] has bytes 8..0");
        check(r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#, "`a` of F4 [3] has bytes 0..1");
        check(r#"{"a":{"dtype":"Q4","shape":[2],"data_offsets":[0,8]}}"#, "`a`: unknown variant `Q4`");
        check(r#"{"a":{"dtype":"I64","shape":[1152921504606846976,0,0],"data_offsets":[0,8]}}"#, "`a`");
        check(r#"{"a":{"dtype":"I64","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#, "`a`");
        check(r#"{"a":[1]}"#, "`a`");
        check("[]", "expected an object of tensors");
    }
}
