//! The whole way of one channel through the kernels, and what comes of it: here alone the tests touch that API.

use quarrel_kernels::{
    Arith, Coded, Decoded, Dtype, Format, Importance, Level, Part, ScaleOverflow, Scaler, Sums, TILE, dequantize,
    encode, global_scale, packed_bytes, quantize, ranges,
};

use crate::place::Place;

/// What a channel is turned into, and of what.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub format: Format,
    pub arith: Arith,
    pub dtype: Dtype,
    /// Columns that share a scale.
    pub group: usize,
}

/// A channel's scales, as [`quarrel_kernels::Grid`], and its own.
#[derive(Debug, Clone, PartialEq)]
pub struct Grid {
    pub scales: Vec<f32>,
    pub zero_points: Vec<i32>,
    pub global: f32,
}

/// The least and greatest of a group, and zero; nothing if one is NaN or infinite.
pub type Range = Option<[f32; 2]>;

/// Why elements have no codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfit {
    NonFinite,
    ScaleOverflow,
}

#[derive(Debug, Clone)]
pub struct Outcome {
    pub ranges: Vec<Range>,
    pub grid: Result<Grid, Unfit>,
    /// What `quantize` writes.
    pub packed: Vec<u8>,
    /// What `encode` writes.
    pub encoded: Vec<u8>,
    pub sums: Sums,
    /// In f32, bf16 and f16.
    pub decoded: [Vec<u8>; 3],
}

/// Where the buffers of a channel lie.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    pub input: Place,
    pub packed: Place,
    pub decoded: Place,
    pub grid: Place,
}

impl Places {
    pub const OWN: Places = Places::all(Place::Own);

    pub const fn all(place: Place) -> Places {
        Places { input: place, packed: place, decoded: place, grid: place }
    }
}

/// Runs every kernel over the elements in `bytes`, on the grid that follows from them, or on a given one.
pub fn channel(level: Level, case: &Case, bytes: &[u8], given: Option<&Grid>, places: Places) -> Outcome {
    let input = places.input.holding(bytes, 0x11);
    let part = Part {
        dtype: case.dtype,
        bytes: &input,
        column: 0,
        group: case.group,
        ahead: &input,
        importance: Importance::NONE,
    };
    let found = found(level, case, &part);
    let grid = given.cloned().map_or_else(|| derived(level, case, &found), Ok);
    match grid {
        Ok(grid) => coded(level, case, &part, found, grid, places),
        Err(unfit) => Outcome::unfit(found, unfit),
    }
}

/// The ranges of a channel's groups.
fn found(level: Level, case: &Case, part: &Part<'_>) -> Vec<Range> {
    let columns = part.bytes.len() / case.dtype.bytes();
    let mut found = vec![quarrel_kernels::Range::default(); columns.div_ceil(case.group)];
    ranges(level, case.format.codes, part, &mut found);
    found.iter().map(|range| range.finite.then_some([range.min, range.max])).collect()
}

/// The grid that follows from ranges.
fn derived(level: Level, case: &Case, found: &[Range]) -> Result<Grid, Unfit> {
    let range = |[min, max]: [f32; 2]| quarrel_kernels::Range { min, max, finite: true };
    let found = found.iter().map(|ends| ends.map(range).ok_or(Unfit::NonFinite)).collect::<Result<Vec<_>, _>>()?;
    let amax = found.iter().fold(0f32, |most, range| most.max(range.amax()));
    let global = match case.format.scaling {
        quarrel_kernels::Scaling::E4m3 => global_scale(case.arith, case.dtype, case.format.codes, amax),
        _ => 1.0,
    };
    let (mut scales, mut zero_points) = (vec![f32::NAN; found.len()], vec![i32::MIN; found.len()]);
    if case.format.codes.symmetric() {
        zero_points.clear();
    }
    let scaler = Scaler { format: case.format, arith: case.arith, dtype: case.dtype, global };
    scaler.write(level, &found, &mut scales, &mut zero_points).map_err(|ScaleOverflow| Unfit::ScaleOverflow)?;
    let is_scale =
        |scale: &f32| *scale > 0.0 || *scale == 0.0 && case.format.scaling == quarrel_kernels::Scaling::Absmax;
    assert!(scales.iter().all(|scale| is_scale(scale) && scale.is_finite()), "{case:?}: {scales:?}");
    // One group at a time has the same.
    for (group, range) in found.iter().enumerate() {
        let params = scaler.qparams(*range).map_err(|ScaleOverflow| Unfit::ScaleOverflow)?;
        assert_eq!(params.scale.to_bits(), scales[group].to_bits(), "{case:?}, group {group}");
        assert_eq!(params.zero_point, zero_points.get(group).copied().unwrap_or(0), "{case:?}, group {group}");
    }
    Ok(Grid { scales, zero_points, global })
}

fn coded(level: Level, case: &Case, part: &Part<'_>, ranges: Vec<Range>, grid: Grid, places: Places) -> Outcome {
    let (format, columns) = (case.format, part.bytes.len() / case.dtype.bytes());
    let scales = places.grid.holding(&grid.scales, -f32::MAX);
    let zero_points = places.grid.holding(&grid.zero_points, 0);
    let seen =
        quarrel_kernels::Grid { scales: &scales, magnitudes: &[], zero_points: &zero_points, global: grid.global };
    // Filled with different bits, so that a byte that is not written shows.
    let mut packed = places.packed.room(packed_bytes(format.codes, columns), 0xaa);
    let mut encoded = places.packed.room(packed_bytes(format.codes, columns), 0x55);
    let sums = quantize(level, format, case.arith, part, seen, &mut packed);
    encode(level, format, part, seen, &mut encoded);
    let coded = Coded { codes: format.codes, packed: &packed, column: 0, group: case.group, grid: seen };
    let decoded = [Decoded::F32, Decoded::Bf16, Decoded::F16].map(|decoded| {
        let mut values = places.decoded.room(columns * decoded.bytes(), 0xcc);
        dequantize(level, &coded, decoded, &mut values);
        values.to_vec()
    });
    Outcome { ranges, packed: packed.to_vec(), encoded: encoded.to_vec(), sums, decoded, grid: Ok(grid) }
}

/// The same channel in parts that begin at `cuts`, multiples of [`TILE`]: what each gives, put together.
pub fn in_parts(level: Level, case: &Case, bytes: &[u8], cuts: &[usize]) -> Outcome {
    let width = case.dtype.bytes();
    let columns = bytes.len() / width;
    let starts = cuts.iter().filter(|cut| **cut < columns).copied();
    let ends = starts.clone().skip(1).chain([columns]);
    let spans: Vec<_> = starts.zip(ends).collect();
    assert!(spans.iter().all(|(start, _)| start.is_multiple_of(TILE)));
    let part = |start: usize, end: usize| Part {
        dtype: case.dtype,
        bytes: &bytes[start * width..end * width],
        column: start,
        group: case.group,
        ahead: &[],
        importance: Importance::NONE,
    };
    let mut all = vec![quarrel_kernels::Range::default(); columns.div_ceil(case.group)];
    for (start, end) in &spans {
        ranges(level, case.format.codes, &part(*start, *end), &mut all[start / case.group..]);
    }
    let ranges: Vec<Range> = all.iter().map(|range| range.finite.then_some([range.min, range.max])).collect();
    let grid = match derived(level, case, &ranges) {
        Ok(grid) => grid,
        Err(unfit) => return Outcome::unfit(ranges, unfit),
    };
    let seen = quarrel_kernels::Grid {
        scales: &grid.scales,
        magnitudes: &[],
        zero_points: &grid.zero_points,
        global: grid.global,
    };
    let mut outcome = Outcome { ranges, ..Outcome::unfit(Vec::new(), Unfit::NonFinite) };
    for (start, end) in spans {
        let part = part(start, end);
        let mut packed = vec![0xaa; packed_bytes(case.format.codes, end - start)];
        let sums = quantize(level, case.format, case.arith, &part, seen, &mut packed);
        outcome.sums = outcome.sums.then(&sums);
        let coded = Coded { codes: case.format.codes, packed: &packed, column: start, group: case.group, grid: seen };
        for (all, decoded) in outcome.decoded.iter_mut().zip([Decoded::F32, Decoded::Bf16, Decoded::F16]) {
            let mut values = vec![0xcc; (end - start) * decoded.bytes()];
            dequantize(level, &coded, decoded, &mut values);
            all.extend(values);
        }
        outcome.packed.extend(&packed);
        encode(level, case.format, &part, seen, &mut packed);
        outcome.encoded.extend(packed);
    }
    Outcome { grid: Ok(grid), ..outcome }
}

impl Outcome {
    pub fn unfit(ranges: Vec<Range>, unfit: Unfit) -> Outcome {
        let none = [const { Vec::new() }; 3];
        Outcome { ranges, grid: Err(unfit), packed: vec![], encoded: vec![], sums: Sums::default(), decoded: none }
    }

    /// Asserts that all is the same, to the bit.
    pub fn assert_same(&self, expected: &Outcome, what: impl Fn() -> String) {
        self.assert_alike(expected, &what);
        let (sums, expected) = (bits(&self.sums), bits(&expected.sums));
        assert!(sums == expected, "{}: {sums:x?} instead of {expected:x?}", what());
    }

    /// Asserts that all is the same, and the sums within a millionth.
    pub fn assert_agrees(&self, expected: &Outcome, what: impl Fn() -> String) {
        self.assert_alike(expected, &what);
        let (got, expected) = (&self.sums, &expected.sums);
        let close = |got: f64, expected: f64| got == expected || (got - expected).abs() <= 1e-6 * expected.abs();
        let is_close = close(got.signal, expected.signal)
            && close(got.decoded, expected.decoded)
            && close(got.product, expected.product)
            && close(got.noise, expected.noise);
        let is_equal = (got.elements, got.saturated, got.max_abs_error, got.amax)
            == (expected.elements, expected.saturated, expected.max_abs_error, expected.amax);
        assert!(is_close && is_equal, "{}: {got:?} instead of {expected:?}", what());
    }

    fn assert_alike(&self, expected: &Outcome, what: &impl Fn() -> String) {
        fn check<T: PartialEq + std::fmt::Debug>(got: &[T], expected: &[T], what: &dyn Fn() -> String, field: &str) {
            if got != expected {
                let at = got.iter().zip(expected).position(|(got, expected)| got != expected);
                let at = at.unwrap_or(got.len().min(expected.len()));
                panic!("{}: {field}[{at}] is {:?} instead of {:?}", what(), got.get(at), expected.get(at));
            }
        }
        check(&self.ranges, &expected.ranges, what, "ranges");
        assert!(self.grid == expected.grid, "{}: {:?} instead of {:?}", what(), self.grid, expected.grid);
        check(&self.packed, &expected.packed, what, "packed");
        check(&self.encoded, &expected.encoded, what, "encoded");
        for (field, (got, expected)) in ["f32", "bf16", "f16"].iter().zip(self.decoded.iter().zip(&expected.decoded)) {
            check(got, expected, what, field);
        }
    }
}

fn bits(sums: &Sums) -> [u64; 8] {
    // Every field by name, so that a new one is not forgotten.
    let Sums { elements, signal, decoded, product, noise, max_abs_error, amax, saturated } = *sums;
    let floats = [signal, decoded, product, noise, f64::from(max_abs_error), f64::from(amax)].map(f64::to_bits);
    let [signal, decoded, product, noise, max_abs_error, amax] = floats;
    [elements, signal, decoded, product, noise, max_abs_error, amax, saturated]
}
