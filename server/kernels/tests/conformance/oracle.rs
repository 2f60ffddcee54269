//! What a channel must give: one element at a time, in the words of `proto/SPEC.md`, and as slow as it likes.
//!
//! f32 operators are IEEE's; roundings to bf16 and f16 are the `half` crate's; small floats are looked up in a table of all
//! their values.

use std::sync::LazyLock;

use half::{bf16, f16};
use quarrel_kernels::{Arith, Codebook, Codes, Dtype, MxRule, Packing, Scaling, Sums};

use crate::channel::{Case, Grid, Outcome, Range, Unfit};

/// What the kernels must give for the elements in `bytes`: on the grid that follows from them, or on a given one.
pub fn channel(case: &Case, bytes: &[u8], given: Option<&Grid>) -> Outcome {
    let values = read(case.dtype, bytes);
    let ranges = ranges(case, &values);
    let grid = match given.cloned().map_or_else(|| grid(case, &values), Ok) {
        Ok(grid) => grid,
        Err(unfit) => return Outcome::unfit(ranges, unfit),
    };
    let coded = each(case, &values, &grid);
    let unmeasured = Case { arith: Arith::F32, ..*case };
    let encoded = pack(case.format.codes, each(&unmeasured, &values, &grid).iter().map(|coded| coded.code));
    let decoded = [
        coded.iter().flat_map(|coded| coded.decoded.to_le_bytes()).collect(),
        coded.iter().flat_map(|coded| bf16::from_f32_const(coded.decoded).to_le_bytes()).collect(),
        coded.iter().flat_map(|coded| f16::from_f32_const(coded.decoded).to_le_bytes()).collect(),
    ];
    Outcome {
        ranges,
        grid: Ok(grid),
        packed: pack(case.format.codes, coded.iter().map(|coded| coded.code)),
        encoded,
        sums: sums(&values, &coded),
        decoded,
    }
}

/// Elements as f32.
pub fn read(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let each = |bytes: &[u8]| match dtype {
        Dtype::F32 => f32::from_le_bytes(bytes.try_into().unwrap()),
        Dtype::F64 => f64::from_le_bytes(bytes.try_into().unwrap()) as f32,
        Dtype::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f32_const(),
        Dtype::Bf16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32_const(),
        Dtype::F8E4m3 => match bytes[0] & 0x7f {
            0x7f => f32::NAN,
            magnitude => (E4M3.values[usize::from(magnitude)] as f32).copysign(bytes[0] as i8 as f32),
        },
        // binary16 with eight bits less.
        Dtype::F8E5m2 => f16::from_le_bytes([0, bytes[0]]).to_f32_const(),
    };
    bytes.chunks_exact(dtype.bytes()).map(each).collect()
}

/// A small float's magnitudes, in the order of their codes.
pub struct Table {
    values: Vec<f64>,
}

static E4M3: LazyLock<Table> = LazyLock::new(|| Table::new(4, 3, 7, 0x7f));
static E2M1: LazyLock<Table> = LazyLock::new(|| Table::new(2, 1, 1, 8));
static E2M3: LazyLock<Table> = LazyLock::new(|| Table::new(2, 3, 1, 32));

impl Table {
    fn new(exponent: u32, mantissa: u32, bias: i32, count: usize) -> Table {
        assert!(count <= 1 << (exponent + mantissa));
        let value = |code: usize| {
            let (e, m) = ((code >> mantissa) as i32, (code & ((1 << mantissa) - 1)) as f64);
            let one = f64::from(1 << mantissa);
            if e == 0 { m / one * 2f64.powi(1 - bias) } else { (1.0 + m / one) * 2f64.powi(e - bias) }
        };
        Table { values: (0..count).map(value).collect() }
    }

    /// That of codes which are small floats.
    pub fn of(codes: Codes) -> Option<&'static Table> {
        match codes {
            Codes::Int { .. } | Codes::Codebook(_) | Codes::Rowwise | Codes::Block(_) => None,
            Codes::Fp8E4m3 => Some(&E4M3),
            Codes::Fp6E2m3 => Some(&E2M3),
            Codes::Fp4E2m1 => Some(&E2M1),
        }
    }

    fn max(&self) -> f64 {
        self.values[self.values.len() - 1]
    }

    /// The code of the nearest magnitude; of two, the even one.
    pub fn nearest(&self, magnitude: f32) -> usize {
        let distance = |code: &usize| (self.values[*code] - f64::from(magnitude).min(self.max())).abs();
        let order = |a: &usize, b: &usize| distance(a).total_cmp(&distance(b)).then((a % 2).cmp(&(b % 2)));
        (0..self.values.len()).min_by(order).unwrap()
    }
}

/// Everything that codes stand for before they are scaled, in order.
pub fn values(codes: Codes) -> Vec<f64> {
    if let Codes::Codebook(book) = codes {
        return ranked(book).into_iter().map(|(value, _)| f64::from(value)).collect();
    }
    match Table::of(codes) {
        Some(table) => {
            let negative = table.values[1..].iter().rev().map(|value| -value);
            negative.chain(table.values.iter().copied()).collect()
        }
        None => {
            let (low, high) = limits(codes);
            (low as i32..=high as i32).map(f64::from).collect()
        }
    }
}

/// A codebook's values from the least to the greatest, with their codes; of two zeros, first the one of the lesser code.
fn ranked(book: Codebook) -> Vec<(f32, u8)> {
    let mut ranked: Vec<(f32, u8)> = book.values().into_iter().zip(0..).collect();
    ranked.sort_by(|(a, _), (b, _)| a.partial_cmp(b).unwrap());
    ranked
}

fn limits(codes: Codes) -> (f32, f32) {
    match (codes, Table::of(codes)) {
        (Codes::Codebook(_), _) => (-1.0, 1.0),
        (Codes::Rowwise, _) => (-127.0, 127.0),
        (_, Some(table)) => (-table.max() as f32, table.max() as f32),
        (codes, None) => (-2f32.powi(i32::from(codes.bits()) - 1), 2f32.powi(i32::from(codes.bits()) - 1) - 1.0),
    }
}

/// S of the specification.
fn stored(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::F16 => f16::from_f32_const(value).to_f32_const(),
        Dtype::Bf16 => bf16::from_f32_const(value).to_f32_const(),
        Dtype::F32 | Dtype::F64 | Dtype::F8E4m3 | Dtype::F8E5m2 => value,
    }
}

/// T of the specification.
fn intermediate(case: &Case, value: f32) -> f32 {
    match case.arith {
        Arith::F32 => value,
        Arith::WeightDtype => stored(case.dtype, value),
    }
}

fn ranges(case: &Case, values: &[f32]) -> Vec<Range> {
    let range = |group: &[f32]| {
        let (min, max) = ends(group);
        let amax = max.max(-min);
        let (min, max) = if case.format.codes.symmetric() { (-amax, amax) } else { (min, max) };
        group.iter().all(|value| value.is_finite()).then_some([min, max])
    };
    values.chunks(case.group).map(range).collect()
}

/// The least and the greatest, and zero.
fn ends(values: &[f32]) -> (f32, f32) {
    values.iter().fold((0.0, 0.0), |(min, max), value| (value.min(min), value.max(max)))
}

fn amax(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, value| value.abs().max(most))
}

/// The grid that follows from elements.
fn grid(case: &Case, values: &[f32]) -> Result<Grid, Unfit> {
    if !values.iter().all(|value| value.is_finite()) {
        return Err(Unfit::NonFinite);
    }
    let global = match case.format.scaling {
        Scaling::E4m3 => global_scale(case, amax(values)),
        Scaling::Weights | Scaling::E8m0(_) | Scaling::Absmax | Scaling::Nested | Scaling::InBlocks => 1.0,
    };
    let params = values.chunks(case.group).map(|group| qparams(case, group, global));
    let params: Vec<(f32, i32)> = params.collect();
    if params.iter().any(|(scale, _)| scale.is_infinite()) {
        return Err(Unfit::ScaleOverflow);
    }
    let zero_points = params.iter().map(|(_, zero_point)| *zero_point).collect();
    let zero_points = if case.format.codes.symmetric() { Vec::new() } else { zero_points };
    Ok(Grid { scales: params.iter().map(|(scale, _)| *scale).collect(), zero_points, global })
}

fn global_scale(case: &Case, amax: f32) -> f32 {
    let (_, largest) = limits(case.format.codes);
    let scale = intermediate(case, intermediate(case, 1.0 / amax) * (448.0 * largest));
    if scale.is_finite() && scale > 0.0 { scale } else { 1.0 }
}

fn qparams(case: &Case, group: &[f32], global: f32) -> (f32, i32) {
    let codes = case.format.codes;
    let (qmin, qmax) = limits(codes);
    let (lo, hi) = ends(group);
    match case.format.scaling {
        Scaling::E8m0(rule) => (power_of_two(codes, rule, amax(group)), 0),
        Scaling::E4m3 => {
            let code = E4M3.nearest(global * intermediate(case, amax(group) / qmax));
            (if code == 0 { 0.125 } else { E4M3.values[code] as f32 }, 0)
        }
        Scaling::Absmax | Scaling::Nested => (amax(group), 0),
        Scaling::Weights if codes.symmetric() => {
            let scale = stored(case.dtype, amax(group) / ((qmax - qmin) / 2.0));
            (or_epsilon(case.dtype, scale), 0)
        }
        Scaling::Weights | Scaling::InBlocks => {
            let scale = stored(case.dtype, intermediate(case, hi - lo) / (qmax - qmin));
            let zero_point = intermediate(case, qmin - intermediate(case, lo / scale)).clamp(qmin, qmax);
            let zero_point = if zero_point.is_nan() { 0.0 } else { zero_point.round_ties_even() };
            (or_epsilon(case.dtype, scale), zero_point as i32)
        }
    }
}

fn or_epsilon(dtype: Dtype, scale: f32) -> f32 {
    let epsilon = match dtype {
        Dtype::F16 => 2f32.powi(-10),
        Dtype::Bf16 => 2f32.powi(-7),
        Dtype::F32 | Dtype::F64 | Dtype::F8E4m3 | Dtype::F8E5m2 => 2f32.powi(-23),
    };
    if scale == 0.0 { epsilon } else { scale }
}

/// Powers of two are exact in f64, so comparing with each of them is.
fn power_of_two(codes: Codes, rule: MxRule, amax: f32) -> f32 {
    let (_, largest) = limits(codes);
    let floor = |value: f64| (-150..128).rev().find(|e| 2f64.powi(*e) <= value).unwrap_or(-150);
    let emax = floor(f64::from(largest));
    let exponent = match rule {
        MxRule::Floor => floor(f64::from(amax)) - emax,
        MxRule::Rceil => (-150..128).find(|e| 2f64.powi(*e) >= f64::from(amax / largest)).unwrap_or(128),
        MxRule::Even => {
            let floor = floor(f64::from(amax));
            // Half-way from the largest mantissa of so many bits to the next power of two; E4M3 counts as E2M1.
            let mantissa = if codes == Codes::Fp6E2m3 { 3 } else { 1 };
            let up = (2.0 - 0.5f64.powi(mantissa + 1)) * 2f64.powi(floor);
            floor + i32::from(f64::from(amax) >= up) - emax
        }
    };
    2f64.powi(exponent.clamp(-127, 127)) as f32
}

/// What becomes of an element.
struct Coded {
    /// Its bits, unsigned.
    code: u8,
    decoded: f32,
    /// Whether it lay outside the codes' range.
    outside: bool,
}

fn each(case: &Case, values: &[f32], grid: &Grid) -> Vec<Coded> {
    let one = |(index, value): (usize, &f32)| {
        let scale = grid.scales[index / case.group];
        match Table::of(case.format.codes) {
            None if case.format.scaling == Scaling::Absmax => of_magnitude(case.format.codes, *value, scale),
            None => integer(case, *value, scale, grid.zero_points.get(index / case.group).copied().unwrap_or(0)),
            Some(table) => small_float(case, *value, scale / grid.global, table),
        }
    };
    values.iter().enumerate().map(one).collect()
}

fn integer(case: &Case, value: f32, scale: f32, zero_point: i32) -> Coded {
    let (qmin, qmax) = limits(case.format.codes);
    let exact = intermediate(case, intermediate(case, value / scale) + zero_point as f32);
    let code = exact.clamp(qmin, qmax).round_ties_even() as i32;
    let offset = match case.format.codes {
        Codes::Int { packing: Packing::Plain, .. } => 0,
        _ => -qmin as i32,
    };
    Coded {
        code: (code + offset) as u8,
        decoded: (code - zero_point) as f32 * scale,
        outside: exact < qmin || exact > qmax,
    }
}

/// bitsandbytes' formats, under a block's greatest magnitude. Nothing is outside: it is the greatest.
fn of_magnitude(codes: Codes, value: f32, scale: f32) -> Coded {
    let Codes::Codebook(book) = codes else {
        let by = if scale == 0.0 { 0.0 } else { (1.0 / scale * 127.0).min(f32::MAX) };
        let code = (value * by).clamp(-127.0, 127.0).round_ties_even();
        let code = code as i8;
        return Coded { code: code as u8, decoded: f32::from(code) * scale * (1.0 / 127.0), outside: false };
    };
    let exact = (value * (1.0 / scale.max(1e-38))).clamp(-1.0, 1.0);
    let ranked = ranked(book);
    let below = ranked.windows(2).filter(|pair| (pair[0].0 + pair[1].0) / 2.0 < exact).count();
    let (unit, code) = ranked[below];
    Coded { code, decoded: unit * scale, outside: false }
}

fn small_float(case: &Case, value: f32, scale: f32, table: &Table) -> Coded {
    let codes = case.format.codes;
    let exact = match case.format.scaling {
        Scaling::Weights => intermediate(case, value / scale),
        Scaling::E8m0(_) | Scaling::E4m3 | Scaling::Absmax | Scaling::Nested | Scaling::InBlocks => value / scale,
    };
    let code = table.nearest(exact.abs());
    let is_negative = if codes == Codes::Fp4E2m1 { exact < 0.0 } else { exact.is_sign_negative() };
    let (sign, one) = if is_negative { (1 << (codes.bits() - 1), -1.0) } else { (0, 1.0) };
    Coded {
        code: code as u8 | sign,
        decoded: (table.values[code] * one) as f32 * scale,
        outside: f64::from(exact.abs()) > table.max(),
    }
}

fn sums(values: &[f32], coded: &[Coded]) -> Sums {
    let pairs = || values.iter().zip(coded).map(|(value, coded)| (*value, coded.decoded));
    let total = |of: fn(f64, f64) -> f64| -> f64 { pairs().map(|(x, y)| of(f64::from(x), f64::from(y))).sum() };
    Sums {
        elements: values.len() as u64,
        signal: total(|x, _| x * x),
        decoded: total(|_, y| y * y),
        product: total(|x, y| x * y),
        noise: total(|x, y| (x - y) * (x - y)),
        max_abs_error: pairs().map(|(x, y)| (x - y).abs()).fold(0.0, f32::max),
        amax: amax(values),
        saturated: coded.iter().filter(|coded| coded.outside).count() as u64,
    }
}

/// Bit `i*b + k` of the stream is bit `k` of code `i`.
pub fn pack(codes: Codes, unpacked: impl ExactSizeIterator<Item = u8>) -> Vec<u8> {
    let bits = usize::from(codes.bits());
    let unit = if let Codes::Int { packing: Packing::Dense, .. } = codes { 4 } else { 1 };
    let mut packed = vec![0; (unpacked.len() * bits).div_ceil(8 * unit) * unit];
    let mut codes_of: Vec<u8> = unpacked.collect();
    if let Codes::Codebook(book) = codes {
        turn(&mut codes_of, book);
    }
    for (index, code) in codes_of.into_iter().enumerate() {
        for bit in 0..bits {
            let at = index * bits + bit;
            packed[at / 8] |= (code >> bit & 1) << (at % 8);
        }
    }
    packed
}

/// The first codes of such a stream.
pub fn unpack(codes: Codes, packed: &[u8], count: usize) -> Vec<u8> {
    let bits = usize::from(codes.bits());
    let bit = |at: usize| packed[at / 8] >> (at % 8) & 1;
    // Of two codes of a codebook, the first lies above.
    let place = |index: usize| if let Codes::Codebook(_) = codes { index ^ 1 } else { index };
    (0..count).map(|index| (0..bits).fold(0, |code, k| code | bit(place(index) * bits + k) << k)).collect()
}

/// Changes places within each two codes; beside the last of an odd number is that of zero.
fn turn(codes: &mut Vec<u8>, book: Codebook) {
    if !codes.len().is_multiple_of(2) {
        codes.push(book.values().iter().position(|value| *value == 0.0).unwrap() as u8);
    }
    codes.chunks_exact_mut(2).for_each(|pair| pair.swap(0, 1));
}
