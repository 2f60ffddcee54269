//! Arrow IPC of a DoExchange, decoded as the server does, and from there to answers: rows, units, kernels.
//!
//! The first part is the command; then header and body of one frame after the other.

#![forbid(unsafe_code)]
#![no_main]

use std::sync::Arc;

use arrow_buffer::Buffer;
use libfuzzer_sys::fuzz_target;
use quarrel_engine::{Cancel, Decoded, Decoder, Intake, LayerError, Level, Need, Output, Plan, Unit, is_light};
use quarrel_fuzz::{LIMITS, contain, parts};
use quarrel_proto::command::parse;
use quarrel_shelf::Shelf;

fuzz_target!(init: contain(), |input: &[u8]| {
    let mut parts = parts(input);
    let Some(Ok(plan)) = parts.next().and_then(|command| parse(command).ok()).map(|command| Plan::new(&command)) else {
        return;
    };
    let mut output = Output::new(&plan, Arc::new(Output::schema(&plan)));
    let mut decoder = Decoder::new(LIMITS);
    let (mut intake, shelf) = (None, Shelf::default());
    while let Some(header) = parts.next() {
        let body = parts.next().unwrap_or_default();
        // The exchange asks first, of any bytes.
        let _ = is_light(header, body.len());
        match (decoder.decode(header, &Buffer::from(body)), &mut intake) {
            (Err(_), _) => break,
            (Ok(Decoded::Nothing), _) => {}
            (Ok(Decoded::Schema(schema)), intake) => match Intake::new(&plan, LIMITS, &schema) {
                Ok(new) => *intake = Some(new),
                Err(_) => return,
            },
            (Ok(Decoded::Batch(_)), None) => unreachable!("a batch comes after its schema"),
            (Ok(Decoded::Batch(batch)), Some(intake)) => {
                let more = intake.begin(&batch).and_then(|()| answer(intake, &mut output, &shelf));
                if more.is_err() {
                    break;
                }
            }
        }
    }
    for unit in intake.iter_mut().flat_map(Intake::remaining) {
        compute(unit, &mut output, &shelf);
    }
    let _ = intake.map(|intake| intake.end());
});

/// Answers all rows of the batch that was begun.
fn answer(intake: &mut Intake, output: &mut Output, shelf: &Shelf) -> Result<(), LayerError> {
    while let Some(need) = intake.next()? {
        match need {
            Need::Span(bytes) => assert!(bytes <= 4 * LIMITS.span_bytes_max, "a span of {bytes} bytes"),
            Need::Unit(unit) => compute(unit, output, shelf),
            Need::Rest => {}
        }
    }
    Ok(())
}

fn compute(unit: Unit, output: &mut Output, shelf: &Shelf) {
    let result = unit.compute(Level::detect(), &Cancel::default(), shelf).expect("nobody cancels");
    let _ = output.take(result);
}
