//! Units to codes: pure, parallel on the rayon pool in which it is called, if it is called in one, and the same bits on any number of threads.
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

use quarrel_kernels::{
    self as kernels, Block, Codes, Dtype, Grid, Level, Part, Sums, TILE, errors, first_non_finite, mean_square,
    quantize, ranges,
};
use quarrel_proto::Reason;
use quarrel_shelf::{Room, Shelf};

use crate::{
    faults::{Fault, FaultKind, describe},
    importance::{Importance, takes_importance},
    layer::{Decision, Global, Note, Rung, note},
    nested::Nested,
    parallel,
    plan::Thresholds,
    rows::{Layer, Row, Unit, Work},
    scales::{Seen, Unfit, find_scales, nest, scales_of, solve, tried},
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

/// The greatest magnitude among elements of the type that the wire calls `dtype`; none if one is NaN or infinite.
pub fn amax(level: Level, dtype: &str, bytes: &[u8]) -> Option<f32> {
    let dtype = Dtype::named(dtype)?;
    let codes = Codes::Fp4E2m1;
    let part = Part { dtype, bytes, column: 0, group: usize::MAX, ahead: &[], importance: kernels::Importance::NONE };
    let mut found = [kernels::Range::default()];
    ranges(level, codes, &part, &mut found);
    found[0].finite.then(|| found[0].amax())
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
    /// What its scales are under; 1 where nothing.
    pub(crate) global: f32,
    /// Its scales, where they are quantized too.
    pub(crate) nested: Option<Nested>,
}

/// Results, channel after channel, work after work.
#[derive(Debug, Default)]
pub(crate) struct Arrays {
    pub(crate) codes: Room,
    pub(crate) scales: Vec<f32>,
    pub(crate) zero_points: Vec<i32>,
    pub(crate) sums: Vec<Sums>,
}

/// Computes a unit, its codes in memory of `shelf`.
///
/// # Errors
/// [`Cancelled`] within one cell of the flag being set.
pub fn execute(level: Level, unit: Unit, cancel: &Cancel, shelf: &Shelf) -> Result<Computed, Cancelled> {
    let Unit { rows, works, .. } = unit;
    if let [work] = works.as_slice()
        && let Decision::Ladder(rungs, thresholds) = &work.layer.decision
    {
        return ladder(level, rows, work, rungs, *thresholds, (cancel, shelf));
    }
    let rungs: Vec<(&Work, &Rung)> = works
        .iter()
        .filter_map(|work| match &work.layer.decision {
            Decision::Quantize(rung) => Some((work, rung)),
            Decision::Ladder(..) | Decision::Keep(_) | Decision::Fail(_) => None,
        })
        .collect();
    let (arrays, found) = compute(level, &rungs, cancel, shelf)?;
    let results = rungs
        .iter()
        .zip(found)
        .map(|((work, rung), Found { faults, global, nested })| Outcome {
            layer: Arc::clone(&work.layer),
            channels: work.channels.clone(),
            rung: Ok((*rung).clone()),
            faults: describe(work, rung, faults),
            global,
            nested,
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
    (cancel, shelf): (&Cancel, &Shelf),
) -> Result<Computed, Cancelled> {
    let outcome = |rung, faults, global, nested| Outcome {
        layer: Arc::clone(&work.layer),
        channels: work.channels.clone(),
        rung,
        faults,
        global,
        nested,
    };
    let mut best = None;
    for (index, rung) in rungs.iter().enumerate() {
        let (arrays, mut found) = compute(level, &[(work, rung)], cancel, shelf)?;
        let Found { faults, global, nested } = found.pop().unwrap_or_default();
        let metrics = arrays.sums.iter().fold(Sums::default(), |all, sums| all.then(sums)).metrics();
        // No rung mends a number that is none; a scale that overflows at one rung may fit at the next.
        let hopeless = faults.iter().any(|fault| matches!(fault.kind, FaultKind::NonFinite(..)));
        let last = index + 1 == rungs.len();
        if hopeless || (last && !faults.is_empty()) || (faults.is_empty() && thresholds.met(&metrics)) {
            let faults = describe(work, rung, faults);
            return Ok(Computed { rows, results: vec![outcome(Ok(rung.clone()), faults, global, nested)], arrays });
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
    Ok(Computed { rows, results: vec![outcome(Err(kept), Vec::new(), 1.0, None)], arrays: Arrays::default() })
}

/// What was found of one work beside its arrays.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) faults: Vec<Fault>,
    pub(crate) global: f32,
    pub(crate) nested: Option<Nested>,
}

impl Default for Found {
    fn default() -> Found {
        Found { faults: Vec::new(), global: 1.0, nested: None }
    }
}

/// One thread's portion: whole channels, or a stretch of one.
pub(crate) struct Cell<'a> {
    pub(crate) rung: &'a Rung,
    pub(crate) work: usize,
    /// Channels in the layer.
    pub(crate) channels: Range<usize>,
    /// Columns of each.
    pub(crate) columns: Range<usize>,
    pub(crate) bytes: &'a [u8],
    /// How much its columns count, where the scheme takes it.
    importance: Option<&'a Importance>,
}

/// Where a cell writes its codes, and its scales if it makes them.
struct Slot<'a> {
    codes: &'a mut [u8],
    scales: &'a mut [f32],
    zero_points: &'a mut [i32],
}

/// Computes works and returns their results and each one's faults.
fn compute(
    level: Level,
    works: &[(&Work, &Rung)],
    cancel: &Cancel,
    shelf: &Shelf,
) -> Result<(Arrays, Vec<Found>), Cancelled> {
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
    arrays.codes = shelf.room(totals.0);
    arrays.scales = vec![0.0; totals.1];
    arrays.zero_points = vec![0; totals.2];

    let mut all: Vec<Found> = works
        .iter()
        .map(|(_, rung)| match rung.global {
            Global::None | Global::Found => Found::default(),
            Global::Given(amax) => Found { global: rung.global_of(amax), ..Found::default() },
        })
        .collect();
    // Where every span of the unit is a short channel, one pass does; a unit holds layers of one kind mostly.
    let one_pass = cells.iter().all(|cell| !cell.rung.buffers() && cell.columns.len() == cell.rung.columns);
    let codes = split(&mut arrays.codes, &cells, Cell::code_bytes);
    let done: Vec<(Vec<Sums>, Vec<Fault>)> = if one_pass {
        let scales = split(&mut arrays.scales, &cells, Cell::scale_count);
        let zero_points = split(&mut arrays.zero_points, &cells, Cell::zero_point_count);
        let slots = codes.into_iter().zip(scales).zip(zero_points);
        let slots = slots.map(|((codes, scales), zero_points)| Slot { codes, scales, zero_points });
        parallel::map(cells.iter().zip(slots).collect(), |(cell, slot)| {
            cancel.check().map(|()| cell.in_one_pass(level, all[cell.work].global, slot))
        })?
    } else {
        let found: Vec<_> =
            parallel::map(cells.iter().collect(), |cell| cancel.check().map(|()| cell.find_ranges(level)))?;
        let ranges = find_scales(level, works, &cells, found, &mut arrays.scales, &mut arrays.zero_points, &mut all);
        if works.iter().any(|(_, rung)| rung.scheme.solver().search().is_some()) {
            solve(level, works, &cells, &ranges, &mut arrays.scales, &mut arrays.zero_points, cancel)?;
        }
        let magnitudes = nest(works, &mut arrays.scales, &mut all);
        let (scales, zero_points) = (&arrays.scales, &arrays.zero_points);
        let starts = starts(works);
        parallel::map(cells.iter().zip(codes).collect(), |(cell, codes)| {
            cancel.check()?;
            let (scales_from, zero_points_from) = starts[cell.work];
            let first = works[cell.work].0.channels.start;
            let grid = Grid {
                scales: &scales[scales_from..],
                magnitudes: magnitudes.get(scales_from..).unwrap_or_default(),
                zero_points: &zero_points[zero_points_from..],
                global: all[cell.work].global,
            };
            Ok(match cell.rung.codes() {
                Codes::Block(block) => cell.in_blocks(level, block, codes),
                _ => (cell.make_codes(level, grid, first, codes), Vec::new()),
            })
        })?
    };
    for (cell, (sums, found)) in cells.iter().zip(done) {
        all[cell.work].faults.extend(found);
        match arrays.sums.last_mut() {
            // A further stretch of the channel before.
            Some(channel) if cell.columns.start > 0 => *channel = channel.then(&sums[0]),
            _ => arrays.sums.extend(sums),
        }
    }
    Ok((arrays, all))
}

/// Where each work's scales and zero points start.
pub(crate) fn starts(works: &[(&Work, &Rung)]) -> Vec<(usize, usize)> {
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
    let importance = work.layer.importance.as_ref().filter(|_| takes_importance(rung));
    // A mean over the whole channel is needed before its first code.
    let is_whole = importance.is_some() && matches!(rung.codes(), Codes::Block(block) if block.weighs_by_channel());
    let mut channel = work.channels.start;
    for piece in &work.pieces {
        let end = channel + piece.channels;
        let mut bytes = piece.data.as_slice();
        while channel < end {
            if rung.columns > STRETCH && !is_whole {
                for start in (0..rung.columns).step_by(STRETCH) {
                    let columns = start..(start + STRETCH).min(rung.columns);
                    let (head, tail) = bytes.split_at(columns.len() * rung.dtype.bytes());
                    bytes = tail;
                    let channels = channel..channel + 1;
                    cells.push(Cell { rung, work: index, channels, columns, bytes: head, importance });
                }
                channel += 1;
                continue;
            }
            let mut until = end.min(channel + (CELL_BYTES / channel_bytes).max(1));
            if rung.shares() {
                // A cell's ranges belong to one span.
                until = until.min(rung.span_end(channel));
            }
            let (head, tail) = bytes.split_at((until - channel) * channel_bytes);
            bytes = tail;
            let (channels, columns) = (channel..until, 0..rung.columns);
            cells.push(Cell { rung, work: index, channels, columns, bytes: head, importance });
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

    /// Each channel of the cell. While one is computed, the next is asked for.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (usize, Part<'_>)> {
        let size = self.columns.len() * self.rung.dtype.bytes();
        self.channels.clone().zip(0..).map(move |(channel, index)| {
            let (bytes, ahead) = self.bytes[index * size..].split_at(size);
            let ahead = &ahead[..ahead.len().min(size)];
            let (dtype, column, group) = (self.rung.dtype, self.columns.start, self.rung.group);
            let importance = kernels::Importance {
                columns: self.importance.map_or(&[], |importance| &importance.of(channel)[self.columns.clone()]),
                ..kernels::Importance::NONE
            };
            (channel, Part { dtype, bytes, column, group, ahead, importance })
        })
    }

    /// Blocks, which hold their own scales.
    fn in_blocks(&self, level: Level, block: Block, codes: &mut [u8]) -> (Vec<Sums>, Vec<Fault>) {
        let rung = self.rung;
        let bytes = kernels::packed_bytes(rung.codes(), self.columns.len());
        let grid = Grid { scales: &[], magnitudes: &[], zero_points: &[], global: 1.0 };
        let mut faults = Vec::new();
        let sums = self
            .parts()
            .zip(codes.chunks_exact_mut(bytes))
            .map(|((channel, part), codes)| {
                let mut found = [kernels::Range::default()];
                ranges(level, rung.codes(), &Part { group: usize::MAX, ..part }, &mut found);
                let mut part = part;
                if self.importance.is_some() && block.weighs_by_channel() {
                    part.importance.mean_square = mean_square(part.dtype, part.bytes);
                }
                let made = found[0].finite.then(|| quantize(level, rung.format(), rung.arith, &part, grid, codes));
                let unfit = match made {
                    None => Unfit::NonFinite,
                    Some(_) if block.first_overflow(codes).is_some() => Unfit::ScaleOverflow,
                    Some(_) if found[0].amax() > block.greatest(self.importance.is_some()) => Unfit::ScaleOverflow,
                    Some(sums) => return sums,
                };
                let kind = self.locate(unfit, channel, part.bytes);
                faults.push(Fault { channels: channel..channel + 1, kind });
                Sums::default()
            })
            .collect();
        (sums, faults)
    }

    /// Ranges, scales and codes of each channel in turn.
    fn in_one_pass(&self, level: Level, global: f32, slot: Slot<'_>) -> (Vec<Sums>, Vec<Fault>) {
        let rung = self.rung;
        if let Codes::Block(block) = rung.codes() {
            return self.in_blocks(level, block, slot.codes);
        }
        let groups = rung.groups();
        let mut found = vec![kernels::Range::default(); groups];
        let mut faults = Vec::new();
        let codes = slot.codes.chunks_exact_mut(rung.packed_bytes());
        let scales = slot.scales.chunks_exact_mut(groups);
        let mut zero_points = slot.zero_points.chunks_exact_mut(groups);
        let sums = self
            .parts()
            .zip(codes.zip(scales))
            .map(|((channel, part), (codes, scales))| {
                let zero_points = zero_points.next().unwrap_or_default();
                found.fill(kernels::Range::default());
                ranges(level, rung.codes(), &part, &mut found);
                if let Err(kind) = scales_of(level, rung, &found, global, scales, zero_points) {
                    let kind = self.locate(kind, channel, part.bytes);
                    faults.push(Fault { channels: channel..channel + 1, kind });
                    return Sums::default();
                }
                if let Some(search) = rung.scheme.solver().search() {
                    let tried = tried(level, search, rung, &found);
                    let mut found = vec![0.0; tried.len()];
                    errors(level, search, (rung.format(), rung.arith), &part, &tried, &mut found);
                    search.choose(rung.codes(), &tried, &found, scales, zero_points);
                }
                quantize(
                    level,
                    rung.format(),
                    rung.arith,
                    &part,
                    Grid { scales, magnitudes: &[], zero_points, global },
                    codes,
                )
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
            (Unfit::AmaxExceeded(found, given), _) => FaultKind::AmaxExceeded(found, given),
        }
    }

    /// The groups that the cell's columns touch.
    pub(crate) fn groups(&self) -> Range<usize> {
        self.columns.start / self.rung.group..self.columns.end.div_ceil(self.rung.group)
    }

    /// The ranges of the groups that the cell touches: of each channel, or of all together where they share scales.
    fn find_ranges(&self, level: Level) -> Vec<Seen> {
        if let Codes::Block(_) = self.rung.codes() {
            return Vec::new();
        }
        let touched = self.groups();
        let mut found = vec![kernels::Range::default(); touched.len()];
        let mut all: Vec<Seen> = Vec::new();
        for (channel, part) in self.parts() {
            ranges(level, self.rung.codes(), &part, &mut found);
            let last = channel + 1 == self.channels.end;
            if self.rung.height == 1 || last {
                all.push(Seen { ranges: found.clone(), bad: None });
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

    /// Codes under scales that are known. `first` is the work's first channel, where the grid's begin.
    fn make_codes(&self, level: Level, grid: Grid<'_>, first: usize, codes: &mut [u8]) -> Vec<Sums> {
        let rung = self.rung;
        let groups = rung.groups();
        let bytes = kernels::packed_bytes(rung.codes(), self.columns.len());
        let first_span = rung.span_of(first);
        self.parts()
            .zip(codes.chunks_exact_mut(bytes))
            .map(|((channel, part), codes)| {
                let from = (rung.span_of(channel) - first_span) * groups;
                let zero_points = match rung.codes().symmetric() {
                    true => &[],
                    false => &grid.zero_points[from..from + groups],
                };
                let scales = &grid.scales[from..from + groups];
                let magnitudes = if rung.is_nested() { &grid.magnitudes[from..from + groups] } else { &[] };
                let grid = Grid { scales, magnitudes, zero_points, ..grid };
                quantize(level, rung.format(), rung.arith, &part, grid, codes)
            })
            .collect()
    }
}
