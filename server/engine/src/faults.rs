//! What can be wrong with the numbers of a layer, and the sentence that says so.

use std::ops::Range;

use quarrel_proto::Reason;

use crate::{
    layer::{Note, Rung, note},
    rows::Work,
};

/// A fault in the numbers of one span.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) channels: Range<usize>,
    pub(crate) kind: FaultKind,
}

#[derive(Debug)]
pub(crate) enum FaultKind {
    /// The element's flat index in the layer, and what it is.
    NonFinite(usize, f32),
    ScaleOverflow,
    /// The greatest magnitude, and that which the command gives.
    AmaxExceeded(f32, f32),
}

/// A sentence for each.
pub(crate) fn describe(work: &Work, rung: &Rung, faults: Vec<Fault>) -> Vec<(Range<usize>, Note)> {
    let name = &work.layer.name;
    let sentence = |kind| match kind {
        FaultKind::NonFinite(index, value) => note(
            Reason::NonFinite,
            name,
            format_args!("weight at flat index {index} is {value}, expected a finite number"),
        ),
        FaultKind::ScaleOverflow => note(
            Reason::ScaleOverflow,
            name,
            format_args!("a scale is too large for {}, expected a smaller range of weights", rung.scale_type().name()),
        ),
        FaultKind::AmaxExceeded(found, given) => note(
            Reason::AmaxExceeded,
            name,
            format_args!("a weight's magnitude is {found}, expected at most `amax` {given}"),
        ),
    };
    faults.into_iter().map(|fault| (fault.channels, sentence(fault.kind))).collect()
}
