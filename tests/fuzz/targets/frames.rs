//! gRPC messages of Flight, however they are cut: the same messages, or the same error, as in one piece.
//!
//! The first part says where the second is cut: pieces of so many bytes, over and over.

#![forbid(unsafe_code)]
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use quarrel_fuzz::parts;
use quarrel_shelf::Shelf;
use quarrel_wire::{Malformed, Messages, Received, Step};

const MESSAGE_BYTES_MAX: usize = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let mut parts = parts(input);
    let (Some(cuts), Some(bytes)) = (parts.next(), parts.next()) else { return };
    let whole = received([bytes].into_iter());
    let mut sizes = cuts.iter().map(|size| usize::from(*size).max(1)).cycle();
    let mut rest = bytes;
    let pieces = std::iter::from_fn(|| {
        let size = sizes.next().unwrap_or(1).min(rest.len());
        let piece = rest.split_off(..size)?;
        (!piece.is_empty()).then_some(piece)
    });
    let cut = received(pieces);
    assert_eq!(cut.0.len(), whole.0.len());
    for (cut, whole) in cut.0.iter().zip(&whole.0) {
        assert_eq!(cut.data, whole.data);
        assert_eq!(cut.body, whole.body);
    }
    assert_eq!(cut.1, whole.1);
});

/// Messages, and how it ended: whether at a boundary.
fn received<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Received>, Result<bool, Malformed>) {
    let mut messages = Messages::new(MESSAGE_BYTES_MAX, Shelf::default());
    let mut all = Vec::new();
    for piece in pieces {
        messages.feed(Bytes::copy_from_slice(piece));
        loop {
            match messages.step() {
                Ok(Step::Nothing) => break,
                Ok(Step::Begins(bytes)) => assert!(bytes <= MESSAGE_BYTES_MAX),
                Ok(Step::Whole(received)) => all.push(received),
                Err(error) => return (all, Err(error)),
            }
        }
    }
    let is_at_a_boundary = messages.is_at_a_boundary();
    (all, Ok(is_at_a_boundary))
}
