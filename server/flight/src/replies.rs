//! What the answers of a stream become for whoever takes them.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::{ArrowError, SchemaRef};
use bytes::Bytes;
use quarrel_engine::Answer;
use quarrel_proto::{Reason, json, v1};
use quarrel_wire::{Encoder, FrameOut, schema_frame};

use crate::status::Fault;

/// Replies made of answers, on whichever thread has computed them.
pub(crate) trait Replies: Sized + Send + 'static {
    /// One of them.
    type Item: Send + 'static;

    /// Before any answer, of a schema; and what is said before all.
    fn begin(schema: &SchemaRef) -> Result<(Self, Vec<Self::Item>), Fault>;

    /// An answer's.
    fn answer(&mut self, answer: Answer) -> Result<Self::Item, Fault>;

    /// The last, after all answers: the stream's totals.
    fn summary(&mut self, summary: v1::Summary) -> Result<Self::Item, Fault>;
}

/// Messages of Arrow Flight, for a client.
pub(crate) struct Messages {
    encoder: Encoder,
    schema: SchemaRef,
}

impl Replies for Messages {
    type Item = FrameOut;

    fn begin(schema: &SchemaRef) -> Result<(Messages, Vec<FrameOut>), Fault> {
        let encoder = Encoder::new(schema).map_err(unencodable)?;
        Ok((Messages { encoder, schema: Arc::clone(schema) }, vec![schema_frame(schema)]))
    }

    fn answer(&mut self, answer: Answer) -> Result<FrameOut, Fault> {
        self.one(&answer.batch, json::progress(&answer.progress))
    }

    fn summary(&mut self, summary: v1::Summary) -> Result<FrameOut, Fault> {
        let empty = RecordBatch::new_empty(Arc::clone(&self.schema));
        self.one(&empty, json::summary(&summary))
    }
}

impl Messages {
    /// The frame of a batch: no column of an answer is a dictionary.
    fn one(&mut self, batch: &RecordBatch, metadata: impl Into<Bytes>) -> Result<FrameOut, Fault> {
        let frame = self.encoder.batch(batch, metadata).map_err(unencodable)?.pop();
        frame.ok_or_else(Fault::ours)
    }
}

/// The answers themselves, for whoever takes them in this process.
pub(crate) struct Answers;

/// A reply to whoever takes it in this process.
#[derive(Debug)]
pub(crate) enum Answered {
    Rows(Answer),
    Summary(Box<v1::Summary>),
}

impl Replies for Answers {
    type Item = Answered;

    fn begin(_: &SchemaRef) -> Result<(Answers, Vec<Answered>), Fault> {
        Ok((Answers, Vec::new()))
    }

    fn answer(&mut self, answer: Answer) -> Result<Answered, Fault> {
        Ok(Answered::Rows(answer))
    }

    fn summary(&mut self, summary: v1::Summary) -> Result<Answered, Fault> {
        Ok(Answered::Summary(Box::new(summary)))
    }
}

fn unencodable(error: ArrowError) -> Fault {
    tracing::error!(%error, "an answer cannot be encoded");
    Fault::new(Reason::Internal, "an answer cannot be encoded; the server's log says more")
}
