//! Arrow IPC in Flight's messages.
//!
//! Flight carries each message of an IPC stream as a header (its flatbuffer) and a body. So a stream is cut apart to be
//! sent, and put together again to be read: both along the frames of Arrow's columnar format, "Encapsulated message
//! format".

use arrow_array::RecordBatch;
use arrow_ipc::{reader::StreamReader, root_as_message, writer::StreamWriter};
use arrow_schema::SchemaRef;

use super::flight::FlightData;

const CONTINUATION: [u8; 4] = [0xff; 4];

/// A schema, and a message for each batch.
pub fn messages(batches: &[RecordBatch]) -> Vec<FlightData> {
    let mut writer = StreamWriter::try_new(Vec::new(), batches[0].schema_ref()).unwrap();
    for batch in batches {
        writer.write(batch).unwrap();
    }
    let stream = writer.into_inner().unwrap();
    let mut rest = stream.as_slice();
    let mut messages = Vec::new();
    loop {
        let (start, after) = rest.split_at(8);
        assert_eq!(start[..4], CONTINUATION);
        let header_bytes = u32::from_le_bytes(start[4..].try_into().unwrap()) as usize;
        if header_bytes == 0 {
            assert!(after.is_empty(), "{} bytes after the end of the stream", after.len());
            return messages;
        }
        let (header, after) = after.split_at(header_bytes);
        let body_bytes = root_as_message(header).unwrap().bodyLength() as usize;
        let (body, after) = after.split_at(body_bytes);
        messages.push(FlightData { data_header: header.to_vec(), data_body: body.to_vec(), ..FlightData::default() });
        rest = after;
    }
}

/// The schema, and a batch for each further message.
pub fn batches(messages: &[FlightData]) -> (SchemaRef, Vec<RecordBatch>) {
    let mut stream = Vec::new();
    for message in messages {
        stream.extend(CONTINUATION);
        stream.extend(u32::try_from(message.data_header.len()).unwrap().to_le_bytes());
        stream.extend_from_slice(&message.data_header);
        stream.extend_from_slice(&message.data_body);
    }
    let reader = StreamReader::try_new(stream.as_slice(), None).unwrap();
    let schema = reader.schema();
    let batches = Vec::from_iter(reader.map(Result::unwrap));
    assert_eq!(batches.len() + 1, messages.len(), "each message after the schema is a batch");
    (schema, batches)
}
