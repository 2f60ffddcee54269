//! Names of layers, and which of them a stream has seen: what both verbs check of every row.

use std::collections::HashSet;

use quarrel_proto::Reason;
use siphasher::sip128::{Hasher128, SipHasher13};

use crate::layer::{LayerError, Limits, Note, note};

/// Refuses a batch of too many rows.
///
/// # Errors
/// [`LayerError`].
pub fn check_rows(rows: usize, limits: &Limits) -> Result<(), LayerError> {
    if rows <= limits.batch_rows_max {
        return Ok(());
    }
    let message = format!("a batch of {rows} rows is over `batch_rows_max` {}", limits.batch_rows_max);
    Err(LayerError(Note { reason: Reason::BatchRowsExceeded, message }))
}

pub(crate) fn row_name<'a>(name: Option<&'a str>, at: usize, limits: &Limits) -> Result<&'a str, LayerError> {
    match name {
        None => {
            let message = format!("`layer_name` of row {at} is null, expected the layer's name");
            Err(LayerError(Note { reason: Reason::NameNull, message }))
        }
        Some(name) if name.len() > limits.name_bytes_max => {
            let what = format_args!(
                "its name takes {} bytes, more than `name_bytes_max` {}",
                name.len(),
                limits.name_bytes_max
            );
            Err(LayerError(note(Reason::NameTooLong, name, what)))
        }
        Some(name) => Ok(name),
    }
}

/// The names that have come, as 128-bit hashes under a key of the stream's own.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    names: HashSet<u128>,
    key: Option<[u8; 16]>,
}

impl Seen {
    /// Bytes that the table takes: 16 a hash and one of control, at the load that std's tables keep.
    pub(crate) fn bytes(&self) -> usize {
        self.names.capacity() * 20
    }

    pub(crate) fn add(&mut self, name: &str, limits: &Limits) -> Result<(), LayerError> {
        use std::hash::{BuildHasher, Hasher};
        let key = self.key.get_or_insert_with(|| {
            // The standard library's own random keys, which it hands out only as hashes.
            let random = || std::hash::RandomState::new().build_hasher().finish().to_le_bytes();
            let mut key = [0; 16];
            key[..8].copy_from_slice(&random());
            key[8..].copy_from_slice(&random());
            key
        });
        let mut hasher = SipHasher13::new_with_key(key);
        hasher.write(name.as_bytes());
        if !self.names.insert(hasher.finish128().as_u128()) {
            let what = format_args!("it came before in this stream: expected each layer once, its rows together");
            return Err(LayerError(note(Reason::LayerRepeated, name, what)));
        }
        if self.names.len() > limits.layers_max {
            let what = format_args!("it is layer {}, more than `layers_max` {}", self.names.len(), limits.layers_max);
            return Err(LayerError(note(Reason::LayersExceeded, name, what)));
        }
        Ok(())
    }
}
