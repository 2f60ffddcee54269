//! Units to codes: pure, parallel on whatever rayon pool it is called in, and the same bits on any number of threads.
//!
//! Work is cut into *cells*: whole channels of at most about 1 MiB together, or a stretch of one channel longer than
//! that. Where a span is one short channel, one pass over a cell finds ranges, scales and codes while the channel is in
//! the cache. Otherwise a first pass finds ranges, and a second makes codes.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use quarrel_kernels::{self as kernels, Level, Part, Sums, TILE, first_non_finite, qparams, quantize, ranges};
use quarrel_proto::Reason;
use rayon::prelude::*;

use crate::{
    layer::{Decision, Note, Rung, note},
    plan::Thresholds,
    rows::{Layer, Row, Unit, Work},
};

/// What one thread does between two looks at the cancel flag.
const CELL_BYTES: usize = 1 << 20;
/// Columns of a stretch. Fixed, since sums are folded stretch by stretch.
const STRETCH: usize = (1 << 18) / TILE * TILE;

/// A flag that stops computing within one cell. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

/// Computing stopped because nobody wants the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cancelled;

impl Cancel {
    /// Stops what computes under this flag.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// `Err` once cancelled.
    ///
    /// # Errors
    /// [`Cancelled`].
    pub fn check(&self) -> Result<(), Cancelled> {
        if self.0.load(Ordering::Relaxed) { Err(Cancelled) } else { Ok(()) }
    }
}

/// The rows of a unit and what was computed for them.
#[derive(Debug)]
pub struct Computed {
    pub(crate) rows: Vec<Row>,
    pub(crate) results: Vec<Outcome>,
    pub(crate) arrays: Arrays,
}

/// What became of one work, in the order of the unit's works.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) layer: Arc<Layer>,
    pub(crate) channels: Range<usize>,
    /// The scheme that it got; or why a ladder kept it.
    pub(crate) rung: Result<Rung, Note>,
    /// Spans whose numbers are at fault, in order, by their channels.
    pub(crate) faults: Vec<(Range<usize>, Note)>,
}

/// Results, channel after channel, work after work.
#[derive(Debug, Default)]
pub(crate) struct Arrays {
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Vec<f32>,
    pub(crate) zero_points: Vec<i32>,
    pub(crate) sums: Vec<Sums>,
}

/// Computes a unit.
///
/// # Errors
/// [`Cancelled`] within one cell of the flag being set.
pub fn execute(level: Level, unit: Unit, cancel: &Cancel) -> Result<Computed, Cancelled> {
    let Unit { rows, works, .. } = unit;
    if let [work] = works.as_slice()
        && let Decision::Ladder(rungs, thresholds) = &work.layer.decision
    {
        return ladder(level, rows, work, rungs, *thresholds, cancel);
    }
    let rungs: Vec<(&Work, &Rung)> = works
        .iter()
        .filter_map(|work| match &work.layer.decision {
            Decision::Quantize(rung) => Some((work, rung)),
            Decision::Ladder(..) | Decision::Keep(_) | Decision::Fail(_) => None,
        })
        .collect();
    let (arrays, faults) = compute(level, &rungs, cancel)?;
    let results = rungs
        .iter()
        .zip(faults)
        .map(|((work, rung), faults)| Outcome {
            layer: Arc::clone(&work.layer),
            channels: work.channels.clone(),
            rung: Ok((*rung).clone()),
            faults: describe(work, rung, faults),
        })
        .collect();
    Ok(Computed { rows, results, arrays })
}

/// Tries the rungs in turn, on quality measured from the codes that would be sent.
fn ladder(
    level: Level,
    rows: Vec<Row>,
    work: &Work,
    rungs: &[Rung],
    thresholds: Thresholds,
    cancel: &Cancel,
) -> Result<Computed, Cancelled> {
    let outcome =
        |rung, faults| Outcome { layer: Arc::clone(&work.layer), channels: work.channels.clone(), rung, faults };
    let mut best = None;
    for (index, rung) in rungs.iter().enumerate() {
        let (arrays, mut faults) = compute(level, &[(work, rung)], cancel)?;
        let faults = faults.pop().unwrap_or_default();
        let metrics = arrays.sums.iter().fold(Sums::default(), |all, sums| all.then(sums)).metrics();
        // No rung mends a number that is none; a scale that overflows at one rung may fit at the next.
        let hopeless = faults.iter().any(|fault| matches!(fault.kind, FaultKind::NonFinite(..)));
        let last = index + 1 == rungs.len();
        if hopeless || (last && !faults.is_empty()) || (faults.is_empty() && thresholds.met(&metrics)) {
            let faults = describe(work, rung, faults);
            return Ok(Computed { rows, results: vec![outcome(Ok(rung.clone()), faults)], arrays });
        }
        best = Some((rung.scheme, metrics));
    }
    let (scheme, db, cosine) = match best {
        Some((scheme, metrics)) => (scheme.to_string(), metrics.sqnr_db, metrics.cosine),
        None => unreachable!("a ladder has a rung"),
    };
    let number = |value: Option<f64>| value.map_or_else(|| "undefined".to_owned(), |value| format!("{value:.4}"));
    let what = format_args!(
        "the last rung `{scheme}` has SQNR {} dB and cosine {}, expected at least {} dB and {}",
        number(db),
        number(cosine),
        thresholds.sqnr_db_min.map_or_else(|| "any".to_owned(), |least| least.to_string()),
        thresholds.cosine_min.map_or_else(|| "any".to_owned(), |least| least.to_string()),
    );
    let kept = note(Reason::BelowThreshold, &work.layer.name, what);
    Ok(Computed { rows, results: vec![outcome(Err(kept), Vec::new())], arrays: Arrays::default() })
}

/// A fault in the numbers of one span.
#[derive(Debug)]
struct Fault {
    channels: Range<usize>,
    kind: FaultKind,
}

#[derive(Debug)]
enum FaultKind {
    /// The element's flat index in the layer, and what it is.
    NonFinite(usize, f32),
    ScaleOverflow,
}

fn describe(work: &Work, rung: &Rung, faults: Vec<Fault>) -> Vec<(Range<usize>, Note)> {
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
            format_args!(
                "a scale is too large for {}, expected a smaller range of weights",
                rung.dtype.scale_type().name()
            ),
        ),
    };
    faults.into_iter().map(|fault| (fault.channels, sentence(fault.kind))).collect()
}

/// One thread's portion: whole channels, or a stretch of one.
struct Cell<'a> {
    rung: &'a Rung,
    work: usize,
    /// Channels in the layer.
    channels: Range<usize>,
    /// Columns of each.
    columns: Range<usize>,
    bytes: &'a [u8],
}

/// Where a cell writes its codes, and its scales if it makes them.
struct Slot<'a> {
    codes: &'a mut [u8],
    scales: &'a mut [f32],
    zero_points: &'a mut [i32],
}

/// Computes works and returns their results and each one's faults.
fn compute(level: Level, works: &[(&Work, &Rung)], cancel: &Cancel) -> Result<(Arrays, Vec<Vec<Fault>>), Cancelled> {
    let mut arrays = Arrays::default();
    let mut cells = Vec::new();
    let mut totals = (0, 0, 0);
    for (index, (work, rung)) in works.iter().enumerate() {
        cut(work, rung, index, &mut cells);
        let scales = rung.spans_in(&work.channels) * rung.groups();
        totals.0 += work.channels.len() * rung.packed_bytes();
        totals.1 += scales;
        totals.2 += if rung.codes().symmetric() { 0 } else { scales };
    }
    arrays.codes = vec![0; totals.0];
    arrays.scales = vec![0.0; totals.1];
    arrays.zero_points = vec![0; totals.2];

    let mut faults: Vec<Vec<Fault>> = works.iter().map(|_| Vec::new()).collect();
    // Where every span of the unit is a short channel, one pass does; a unit holds layers of one kind mostly.
    let one_pass = cells.iter().all(|cell| cell.rung.height == 1 && cell.columns.len() == cell.rung.columns);
    let codes = split(&mut arrays.codes, &cells, Cell::code_bytes);
    let done: Vec<(Vec<Sums>, Vec<Fault>)> = if one_pass {
        let scales = split(&mut arrays.scales, &cells, Cell::scale_count);
        let zero_points = split(&mut arrays.zero_points, &cells, Cell::zero_point_count);
        let slots = codes.into_iter().zip(scales).zip(zero_points);
        let slots = slots.map(|((codes, scales), zero_points)| Slot { codes, scales, zero_points });
        cells
            .par_iter()
            .zip(slots.collect::<Vec<_>>())
            .map(|(cell, slot)| cancel.check().map(|()| cell.in_one_pass(level, slot)))
            .collect::<Result<_, _>>()?
    } else {
        let found: Vec<_> =
            cells.par_iter().map(|cell| cancel.check().map(|()| cell.find_ranges(level))).collect::<Result<_, _>>()?;
        find_scales(works, &cells, found, &mut arrays.scales, &mut arrays.zero_points, &mut faults);
        let (scales, zero_points) = (&arrays.scales, &arrays.zero_points);
        let starts = starts(works);
        cells
            .par_iter()
            .zip(codes)
            .map(|(cell, codes)| {
                cancel.check()?;
                let (scales_from, zero_points_from) = starts[cell.work];
                let first = works[cell.work].0.channels.start;
                let sums =
                    cell.make_codes(level, &scales[scales_from..], &zero_points[zero_points_from..], first, codes);
                Ok((sums, Vec::new()))
            })
            .collect::<Result<_, Cancelled>>()?
    };
    for (cell, (sums, found)) in cells.iter().zip(done) {
        faults[cell.work].extend(found);
        match arrays.sums.last_mut() {
            // A further stretch of the channel before.
            Some(channel) if cell.columns.start > 0 => *channel = channel.then(&sums[0]),
            _ => arrays.sums.extend(sums),
        }
    }
    Ok((arrays, faults))
}

/// Where each work's scales and zero points start.
fn starts(works: &[(&Work, &Rung)]) -> Vec<(usize, usize)> {
    let mut at = (0, 0);
    works
        .iter()
        .map(|(work, rung)| {
            let start = at;
            let scales = rung.spans_in(&work.channels) * rung.groups();
            at.0 += scales;
            at.1 += if rung.codes().symmetric() { 0 } else { scales };
            start
        })
        .collect()
}

/// Cuts a work into cells, in the order of its elements.
fn cut<'a>(work: &'a Work, rung: &'a Rung, index: usize, cells: &mut Vec<Cell<'a>>) {
    let channel_bytes = rung.channel_bytes();
    let mut channel = work.channels.start;
    for piece in &work.pieces {
        let end = channel + piece.channels;
        let mut bytes = piece.data.as_slice();
        while channel < end {
            if rung.columns > STRETCH {
                for start in (0..rung.columns).step_by(STRETCH) {
                    let columns = start..(start + STRETCH).min(rung.columns);
                    let (head, tail) = bytes.split_at(columns.len() * rung.dtype.bytes());
                    bytes = tail;
                    cells.push(Cell { rung, work: index, channels: channel..channel + 1, columns, bytes: head });
                }
                channel += 1;
                continue;
            }
            let mut until = end.min(channel + (CELL_BYTES / channel_bytes).max(1));
            if rung.buffers() {
                // A cell's ranges belong to one span.
                until = until.min(rung.span_end(channel));
            }
            let (head, tail) = bytes.split_at((until - channel) * channel_bytes);
            bytes = tail;
            cells.push(Cell { rung, work: index, channels: channel..until, columns: 0..rung.columns, bytes: head });
            channel = until;
        }
    }
}

/// Splits an array into one slice a cell.
fn split<'a, 'c, T>(mut rest: &'a mut [T], cells: &[Cell<'c>], length: fn(&Cell<'c>) -> usize) -> Vec<&'a mut [T]> {
    cells
        .iter()
        .map(|cell| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(length(cell));
            rest = tail;
            head
        })
        .collect()
}

impl Cell<'_> {
    fn code_bytes(&self) -> usize {
        self.channels.len() * kernels::packed_bytes(self.rung.codes(), self.columns.len())
    }

    fn scale_count(&self) -> usize {
        self.channels.len() * self.rung.groups()
    }

    fn zero_point_count(&self) -> usize {
        if self.rung.codes().symmetric() { 0 } else { self.scale_count() }
    }

    fn part<'a>(&self, bytes: &'a [u8]) -> Part<'a> {
        Part { dtype: self.rung.dtype, bytes, column: self.columns.start, group: self.rung.group }
    }

    /// The bytes of each channel of the cell.
    fn rows(&self) -> impl Iterator<Item = (usize, &[u8])> {
        self.channels.clone().zip(self.bytes.chunks_exact(self.columns.len() * self.rung.dtype.bytes()))
    }

    /// Ranges, scales and codes of each channel in turn.
    fn in_one_pass(&self, level: Level, slot: Slot<'_>) -> (Vec<Sums>, Vec<Fault>) {
        let rung = self.rung;
        let groups = rung.groups();
        let mut found = vec![kernels::Range::default(); groups];
        let mut faults = Vec::new();
        let codes = slot.codes.chunks_exact_mut(rung.packed_bytes());
        let scales = slot.scales.chunks_exact_mut(groups);
        let mut zero_points = slot.zero_points.chunks_exact_mut(groups);
        let sums = self
            .rows()
            .zip(codes.zip(scales))
            .map(|((channel, bytes), (codes, scales))| {
                let zero_points = zero_points.next().unwrap_or_default();
                let part = self.part(bytes);
                found.fill(kernels::Range::default());
                ranges(level, &part, &mut found);
                if let Err(kind) = scales_of(rung, &found, scales, zero_points) {
                    let kind = self.locate(kind, channel, bytes);
                    faults.push(Fault { channels: channel..channel + 1, kind });
                    return Sums::default();
                }
                quantize(level, rung.codes(), rung.arith, &part, scales, zero_points, codes)
            })
            .collect();
        (sums, faults)
    }

    /// Where in the layer the number at fault stands.
    fn locate(&self, kind: Unfit, channel: usize, bytes: &[u8]) -> FaultKind {
        match (kind, first_non_finite(self.rung.dtype, bytes)) {
            (Unfit::NonFinite, Some((at, value))) => {
                FaultKind::NonFinite(channel * self.rung.columns + self.columns.start + at, value)
            }
            (Unfit::NonFinite | Unfit::ScaleOverflow, _) => FaultKind::ScaleOverflow,
        }
    }

    /// The groups that the cell's columns touch.
    fn groups(&self) -> Range<usize> {
        self.columns.start / self.rung.group..self.columns.end.div_ceil(self.rung.group)
    }

    /// The ranges of the groups that the cell touches: of each channel, or of all together where they share scales.
    fn find_ranges(&self, level: Level) -> Vec<Found> {
        let touched = self.groups();
        let mut found = vec![kernels::Range::default(); touched.len()];
        let mut all: Vec<Found> = Vec::new();
        for (channel, bytes) in self.rows() {
            ranges(level, &self.part(bytes), &mut found);
            let last = channel + 1 == self.channels.end;
            if self.rung.height == 1 || last {
                all.push(Found { ranges: found.clone(), bad: None });
                found.fill(kernels::Range::default());
            }
        }
        let share = if self.rung.height == 1 { self.bytes.len() / self.channels.len() } else { self.bytes.len() };
        for (row, (found, bytes)) in all.iter_mut().zip(self.bytes.chunks_exact(share)).enumerate() {
            if found.ranges.iter().any(|range| !range.finite) {
                let first = (self.channels.start + row) * self.rung.columns + self.columns.start;
                found.bad = first_non_finite(self.rung.dtype, bytes).map(|(at, value)| (first + at, value));
            }
        }
        all
    }

    /// Codes under scales that are known. `first` is the work's first channel, where `scales` begin.
    fn make_codes(
        &self,
        level: Level,
        scales: &[f32],
        zero_points: &[i32],
        first: usize,
        codes: &mut [u8],
    ) -> Vec<Sums> {
        let rung = self.rung;
        let groups = rung.groups();
        let bytes = kernels::packed_bytes(rung.codes(), self.columns.len());
        let first_span = rung.span_of(first);
        self.rows()
            .zip(codes.chunks_exact_mut(bytes))
            .map(|((channel, bytes), codes)| {
                let from = (rung.span_of(channel) - first_span) * groups;
                let zero_points = match rung.codes().symmetric() {
                    true => &[],
                    false => &zero_points[from..from + groups],
                };
                quantize(
                    level,
                    rung.codes(),
                    rung.arith,
                    &self.part(bytes),
                    &scales[from..from + groups],
                    zero_points,
                    codes,
                )
            })
            .collect()
    }
}

/// The ranges that a cell adds to a span, and the first number in them that is none, by its flat index in the layer.
struct Found {
    ranges: Vec<kernels::Range>,
    bad: Option<(usize, f32)>,
}

/// Why a span has no scales.
enum Unfit {
    NonFinite,
    ScaleOverflow,
}

/// The scales and zero points of one span.
fn scales_of(rung: &Rung, found: &[kernels::Range], scales: &mut [f32], zero_points: &mut [i32]) -> Result<(), Unfit> {
    if found.iter().any(|range| !range.finite) {
        return Err(Unfit::NonFinite);
    }
    for (group, range) in found.iter().enumerate() {
        let params = qparams(rung.codes(), rung.arith, rung.dtype, *range).map_err(|_| Unfit::ScaleOverflow)?;
        scales[group] = params.scale;
        if let Some(zero_point) = zero_points.get_mut(group) {
            *zero_point = params.zero_point;
        }
    }
    Ok(())
}

/// Ranges of cells to scales of spans. A span at fault gets scales of one, so that its codes mean nothing and harm nothing.
fn find_scales(
    works: &[(&Work, &Rung)],
    cells: &[Cell<'_>],
    found: Vec<Vec<Found>>,
    scales: &mut [f32],
    zero_points: &mut [i32],
    faults: &mut [Vec<Fault>],
) {
    let starts = starts(works);
    let mut found = cells.iter().zip(found).peekable();
    for (index, (work, rung)) in works.iter().enumerate() {
        let groups = rung.groups();
        let (first, mut channel) = (rung.span_of(work.channels.start), work.channels.start);
        let spans = rung.spans_in(&work.channels);
        let mut spread = vec![kernels::Range::default(); spans * groups];
        let mut bad: Vec<Option<(usize, f32)>> = vec![None; spans];
        while let Some((cell, rows)) = found.next_if(|(cell, _)| cell.work == index) {
            let touched = cell.groups();
            for (row, found) in rows.iter().enumerate() {
                let span = rung.span_of(cell.channels.start + row) - first;
                for (range, found) in spread[span * groups..][touched.clone()].iter_mut().zip(&found.ranges) {
                    *range = range.with(*found);
                }
                bad[span] = bad[span].or(found.bad);
            }
        }
        let (scales_from, zero_points_from) = starts[index];
        for (span, first_bad) in bad.into_iter().enumerate() {
            let end = rung.span_end(channel);
            let scales = &mut scales[scales_from + span * groups..][..groups];
            let zero_points = match rung.codes().symmetric() {
                true => &mut [][..],
                false => &mut zero_points[zero_points_from + span * groups..][..groups],
            };
            if let Err(unfit) = scales_of(rung, &spread[span * groups..][..groups], scales, zero_points) {
                let kind = match (unfit, first_bad) {
                    (Unfit::NonFinite, Some((at, value))) => FaultKind::NonFinite(at, value),
                    (Unfit::NonFinite | Unfit::ScaleOverflow, _) => FaultKind::ScaleOverflow,
                };
                faults[index].push(Fault { channels: channel..end, kind });
                scales.fill(1.0);
                zero_points.fill(0);
            }
            channel = end;
        }
    }
}
