//! From the ranges of cells to the scales of spans; and to others, where those make less error.

use quarrel_kernels::{self as kernels, Level, Qparams, ScaleOverflow, Search, errors};

use crate::{
    execute::{Cancel, Cancelled, Cell, Found, starts},
    faults::{Fault, FaultKind},
    layer::{Global, Rung},
    nested::Nested,
    parallel,
    rows::Work,
};

/// The ranges that a cell adds to a span, and the first number in them that is none, by its flat index in the layer.
pub(crate) struct Seen {
    pub(crate) ranges: Vec<kernels::Range>,
    pub(crate) bad: Option<(usize, f32)>,
}

/// Why a span has no scales.
pub(crate) enum Unfit {
    NonFinite,
    ScaleOverflow,
    /// The greatest magnitude found, and that given.
    AmaxExceeded(f32, f32),
}

/// The scales and zero points of one span.
pub(crate) fn scales_of(
    level: Level,
    rung: &Rung,
    found: &[kernels::Range],
    global: f32,
    scales: &mut [f32],
    zero_points: &mut [i32],
) -> Result<(), Unfit> {
    if found.iter().any(|range| !range.finite) {
        return Err(Unfit::NonFinite);
    }
    if let Global::Given(given) = rung.global
        && let Some(range) = found.iter().find(|range| range.amax() > given)
    {
        return Err(Unfit::AmaxExceeded(range.amax(), given));
    }
    rung.scaler(global).write(level, found, scales, zero_points).map_err(|ScaleOverflow| Unfit::ScaleOverflow)
}

/// What is tried for groups of those ranges.
pub(crate) fn tried(level: Level, search: Search, rung: &Rung, ranges: &[kernels::Range]) -> Vec<Qparams> {
    let each = search.tried(rung.codes());
    let mut all = vec![Qparams { scale: 1.0, zero_point: 0 }; ranges.len() * each];
    for (range, tried) in ranges.iter().zip(all.chunks_exact_mut(each)) {
        search.write(level, rung.scaler(1.0), *range, tried);
    }
    all
}

/// Replaces the scales of works whose solver searches, where spans are more than one short channel.
///
/// Errors are summed channel by channel and added in the order of channels and columns, so that nothing depends on how
/// channels were cut into cells.
pub(crate) fn solve(
    level: Level,
    works: &[(&Work, &Rung)],
    cells: &[Cell<'_>],
    ranges: &[Vec<kernels::Range>],
    scales: &mut [f32],
    zero_points: &mut [i32],
    cancel: &Cancel,
) -> Result<(), Cancelled> {
    let all_tried: Vec<Vec<Qparams>> = works
        .iter()
        .zip(ranges)
        .map(|((_, rung), ranges)| match rung.scheme.solver().search() {
            Some(search) => tried(level, search, rung, ranges),
            None => Vec::new(),
        })
        .collect();
    // Where those of a cell's groups stand, of a channel.
    let place = |search: Search, cell: &Cell<'_>, channel: usize| {
        let (work, rung) = works[cell.work];
        let before = (rung.span_of(channel) - rung.span_of(work.channels.start)) * rung.groups();
        let (groups, each) = (cell.groups(), search.tried(rung.codes()));
        (before + groups.start) * each..(before + groups.end) * each
    };
    let found: Vec<Vec<f64>> = parallel::map(cells.iter().collect(), |cell| {
        cancel.check()?;
        let rung = cell.rung;
        let Some(search) = rung.scheme.solver().search() else { return Ok(Vec::new()) };
        let of_channel = cell.groups().len() * search.tried(rung.codes());
        let mut found = vec![0.0; cell.channels.len() * of_channel];
        for ((channel, part), found) in cell.parts().zip(found.chunks_exact_mut(of_channel)) {
            let tried = &all_tried[cell.work][place(search, cell, channel)];
            errors(level, search, (rung.format(), rung.arith), &part, tried, found);
        }
        Ok(found)
    })?;
    let mut sums: Vec<Vec<f64>> = all_tried.iter().map(|tried| vec![0.0; tried.len()]).collect();
    for (cell, found) in cells.iter().zip(&found) {
        let Some(search) = cell.rung.scheme.solver().search() else { continue };
        let of_channel = cell.groups().len() * search.tried(cell.rung.codes());
        for (channel, found) in cell.channels.clone().zip(found.chunks_exact(of_channel)) {
            let sums = &mut sums[cell.work][place(search, cell, channel)];
            for (sum, error) in sums.iter_mut().zip(found) {
                *sum += error;
            }
        }
    }
    for (index, (scales_from, zero_points_from)) in starts(works).into_iter().enumerate() {
        let rung = works[index].1;
        let Some(search) = rung.scheme.solver().search() else { continue };
        // A symmetric work has none: what begins there is the next one's.
        let zero_points = if rung.codes().symmetric() { &mut [][..] } else { &mut zero_points[zero_points_from..] };
        search.choose(rung.codes(), &all_tried[index], &sums[index], &mut scales[scales_from..], zero_points);
    }
    Ok(())
}

/// Quantizes the scales of works whose scheme says so: `scales` are then what they are decoded to. What they were, of all works.
pub(crate) fn nest(works: &[(&Work, &Rung)], scales: &mut [f32], all: &mut [Found]) -> Vec<f32> {
    if !works.iter().any(|(_, rung)| rung.is_nested()) {
        return Vec::new();
    }
    let magnitudes = scales.to_vec();
    for (index, ((work, rung), (from, _))) in works.iter().zip(starts(works)).enumerate() {
        // Without faults, since all channels have one together.
        if !rung.is_nested() || !all[index].faults.is_empty() {
            continue;
        }
        let scales = &mut scales[from..from + rung.spans_in(&work.channels) * rung.groups()];
        let nested = Nested::of(scales);
        for (scale, decoded) in scales.iter_mut().zip(nested.magnitudes()) {
            *scale = decoded;
        }
        match scales.iter().all(|scale| scale.is_finite()) {
            true => all[index].nested = Some(nested),
            false => {
                scales.fill(1.0);
                all[index].faults.push(Fault { channels: work.channels.clone(), kind: FaultKind::ScaleOverflow });
            }
        }
    }
    magnitudes
}

/// Ranges of cells to scales of spans, and the ranges of each work's groups. A span at fault gets scales of one, so that its codes mean nothing and harm nothing.
pub(crate) fn find_scales(
    level: Level,
    works: &[(&Work, &Rung)],
    cells: &[Cell<'_>],
    found: Vec<Vec<Seen>>,
    scales: &mut [f32],
    zero_points: &mut [i32],
    all: &mut [Found],
) -> Vec<Vec<kernels::Range>> {
    let mut ranges = Vec::new();
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
        if rung.is_together() {
            let amax = spread.iter().fold(0f32, |most, range| most.max(range.amax()));
            match bad.iter().find_map(|bad| *bad) {
                None if rung.is_nested() => {}
                None => all[index].global = rung.global_of(amax),
                // Every channel's codes depend on it.
                Some((at, value)) => {
                    let kind = FaultKind::NonFinite(at, value);
                    all[index].faults.push(Fault { channels: work.channels.clone(), kind });
                    bad.fill(None);
                    spread.fill(kernels::Range::default());
                }
            }
        }
        let global = all[index].global;
        let (scales_from, zero_points_from) = starts[index];
        for (span, first_bad) in bad.into_iter().enumerate() {
            let end = rung.span_end(channel);
            let scales = &mut scales[scales_from + span * groups..][..groups];
            let zero_points = match rung.codes().symmetric() {
                true => &mut [][..],
                false => &mut zero_points[zero_points_from + span * groups..][..groups],
            };
            if let Err(unfit) = scales_of(level, rung, &spread[span * groups..][..groups], global, scales, zero_points)
            {
                let kind = match (unfit, first_bad) {
                    (Unfit::NonFinite, Some((at, value))) => FaultKind::NonFinite(at, value),
                    (Unfit::NonFinite | Unfit::ScaleOverflow, _) => FaultKind::ScaleOverflow,
                    (Unfit::AmaxExceeded(found, given), _) => FaultKind::AmaxExceeded(found, given),
                };
                all[index].faults.push(Fault { channels: channel..end, kind });
                scales.fill(1.0);
                zero_points.fill(0);
            }
            channel = end;
        }
        ranges.push(spread);
    }
    ranges
}
