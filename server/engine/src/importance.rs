//! How much the columns of a layer count in a search for scales: what the column `importance` says.

use std::fmt;

use arrow_array::{Array, cast::AsArray, types::Float32Type};
use quarrel_kernels::Codes;
use quarrel_proto::Reason;

use crate::{
    arrow_in::WeightRows,
    layer::{Decision, Note, Rung, note},
    rows::Layer,
    shape::Shape,
};

/// What a row says of its columns' importance, unless it is null.
pub(crate) fn said<'a>(rows: &'a WeightRows, row: usize, name: &str) -> Said<'a> {
    let Some(lists) = &rows.importance else { return Ok(None) };
    let Some(range) = lists.range(row) else { return Ok(None) };
    let values = lists.values.as_primitive::<Float32Type>();
    match range.clone().position(|index| values.is_null(index)) {
        Some(at) => {
            let what = format_args!("`importance` {at} of row {row} is null, expected a number");
            Err(note(Reason::ImportanceInvalid, name, what))
        }
        None => Ok(Some(&values.values()[range])),
    }
}

/// Under greater ones, sums over weights that blocks can stand for are beyond f32, and ggml makes zeros or NaN of them.
const GREATEST: f32 = 1e15;

/// What a row says, or what is wrong with it.
pub(crate) type Said<'a> = Result<Option<&'a [f32]>, Note>;

/// A number for each column, of each matrix or of all alike.
#[derive(Debug, PartialEq)]
pub(crate) struct Importance {
    numbers: Vec<f32>,
    columns: usize,
    /// Channels that share the numbers of one matrix.
    channels: usize,
}

impl Importance {
    /// What a layer's first row says, and what becomes of the layer: a failure if the two do not go together.
    pub(crate) fn beside(
        decision: Decision,
        said: Said<'_>,
        name: &str,
        shape: &Shape,
    ) -> (Decision, Option<Importance>) {
        if matches!(decision, Decision::Keep(_) | Decision::Fail(_)) {
            return (decision, None);
        }
        let laid = said.and_then(|numbers| match numbers {
            Some(numbers) => Importance::new(numbers, name, shape, &decision),
            None => Ok(None),
        });
        match laid {
            Ok(importance) => (decision, importance),
            Err(note) => (Decision::Fail(note), None),
        }
    }

    /// What a row says, laid over a layer; nothing for one that is not quantized.
    fn new(numbers: &[f32], name: &str, shape: &Shape, decision: &Decision) -> Result<Option<Importance>, Note> {
        let fail = |what: fmt::Arguments<'_>| Err(note(Reason::ImportanceInvalid, name, what));
        let rungs = match decision {
            Decision::Keep(_) | Decision::Fail(_) => return Ok(None),
            Decision::Quantize(rung) => std::slice::from_ref(rung),
            Decision::Ladder(rungs, _) => rungs,
        };
        let Some(rung) = rungs.iter().find(|rung| takes_importance(rung)) else {
            return fail(format_args!(
                "scheme `{}` does not go by `importance`: expected null, or one of Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL",
                rungs[0].scheme
            ));
        };
        if let Some(at) = numbers.iter().position(|number| !(0.0..=GREATEST).contains(number)) {
            let number = numbers[at];
            return fail(format_args!("`importance` {at} is {number}, expected a number from 0 to {GREATEST:e}"));
        }
        let (columns, matrices) = (rung.columns, matrices(rung, shape));
        if numbers.len() != columns && numbers.len() != columns * matrices {
            let or = if matrices > 1 { format!(" or {}", columns * matrices) } else { String::new() };
            return fail(format_args!(
                "`importance` has {} numbers, expected {columns}{or} for shape {shape}",
                numbers.len()
            ));
        }
        let channels = rung.channels / (numbers.len() / columns);
        Ok(Some(Importance { numbers: numbers.to_vec(), columns, channels }))
    }

    /// The numbers for a channel's columns.
    pub(crate) fn of(&self, channel: usize) -> &[f32] {
        let start = channel / self.channels * self.columns;
        &self.numbers[start..start + self.columns]
    }

    /// What a further run of a layer says must be what the first one said: all of it, or nothing.
    pub(crate) fn check_same(
        first: Option<&Importance>,
        said: Said<'_>,
        name: &str,
        decision: &Decision,
    ) -> Result<(), Note> {
        if matches!(decision, Decision::Keep(_) | Decision::Fail(_)) {
            return Ok(());
        }
        match said? {
            Some(numbers) if first.is_none_or(|first| first.numbers != numbers) => {
                let what =
                    format_args!("a run's `importance` is not that of its first run: expected the same, or null");
                Err(note(Reason::ImportanceInvalid, name, what))
            }
            _ => Ok(()),
        }
    }
}

impl Layer {
    /// What its importance holds in memory.
    pub(crate) fn importance_bytes(&self) -> usize {
        self.importance.as_ref().map_or(0, |importance| size_of_val(importance.numbers.as_slice()))
    }
}

/// Whether a scheme's search goes by it.
pub(crate) fn takes_importance(rung: &Rung) -> bool {
    matches!(rung.codes(), Codes::Block(block) if block.takes_importance())
}

/// Matrices in a layer whose channels are more than its first dimension: fused experts.
fn matrices(rung: &Rung, shape: &Shape) -> usize {
    let dims = rung.scheme.channel_dims().get() as usize;
    shape.dims().iter().take(dims.saturating_sub(1)).product::<i64>() as usize
}
