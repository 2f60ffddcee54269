//! A stream of one verb: [`Intake`] turns batches into units, [`Unit::compute`] computes them anywhere, [`Output`] makes
//! answers of results in order. Both verbs go the same way, so that whoever moves the data knows only this.

use std::{collections::HashMap, sync::Arc};

use arrow_array::RecordBatch;
use arrow_schema::{Schema, SchemaRef};
use quarrel_kernels::{Decoded, Level};
use quarrel_proto::{VERSION, command, metadata, v1};
use quarrel_shelf::Shelf;

use crate::{
    answer::{Answer, Answers},
    coded_rows::{CodedRows, CodedUnit},
    decode::{DecodedAnswers, DecodedUnit, decode},
    execute::{Cancel, Cancelled, Computed, execute},
    layer::LayerError,
    layer::Limits,
    plan::{Plan, Verb},
    rows::{self, Rows},
    schemas,
};

/// Batches to units, sequentially.
#[derive(Debug)]
pub struct Intake(In);

#[derive(Debug)]
enum In {
    Weights(Box<Rows>),
    Codes(Box<CodedRows>, Decoded),
}

/// What has to be provided before rows go on.
#[derive(Debug)]
pub enum Need {
    /// Room for a span that stays open, in bytes. The unit that closes it draws on it.
    Span(usize),
    /// A unit to be computed.
    Unit(Unit),
    /// Nothing yet: a chance to stop, or to let others work, before the rows go on.
    Rest,
}

/// Rows to answer together, and what has to be computed for them.
#[derive(Debug)]
pub struct Unit {
    work: Work,
    /// Bytes of input in it.
    pub bytes_in: usize,
    /// Bytes that its result takes, at most.
    pub bytes_out: usize,
    /// Whether it closes the span for which room was asked last.
    pub closes_span: bool,
}

#[derive(Debug)]
enum Work {
    Weights(rows::Unit),
    Codes(CodedUnit, Decoded),
}

/// What was computed for a unit.
#[derive(Debug)]
pub struct Result(Done);

#[derive(Debug)]
enum Done {
    Weights(Computed),
    Codes(DecodedUnit),
}

/// Results to answers, in order.
#[derive(Debug)]
pub struct Output(Out);

#[derive(Debug)]
enum Out {
    Weights(Box<Answers>),
    Codes(DecodedAnswers),
}

impl Intake {
    /// Before the first batch of a stream with that schema.
    ///
    /// # Errors
    /// [`LayerError`] for a schema that the contract does not allow.
    pub fn new(plan: &Plan, limits: Limits, schema: &Schema) -> std::result::Result<Intake, LayerError> {
        Ok(Intake(match &plan.verb {
            Verb::Quantize(plan) => In::Weights(Box::new(Rows::new(Arc::new(plan.clone()), limits, schema)?)),
            Verb::Dequantize(plan) => In::Codes(Box::new(CodedRows::new(*plan, limits, schema)?), plan.decoded),
        }))
    }

    /// Takes the next batch; [`Intake::next`] then goes through its rows.
    ///
    /// # Errors
    /// [`LayerError`] for a batch of too many rows or with broken columns.
    pub fn begin(&mut self, batch: &RecordBatch) -> std::result::Result<(), LayerError> {
        match &mut self.0 {
            In::Weights(rows) => rows.begin(batch),
            In::Codes(rows, _) => rows.begin(batch),
        }
    }

    /// What is needed next, or `None` when the batch is used up.
    ///
    /// # Errors
    /// [`LayerError`], which ends the stream; what was handed on before, and what [`Intake::remaining`] still
    /// hands on, is answered first.
    #[allow(clippy::should_implement_trait, reason = "an iterator that fails and goes on is none")]
    pub fn next(&mut self) -> std::result::Result<Option<Need>, LayerError> {
        Ok(match &mut self.0 {
            In::Weights(rows) => rows.next()?.map(|need| match need {
                rows::Need::Span(bytes) => Need::Span(bytes),
                rows::Need::Unit(unit) => Need::Unit(Unit::of_weights(unit)),
                rows::Need::Rest => Need::Rest,
            }),
            In::Codes(rows, decoded) => rows.next()?.map(|unit| Need::Unit(Unit::of_codes(unit, *decoded))),
        })
    }

    /// Bytes that stay from batch to batch beside spans: names seen, and rows that wait.
    pub fn held_bytes(&self) -> usize {
        match &self.0 {
            In::Weights(rows) => rows.held_bytes(),
            In::Codes(rows, _) => rows.held_bytes(),
        }
    }

    /// Units made of rows before the one that failed.
    pub fn remaining(&mut self) -> Vec<Unit> {
        match &mut self.0 {
            In::Weights(rows) => rows.remaining().map(Unit::of_weights).collect(),
            In::Codes(rows, decoded) => rows.remaining().map(|unit| Unit::of_codes(unit, *decoded)).collect(),
        }
    }

    /// The end of the stream.
    ///
    /// # Errors
    /// [`LayerError`] if a layer is not complete.
    pub fn end(&self) -> std::result::Result<(), LayerError> {
        match &self.0 {
            In::Weights(rows) => rows.end(),
            In::Codes(rows, _) => rows.end(),
        }
    }
}

impl Unit {
    fn of_weights(unit: rows::Unit) -> Unit {
        let (bytes_in, bytes_out, closes_span) = (unit.bytes_in, unit.bytes_out, unit.closes_span);
        Unit { work: Work::Weights(unit), bytes_in, bytes_out, closes_span }
    }

    fn of_codes(unit: CodedUnit, decoded: Decoded) -> Unit {
        let (bytes_in, bytes_out) = (unit.bytes_in, unit.bytes_out);
        Unit { work: Work::Codes(unit, decoded), bytes_in, bytes_out, closes_span: false }
    }

    /// Computes it: in parallel on the rayon pool in which it is called, or on this thread. What is answered lies in memory of `shelf`.
    ///
    /// # Errors
    /// [`Cancelled`] within about 1 MiB of the flag being set.
    pub fn compute(self, level: Level, cancel: &Cancel, shelf: &Shelf) -> std::result::Result<Result, Cancelled> {
        Ok(Result(match self.work {
            Work::Weights(unit) => Done::Weights(execute(level, unit, cancel, shelf)?),
            Work::Codes(unit, decoded) => Done::Codes(decode(level, unit, decoded, cancel, shelf)?),
        }))
    }
}

impl Output {
    /// The schema of a plan's answers, without metadata.
    pub fn schema(plan: &Plan) -> Schema {
        match &plan.verb {
            Verb::Quantize(_) => schemas::quantized_schema(),
            Verb::Dequantize(plan) => schemas::dequantized_schema(plan.decoded),
        }
    }

    /// The same with what a reply says of itself: the effective command, the contract's version and the CPU level that computes.
    pub fn reply_schema(plan: &Plan, level: &str) -> Schema {
        let entries = [
            (metadata::COMMAND, command::to_json(&plan.effective)),
            (metadata::VERSION, VERSION.to_owned()),
            (metadata::LEVEL, level.to_owned()),
        ];
        let entries = entries.into_iter().map(|(key, value)| (key.to_owned(), value));
        Output::schema(plan).with_metadata(HashMap::<String, String>::from_iter(entries))
    }

    /// Before the first unit. `schema` is that of [`Output::schema`], with whatever metadata.
    pub fn new(plan: &Plan, schema: SchemaRef) -> Output {
        Output(match &plan.verb {
            Verb::Quantize(plan) => Out::Weights(Box::new(Answers::new(Arc::new(plan.clone()), schema))),
            Verb::Dequantize(plan) => Out::Codes(DecodedAnswers::new(plan.decoded, schema)),
        })
    }

    /// The answers of the next result, which is of the same plan; and the fault that ends the stream after them, for
    /// numbers at fault where the command says that they do.
    pub fn take(&mut self, result: Result) -> (Vec<Answer>, std::result::Result<(), LayerError>) {
        match (&mut self.0, result.0) {
            (Out::Weights(answers), Done::Weights(computed)) => answers.take(computed),
            (Out::Codes(answers), Done::Codes(unit)) => (vec![answers.take(unit)], Ok(())),
            (Out::Weights(_), Done::Codes(_)) | (Out::Codes(_), Done::Weights(_)) => {
                unreachable!("one plan makes units, results and answers of one kind")
            }
        }
    }

    /// What the stream was, without its times.
    pub fn summary(&self) -> v1::Summary {
        match &self.0 {
            Out::Weights(answers) => answers.tally().summary(),
            Out::Codes(answers) => answers.tally().summary(),
        }
    }
}
