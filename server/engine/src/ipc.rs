//! Arrow IPC in: messages to a schema and record batches. Bytes from outside, so a panic in here is an error.

use std::{collections::HashMap, sync::Arc};

use arrow_array::{Array, ArrayRef, RecordBatch, RecordBatchOptions, cast::AsArray};
use arrow_buffer::Buffer;
use arrow_ipc::{MessageHeader, convert::try_fb_to_schema, reader};
use arrow_schema::{DataType, Schema, SchemaRef};
use flatbuffers::VerifierOptions;
use quarrel_proto::Reason;

use crate::{LayerError, Limits, Note, check_rows, contained, shorten};

/// What is decoded and looked at where it came, and not on the pool: it takes microseconds.
const LIGHT_HEADER_BYTES: usize = 16 << 10;
const LIGHT_BODY_BYTES: usize = 4 << 20;
const LIGHT_ROWS: i64 = 4;

/// Whether a message is one of those: without data, a schema, or a batch of few rows and no views, of which each may stand for all of the body.
pub fn is_light(header: &[u8], body_bytes: usize) -> bool {
    if header.len() > LIGHT_HEADER_BYTES || body_bytes > LIGHT_BODY_BYTES {
        return false;
    }
    let Ok(message) = message(header) else { return header.is_empty() };
    match message.header_as_record_batch() {
        Some(batch) => {
            let has_views = batch.variadicBufferCounts().is_some_and(|counts| !counts.is_empty());
            batch.length() <= LIGHT_ROWS && !has_views
        }
        None => message.header_type() == MessageHeader::Schema,
    }
}

/// How many bytes follow a header, as it says.
///
/// # Errors
/// `frame_invalid` for what is no header, or a negative number.
pub fn body_bytes(header: &[u8]) -> Result<u64, LayerError> {
    let bytes = message(header)?.bodyLength();
    u64::try_from(bytes).map_err(|_| invalid(&format!("its body has {bytes} bytes")))
}

/// What a message was.
#[derive(Debug)]
pub enum Decoded {
    /// The schema of all batches.
    Schema(SchemaRef),
    /// Rows.
    Batch(RecordBatch),
    /// A dictionary, or a message without data.
    Nothing,
}

/// The state of one stream: its schema and dictionaries.
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    schemas: Option<Schemas>,
    dictionaries: HashMap<i64, ArrayRef>,
    /// Bytes of each dictionary.
    sizes: HashMap<i64, usize>,
}

/// Dictionary batches of one schema field replace each other, so there are few; this bounds hostile ones.
const DICTIONARIES_MAX: usize = 64;

impl Decoder {
    /// Before the schema.
    pub fn new(limits: Limits) -> Decoder {
        Decoder { limits, schemas: None, dictionaries: HashMap::new(), sizes: HashMap::new() }
    }

    /// Bytes that stay from message to message.
    pub fn bytes(&self) -> usize {
        self.sizes.values().sum()
    }

    /// The next message: its header, and its body.
    ///
    /// # Errors
    /// `frame_invalid` for what is no message, or lies; `schema_missing`; `batch_rows_exceeded`.
    pub fn decode(&mut self, header: &[u8], body: &Buffer) -> Result<Decoded, LayerError> {
        if header.is_empty() {
            return Ok(Decoded::Nothing);
        }
        // arrow-rs slices buffers by offsets that it trusts: a panic is the caller's bad offset.
        contained(|| self.decode_unguarded(header, body))
            .unwrap_or_else(|| Err(invalid("its offsets or lengths do not fit its body")))
    }

    fn decode_unguarded(&mut self, header: &[u8], body: &Buffer) -> Result<Decoded, LayerError> {
        let message = message(header)?;
        let wrong = |error: arrow_schema::ArrowError| invalid(&error.to_string());
        match message.header_type() {
            MessageHeader::Schema if self.schemas.is_some() => {
                Err(invalid("a second schema: expected one at the start"))
            }
            MessageHeader::Schema => {
                let schema = message.header_as_schema().ok_or_else(|| invalid("its header holds no schema"))?;
                let schema = Arc::new(try_fb_to_schema(schema).map_err(wrong)?);
                self.schemas = Some(Schemas::new(&schema));
                Ok(Decoded::Schema(schema))
            }
            MessageHeader::RecordBatch => {
                let batch = message.header_as_record_batch().ok_or_else(|| invalid("its header holds no batch"))?;
                self.check(&batch, body)?;
                let Schemas { whole, batches, .. } = self.schemas()?;
                let read_as = Arc::clone(batches);
                let batch =
                    reader::read_record_batch(body, batch, read_as, &self.dictionaries, None, &message.version())
                        .map_err(wrong)?;
                if whole == batches {
                    return Ok(Decoded::Batch(batch));
                }
                let columns = batch.columns().iter().map(strings).collect::<Result<_, _>>()?;
                let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
                RecordBatch::try_new_with_options(Arc::clone(whole), columns, &options)
                    .map(Decoded::Batch)
                    .map_err(wrong)
            }
            MessageHeader::DictionaryBatch => {
                let batch =
                    message.header_as_dictionary_batch().ok_or_else(|| invalid("its header holds no dictionary"))?;
                if batch.isDelta() {
                    return Err(invalid("it appends to a dictionary: expected whole dictionaries"));
                }
                let id = batch.id();
                let values = batch.data().ok_or_else(|| invalid("its header holds no values of the dictionary"))?;
                self.check(&values, body)?;
                let read_as = Arc::clone(&self.schemas()?.dictionaries);
                reader::read_dictionary(body, batch, &read_as, &mut self.dictionaries, &message.version())
                    .map_err(wrong)?;
                if let Some(values) = self.dictionaries.get_mut(&id) {
                    *values = strings(values)?;
                }
                self.sizes.insert(id, body.len());
                if self.dictionaries.len() > DICTIONARIES_MAX {
                    return Err(invalid("too many dictionaries"));
                }
                Ok(Decoded::Nothing)
            }
            other => Err(invalid(&format!("a message of type {other:?}: expected a schema, a batch or a dictionary"))),
        }
    }

    /// What a header says of its body, before arrow-rs believes it: a buffer that is not aligned is copied, so that many of one body would be
    /// many bodies.
    fn check(&self, batch: &arrow_ipc::RecordBatch<'_>, body: &Buffer) -> Result<(), LayerError> {
        if batch.compression().is_some() {
            return Err(invalid("its body is compressed: write without IPC compression"));
        }
        check_rows(usize::try_from(batch.length()).unwrap_or(0), &self.limits)?;
        let lengths = batch.buffers().into_iter().flatten().map(|buffer| u64::try_from(buffer.length()).unwrap_or(0));
        let bytes = lengths.fold(0, u64::saturating_add);
        if bytes > body.len() as u64 {
            return Err(invalid(&format!("its buffers have {bytes} bytes together, in a body of {}", body.len())));
        }
        Ok(())
    }

    fn schemas(&self) -> Result<&Schemas, LayerError> {
        self.schemas.as_ref().ok_or_else(|| error(Reason::SchemaMissing, "a batch came before the schema".to_owned()))
    }
}

/// A stream's schema, and those by which arrow-rs reads: views of strings as views of bytes. It would look at each view's UTF-8, and
/// views of one buffer may be millions.
#[derive(Debug)]
struct Schemas {
    whole: SchemaRef,
    batches: SchemaRef,
    dictionaries: SchemaRef,
}

impl Schemas {
    fn new(schema: &SchemaRef) -> Schemas {
        let read_as = |of: fn(&DataType) -> DataType| {
            let fields =
                schema.fields().iter().map(|field| field.as_ref().clone().with_data_type(of(field.data_type())));
            Arc::new(Schema::new(fields.collect::<Vec<_>>()))
        };
        Schemas {
            whole: Arc::new(Schema::new(schema.fields().clone())),
            batches: read_as(bytes_of),
            dictionaries: read_as(|data_type| match data_type {
                DataType::Dictionary(keys, values) => DataType::Dictionary(keys.clone(), Box::new(bytes_of(values))),
                other => other.clone(),
            }),
        }
    }
}

fn bytes_of(data_type: &DataType) -> DataType {
    match data_type {
        DataType::Utf8View => DataType::BinaryView,
        other => other.clone(),
    }
}

/// For so many bytes a view's length is not asked for: a name has no more.
const VIEW_BYTES: usize = 1 << 10;

/// Views of bytes as views of strings; an error if looking at them takes much longer than at their buffers.
fn strings(array: &ArrayRef) -> Result<ArrayRef, LayerError> {
    let Some(views) = array.as_binary_view_opt() else { return Ok(Arc::clone(array)) };
    let buffer = views.data_buffers().iter().map(Buffer::len).max().unwrap_or(0);
    let bytes: usize = views.lengths().map(|length| length as usize).sum();
    if bytes > buffer + views.len() * VIEW_BYTES {
        return Err(invalid(&format!(
            "its {} views of strings have {bytes} bytes together, over and over the same {buffer}",
            views.len()
        )));
    }
    let strings = views.clone().to_string_view().map_err(|error| invalid(&error.to_string()))?;
    Ok(Arc::new(strings))
}

/// More tables than a schema of ours has, with many to spare: fields, types, metadata.
const TABLES_MAX: usize = 4_000;

/// A header's message. Its parts may be shared, each standing for many: so not many more than it has bytes.
fn message(header: &[u8]) -> Result<arrow_ipc::Message<'_>, LayerError> {
    let options = VerifierOptions {
        max_tables: TABLES_MAX,
        max_apparent_size: 8 * header.len() + (64 << 10),
        ..VerifierOptions::default()
    };
    arrow_ipc::root_as_message_with_opts(&options, header).map_err(|error| invalid(&error.to_string()))
}

fn invalid(what: &str) -> LayerError {
    error(Reason::FrameInvalid, format!("a message is no valid Arrow IPC: {}", shorten(what, 500)))
}

fn error(reason: Reason, message: String) -> LayerError {
    LayerError(Note { reason, message })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use arrow_ipc::{FieldArgs, MessageArgs, SchemaArgs};
    use flatbuffers::FlatBufferBuilder;

    use super::*;

    /// A schema of `levels` of fields, each of which has the same one below it `many` times: a kilobyte that stands for `many`^`levels` fields.
    fn shared(levels: usize, many: usize) -> Vec<u8> {
        let mut builder = FlatBufferBuilder::new();
        let int = arrow_ipc::Int::create(&mut builder, &arrow_ipc::IntArgs { bitWidth: 8, is_signed: true });
        let name = builder.create_string("n");
        let mut field = None;
        for _ in 0..=levels {
            let children = Vec::from_iter(field.into_iter().cycle().take(if field.is_some() { many } else { 0 }));
            let children = builder.create_vector(&children);
            let of = FieldArgs {
                name: Some(name),
                type_type: arrow_ipc::Type::Int,
                type_: Some(int.as_union_value()),
                children: Some(children),
                ..FieldArgs::default()
            };
            field = Some(arrow_ipc::Field::create(&mut builder, &of));
        }
        let fields = builder.create_vector(&[field.unwrap()]);
        let schema =
            arrow_ipc::Schema::create(&mut builder, &SchemaArgs { fields: Some(fields), ..SchemaArgs::default() });
        let of = MessageArgs {
            header_type: MessageHeader::Schema,
            header: Some(schema.as_union_value()),
            ..MessageArgs::default()
        };
        let message = arrow_ipc::Message::create(&mut builder, &of);
        builder.finish(message, None);
        builder.finished_data().to_vec()
    }

    #[test]
    fn a_header_stands_for_not_much_more_than_its_bytes() {
        assert!(message(&shared(2, 3)).is_ok());
        let bomb = shared(3, 79);
        assert!(bomb.len() < 2_000);
        let fault = message(&bomb).unwrap_err();
        assert_eq!(fault.0.reason, Reason::FrameInvalid);
    }
}
