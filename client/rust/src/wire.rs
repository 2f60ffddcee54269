//! Batches to Flight messages.

use arrow_array::RecordBatch;
use arrow_flight::{FlightData, SchemaAsIpc, error::FlightError};
use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
use arrow_schema::Schema;

use crate::error::Error;

/// Encodes one stream's messages.
#[derive(Default)]
pub(crate) struct Encoder {
    options: IpcWriteOptions,
    generator: IpcDataGenerator,
    context: IpcWriteContext,
}

impl Encoder {
    pub(crate) fn schema(&self, schema: &Schema) -> FlightData {
        SchemaAsIpc::new(schema, &self.options).into()
    }

    pub(crate) fn batch(&mut self, batch: &RecordBatch) -> Result<FlightData, Error> {
        // No column of ours is a dictionary.
        let mut dictionaries = DictionaryTracker::new(false);
        let encoded = self.generator.encode(batch, &mut dictionaries, &self.options, &mut self.context);
        encoded.map(|(_, data)| data.into()).map_err(|error| Error::Answer { detail: error.to_string() })
    }
}

/// What the decoder of answers says.
pub(crate) fn error(error: FlightError) -> Error {
    match error {
        FlightError::Tonic(status) => (*status).into(),
        other => Error::Answer { detail: other.to_string() },
    }
}
