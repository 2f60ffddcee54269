//! What quantizing lost: sums over elements and their decoded values, and the metrics that follow from them.
//!
//! A tile of at most [`TILE`](crate::TILE) columns is summed in f32, over sixteen lanes and a fixed tree; tiles are
//! added in f64 in the order of the columns, parts of a channel in order, channels in order. The order never depends on
//! CPU level, threads or how rows were cut, so the sums are the same bits everywhere. Where squares would leave
//! the range in which f32 is exact enough, the tile is summed in f64 instead, column by column.

use std::ops::RangeInclusive;

use crate::{
    coder::Coded,
    element::{LANES, Value},
    range::greatest,
    simd::Simd,
};

/// Sums of at most 256 squares that f32 holds well: far from overflow, and so far from underflow that terms lost there
/// do not count.
const SAFE: RangeInclusive<f32> = 1e-25..=1e30;

/// Sums over elements `x` and their decoded values `y`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sums {
    /// How many elements.
    pub elements: u64,
    /// Sum of x².
    pub signal: f64,
    /// Sum of y².
    pub decoded: f64,
    /// Sum of x·y.
    pub product: f64,
    /// Sum of (x - y)².
    pub noise: f64,
    /// The greatest |x - y|.
    pub max_abs_error: f32,
    /// The greatest |x|.
    pub amax: f32,
    /// Elements whose x/scale + zero point lay outside the codes' range.
    pub saturated: u64,
}

/// Measured quality, in the units of the weights. Undefined ones are `None`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Metrics {
    /// How many elements.
    pub elements: u64,
    /// Mean squared error; undefined for no elements, and where a decoded value is beyond f32.
    pub mse: Option<f64>,
    /// 10 log10(signal / noise) in dB; undefined without signal or without noise, and where a decoded value is beyond f32.
    pub sqnr_db: Option<f64>,
    /// Cosine of the angle between x and y; undefined if either is all zero, and where a decoded value is beyond f32.
    pub cosine: Option<f64>,
    /// The greatest |x - y|.
    pub max_abs_error: f64,
    /// The greatest |x|.
    pub amax: f64,
    /// Elements outside the codes' range.
    pub saturated: u64,
}

impl Sums {
    /// The sums of two sets of elements, of which `later` comes after.
    pub fn then(self, later: &Sums) -> Sums {
        Sums {
            elements: self.elements + later.elements,
            signal: self.signal + later.signal,
            decoded: self.decoded + later.decoded,
            product: self.product + later.product,
            noise: self.noise + later.noise,
            max_abs_error: self.max_abs_error.max(later.max_abs_error),
            amax: self.amax.max(later.amax),
            saturated: self.saturated + later.saturated,
        }
    }

    /// The metrics of these elements.
    pub fn metrics(&self) -> Metrics {
        let is_defined = self.noise.is_finite() && self.decoded.is_finite();
        let cosine = (is_defined && self.signal > 0.0 && self.decoded > 0.0)
            .then(|| (self.product / (self.signal.sqrt() * self.decoded.sqrt())).clamp(-1.0, 1.0));
        Metrics {
            elements: self.elements,
            mse: (is_defined && self.elements > 0).then(|| self.noise / self.elements as f64),
            // libm's log10 and not the C library's, whose last bit differs from machine to machine.
            sqnr_db: (is_defined && self.signal > 0.0 && self.noise > 0.0)
                .then(|| 10.0 * libm::log10(self.signal / self.noise)),
            cosine,
            max_abs_error: f64::from(self.max_abs_error),
            amax: f64::from(self.amax),
            saturated: self.saturated,
        }
    }
}

/// The sums of tiles so far.
#[derive(Default)]
pub(crate) struct Tally {
    sums: Sums,
    /// The greatest (x - y)² and x² in each lane, of tiles whose sums f32 holds. Their roots are |x - y| and |x| again, exactly.
    worst: [f32; LANES],
    most: [f32; LANES],
}

impl Tally {
    /// Adds a tile, whose sums are in `lanes`. `decode` gives the decoded value of a column, for where f32 is not exact enough.
    #[inline(always)]
    pub(crate) fn add<S: Simd, V: Value>(&mut self, values: &[V], lanes: &Lanes, decode: impl Fn(usize) -> f32) {
        let folded = lanes.folded::<S>();
        // Of x·y the sum is (x² + y² - (x - y)²) / 2, which is as exact as these unless little of the signal is left.
        let is_exact = SAFE.contains(&folded.signal)
            && SAFE.contains(&folded.noise)
            && SAFE.contains(&folded.decoded)
            && 2.0 * folded.product() >= f64::from(folded.signal);
        if is_exact || folded.is_exact_after_all(values, &decode) {
            self.sums = self.sums.then(&folded.sums(values.len()));
            for from in (0..LANES).step_by(S::W) {
                S::store(S::max(S::load(&lanes.worst, from), S::load(&self.worst, from)), &mut self.worst, from);
                S::store(S::max(S::load(&lanes.most, from), S::load(&self.most, from)), &mut self.most, from);
            }
        } else {
            self.sums = self.sums.then(&exactly(values, folded.outside, decode));
        }
    }

    /// The sums of all.
    #[inline(always)]
    pub(crate) fn sums<S: Simd>(self) -> Sums {
        let (worst, most) = (S::greatest(&self.worst).sqrt(), S::greatest(&self.most).sqrt());
        let max_abs_error = greatest(worst, self.sums.max_abs_error);
        Sums { max_abs_error, amax: greatest(most, self.sums.amax), ..self.sums }
    }
}

/// A registerful of a tile's sums while it is computed.
pub(crate) struct Registers<S: Simd> {
    signal: S::F,
    decoded: S::F,
    noise: S::F,
    worst: S::F,
    most: S::F,
    outside: u32,
}

impl<S: Simd> Registers<S> {
    #[inline(always)]
    pub(crate) fn new() -> Registers<S> {
        let zero = S::splat(0.0);
        Registers { signal: zero, decoded: zero, noise: zero, worst: zero, most: zero, outside: 0 }
    }

    /// Adds elements and what they became.
    #[inline(always)]
    pub(crate) fn add(&mut self, x: S::F, coded: &Coded<S>) {
        self.outside += S::count_differing(coded.exact, coded.near);
        let y = coded.decoded;
        let error = S::sub(x, y);
        let (signal, noise) = (S::mul(x, x), S::mul(error, error));
        self.signal = S::add(self.signal, signal);
        self.decoded = S::add(self.decoded, S::mul(y, y));
        self.noise = S::add(self.noise, noise);
        self.worst = S::max(noise, self.worst);
        self.most = S::max(signal, self.most);
    }
}

/// A tile's sums in sixteen lanes, however many registers they took.
pub(crate) struct Lanes {
    signal: [f32; LANES],
    decoded: [f32; LANES],
    noise: [f32; LANES],
    /// The greatest (x - y)² and x².
    worst: [f32; LANES],
    most: [f32; LANES],
    outside: u32,
}

impl Lanes {
    #[inline(always)]
    pub(crate) fn new() -> Lanes {
        let zeros = [0f32; LANES];
        Lanes { signal: zeros, decoded: zeros, noise: zeros, worst: zeros, most: zeros, outside: 0 }
    }

    /// Puts registers into the lanes from `from` on.
    #[inline(always)]
    pub(crate) fn put<S: Simd>(&mut self, from: usize, registers: Registers<S>) {
        S::store(registers.signal, &mut self.signal, from);
        S::store(registers.decoded, &mut self.decoded, from);
        S::store(registers.noise, &mut self.noise, from);
        S::store(registers.worst, &mut self.worst, from);
        S::store(registers.most, &mut self.most, from);
        self.outside += registers.outside;
    }

    #[inline(always)]
    fn folded<S: Simd>(&self) -> Folded {
        let [signal, decoded, noise] = S::sums([&self.signal, &self.decoded, &self.noise]);
        Folded { signal, decoded, noise, outside: self.outside }
    }
}

/// The sums of a tile.
struct Folded {
    signal: f32,
    decoded: f32,
    noise: f32,
    outside: u32,
}

impl Folded {
    /// Whether what looks lost is not: elements that are all zero, values that all are, or no error in any.
    #[inline(never)]
    fn is_exact_after_all<V: Value>(&self, values: &[V], decode: &impl Fn(usize) -> f32) -> bool {
        let no_signal = || values.iter().all(|x| x.get() == 0.0);
        let no_values = || (0..values.len()).all(|column| decode(column) == 0.0);
        let no_noise = || values.iter().enumerate().all(|(column, x)| x.get() == decode(column));
        let kept = |sum: f32| SAFE.contains(&sum);
        let fits = kept(self.decoded) && 2.0 * self.product() >= f64::from(self.signal);
        (kept(self.signal) || self.signal == 0.0 && no_signal())
            && (kept(self.noise) || self.noise == 0.0 && no_noise())
            && (fits || self.decoded == 0.0 && no_values())
    }

    #[inline(always)]
    fn product(&self) -> f64 {
        let (signal, decoded, noise) = (f64::from(self.signal), f64::from(self.decoded), f64::from(self.noise));
        if self.decoded == 0.0 { 0.0 } else { (signal + decoded - noise) / 2.0 }
    }

    #[inline(always)]
    fn sums(&self, elements: usize) -> Sums {
        Sums {
            elements: elements as u64,
            signal: f64::from(self.signal),
            decoded: f64::from(self.decoded),
            product: self.product(),
            noise: f64::from(self.noise),
            saturated: u64::from(self.outside),
            ..Sums::default()
        }
    }
}

/// The sums of a tile in f64, column by column.
#[inline(never)]
fn exactly<V: Value>(values: &[V], outside: u32, decode: impl Fn(usize) -> f32) -> Sums {
    let mut sums = Sums { elements: values.len() as u64, saturated: u64::from(outside), ..Sums::default() };
    for (column, value) in values.iter().enumerate() {
        let (x, y) = (value.get(), decode(column));
        sums.max_abs_error = greatest((x - y).abs(), sums.max_abs_error);
        sums.amax = greatest(x.abs(), sums.amax);
        let (x, y) = (f64::from(x), f64::from(y));
        sums.signal += x * x;
        sums.decoded += y * y;
        sums.product += x * y;
        sums.noise += (x - y) * (x - y);
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        element::{LooseF32, loose},
        simd::One,
    };

    fn measured(values: &[f32], decoded: &[f32]) -> Sums {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut lanes = Lanes::new();
        for lane in 0..LANES {
            let mut sums = Registers::<One>::new();
            for (x, y) in values.iter().zip(decoded).skip(lane).step_by(LANES) {
                sums.add([*x], &Coded { codes: [0], decoded: [*y], exact: [0.0], near: [0.0] });
            }
            lanes.put(lane, sums);
        }
        let mut tally = Tally::default();
        tally.add::<One, LooseF32>(loose(&bytes), &lanes, |column| decoded[column]);
        tally.sums::<One>()
    }

    #[test]
    fn sums_are_within_a_millionth_of_exact_at_every_magnitude() {
        for exponent in [-149, -126, -100, -60, -20, 0, 20, 60, 100, 120] {
            let unit = 2f64.powi(exponent);
            let value = |i: usize| ((i as f64 * 0.618_034).fract() * 100.0 - 50.0) * unit;
            let values: Vec<f32> = (0..256).map(|i| value(i) as f32).collect();
            let decoded: Vec<f32> = values.iter().map(|x| ((f64::from(*x) / unit).round() * unit) as f32).collect();
            let sums = measured(&values, &decoded);
            let sum = |f: fn(f64, f64) -> f64| -> f64 {
                values.iter().zip(&decoded).map(|(x, y)| f(f64::from(*x), f64::from(*y))).sum()
            };
            let close = |got: f64, expected: f64| (got - expected).abs() <= 1e-6 * expected.abs();
            assert!(close(sums.signal, sum(|x, _| x * x)), "{exponent}: {sums:?}");
            assert!(close(sums.decoded, sum(|_, y| y * y)), "{exponent}");
            assert!(close(sums.product, sum(|x, y| x * y)), "{exponent}");
            assert!(close(sums.noise, sum(|x, y| (x - y) * (x - y))), "{exponent}");
            let worst = values.iter().zip(&decoded).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            assert_eq!(sums.max_abs_error, worst, "{exponent}");
            assert_eq!(sums.amax, values.iter().map(|x| x.abs()).fold(0.0, f32::max), "{exponent}");
        }
    }

    #[test]
    fn an_error_far_below_the_signal_is_not_lost() {
        let sums = measured(&[1.0, 1e-30], &[1.0, 0.0]);
        assert!((sums.noise / 1e-60 - 1.0).abs() < 1e-6);
        assert!(sums.metrics().sqnr_db.is_some_and(|db| (db - 600.0).abs() < 1e-3));
    }

    #[test]
    fn undefined_metrics_are_none_and_never_nan() {
        let zeros = measured(&[0.0; 5], &[0.0; 5]).metrics();
        assert_eq!((zeros.mse, zeros.sqnr_db, zeros.cosine), (Some(0.0), None, None));
        let none = Sums::default().metrics();
        assert_eq!((none.mse, none.sqnr_db, none.cosine), (None, None, None));
    }
}
