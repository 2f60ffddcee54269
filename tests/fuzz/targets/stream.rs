//! Arrow IPC of a DoExchange, decoded as the server does, and from there to answers: rows, units, kernels.
//!
//! The first part is the command; then header and body of one frame after the other.

#![forbid(unsafe_code)]
#![no_main]

use std::{backtrace::Backtrace, panic, sync::Arc};

use arrow_buffer::Buffer;
use libfuzzer_sys::fuzz_target;
use quarrel_engine::{
    Cancel, Decoded, Decoder, Intake, LayerError, Level, Limits, Need, Output, Plan, Unit, is_light,
    panics_are_contained,
};
use quarrel_fuzz::parts;
use quarrel_proto::command::parse;

const LIMITS: Limits = Limits {
    message_bytes_max: 1 << 20,
    span_bytes_max: 1 << 20,
    batch_rows_max: 1 << 10,
    layers_max: 1 << 10,
    name_bytes_max: 1 << 10,
};

fuzz_target!(init: contain(), |input: &[u8]| {
    let mut parts = parts(input);
    let Some(Ok(plan)) = parts.next().and_then(|command| parse(command).ok()).map(|command| Plan::new(&command)) else {
        return;
    };
    let mut output = Output::new(&plan, Arc::new(Output::schema(&plan)));
    let mut decoder = Decoder::new(LIMITS);
    let mut intake = None;
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
                let more = intake.begin(&batch).and_then(|()| answer(intake, &mut output));
                if more.is_err() {
                    break;
                }
            }
        }
    }
    for unit in intake.iter_mut().flat_map(Intake::remaining) {
        compute(unit, &mut output);
    }
    let _ = intake.map(|intake| intake.end());
});

/// libFuzzer's crate ends the process at every panic: those that the decoder turns into errors are none.
fn contain() {
    panic::set_hook(Box::new(|panicked| {
        if !panics_are_contained() {
            eprintln!("{panicked}\n{}", Backtrace::force_capture());
        }
    }));
}

/// Answers all rows of the batch that was begun.
fn answer(intake: &mut Intake, output: &mut Output) -> Result<(), LayerError> {
    while let Some(need) = intake.next()? {
        match need {
            Need::Span(bytes) => assert!(bytes <= 4 * LIMITS.span_bytes_max, "a span of {bytes} bytes"),
            Need::Unit(unit) => compute(unit, output),
            Need::Rest => {}
        }
    }
    Ok(())
}

fn compute(unit: Unit, output: &mut Output) {
    let result = unit.compute(Level::detect(), &Cancel::default()).expect("nobody cancels");
    let _ = output.take(result);
}
