//! From the ranges of cells to the scales of spans; and to narrower ones, where those make less error.

use quarrel_kernels::{self as kernels, CLIPS, Level, Qparams, ScaleOverflow, clipped, squared_errors};

use crate::{
    execute::{Cancel, Cancelled, Cell, Fault, FaultKind, Found, starts},
    layer::{Global, Rung},
    parallel,
    rows::Work,
    scheme::Solver,
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

/// The scales of a group under the ranges that are tried.
pub(crate) fn clips(rung: &Rung, range: kernels::Range) -> [Qparams; CLIPS] {
    clipped(rung.scaler(1.0), range)
}

/// Of each group the scale with the least error; of equal errors that of the widest range.
pub(crate) fn choose(clips: &[[Qparams; CLIPS]], errors: &[[f64; CLIPS]], scales: &mut [f32], zero_points: &mut [i32]) {
    for (group, (clips, errors)) in clips.iter().zip(errors).enumerate() {
        let least = (1..CLIPS).fold(0, |least, at| if errors[at] < errors[least] { at } else { least });
        scales[group] = clips[least].scale;
        if let Some(zero_point) = zero_points.get_mut(group) {
            *zero_point = clips[least].zero_point;
        }
    }
}

/// Replaces the scales of works whose solver is [`Solver::Mse`], where spans are more than one short channel.
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
    let all_clips: Vec<Vec<[Qparams; CLIPS]>> = works
        .iter()
        .zip(ranges)
        .map(|((_, rung), ranges)| match rung.scheme.solver() {
            Solver::Mse => ranges.iter().map(|range| clips(rung, *range)).collect(),
            Solver::Absmax => Vec::new(),
        })
        .collect();
    // Where the clips of a channel's groups begin.
    let place = |work: usize, channel: usize| {
        let (work, rung) = works[work];
        (rung.span_of(channel) - rung.span_of(work.channels.start)) * rung.groups()
    };
    let found: Vec<Vec<[f64; CLIPS]>> = parallel::map(cells.iter().collect(), |cell| {
        cancel.check()?;
        let (rung, touched) = (cell.rung, cell.groups());
        if rung.scheme.solver() != Solver::Mse {
            return Ok(Vec::new());
        }
        let mut errors = vec![[0.0; CLIPS]; cell.channels.len() * touched.len()];
        for ((channel, part), errors) in cell.parts().zip(errors.chunks_exact_mut(touched.len())) {
            let clips = &all_clips[cell.work][place(cell.work, channel)..][touched.clone()];
            squared_errors(level, rung.format(), rung.arith, &part, clips, errors);
        }
        Ok(errors)
    })?;
    let mut sums: Vec<Vec<[f64; CLIPS]>> = all_clips.iter().map(|clips| vec![[0.0; CLIPS]; clips.len()]).collect();
    for (cell, found) in cells.iter().zip(&found).filter(|(_, found)| !found.is_empty()) {
        let touched = cell.groups();
        for (channel, found) in cell.channels.clone().zip(found.chunks_exact(touched.len())) {
            let sums = &mut sums[cell.work][place(cell.work, channel)..][touched.clone()];
            for (sum, error) in sums.iter_mut().flatten().zip(found.iter().flatten()) {
                *sum += error;
            }
        }
    }
    for ((clips, errors), (scales_from, zero_points_from)) in all_clips.iter().zip(&sums).zip(starts(works)) {
        let zero_points = zero_points.get_mut(zero_points_from..).unwrap_or_default();
        choose(clips, errors, &mut scales[scales_from..], zero_points);
    }
    Ok(())
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
        if rung.global == Global::Found {
            let amax = spread.iter().fold(0f32, |most, range| most.max(range.amax()));
            match bad.iter().find_map(|bad| *bad) {
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
