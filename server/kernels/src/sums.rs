//! What quantizing lost: sums over elements and their decoded values, and the metrics that follow from them.
//!
//! A piece of at most [`TILE`](crate::TILE) elements is summed in f32, over sixteen lanes and a fixed tree; pieces are
//! added in f64 in the order of the columns, parts of a channel in order, channels in order. The order never depends on
//! CPU level, threads or how rows were cut, so the sums are the same bits everywhere. Where squares would leave
//! the range in which f32 is exact enough, the piece is summed in f64 instead, by the same tree.

use std::ops::{AddAssign, Mul, RangeInclusive, Sub};

use crate::element::{Value, gather};

/// Sums of at most 256 squares that f32 holds well: far from overflow, and so far from underflow that terms lost there
/// do not count.
const SAFE: RangeInclusive<f32> = 1e-25..=1e30;

/// Partial sums side by side: one AVX-512 register, two of AVX2.
const LANES: usize = 16;

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
    /// Mean squared error; undefined for no elements.
    pub mse: Option<f64>,
    /// 10 log10(signal / noise) in dB; undefined without signal or without noise.
    pub sqnr_db: Option<f64>,
    /// Cosine of the angle between x and y; undefined if either is all zero.
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

    /// Adds a piece of at most a tile.
    #[inline(always)]
    pub(crate) fn add<V: Value>(&mut self, values: &[V], decoded: &[f32], saturated: u32) {
        let piece: Piece<f32> = sum(values, decoded);
        // A sum of exactly zero is exact where all its terms are zero, and they are where the greatest of them is.
        let exact = (SAFE.contains(&piece.signal) || piece.amax == 0.0)
            && (SAFE.contains(&piece.decoded) || piece.decoded == 0.0)
            && (SAFE.contains(&piece.noise) || piece.max_abs_error == 0.0);
        let (signal, squares, noise, product) = if exact {
            (f64::from(piece.signal), f64::from(piece.decoded), f64::from(piece.noise), f64::from(piece.product))
        } else {
            let wide: Piece<f64> = sum(values, decoded);
            (wide.signal, wide.decoded, wide.noise, wide.product)
        };
        *self = self.then(&Sums {
            elements: values.len() as u64,
            signal,
            decoded: squares,
            product,
            noise,
            max_abs_error: piece.max_abs_error,
            amax: piece.amax,
            saturated: u64::from(saturated),
        });
    }

    /// The metrics of these elements.
    pub fn metrics(&self) -> Metrics {
        let cosine = (self.signal > 0.0 && self.decoded > 0.0)
            .then(|| (self.product / (self.signal.sqrt() * self.decoded.sqrt())).clamp(-1.0, 1.0));
        Metrics {
            elements: self.elements,
            mse: (self.elements > 0).then(|| self.noise / self.elements as f64),
            // libm's log10 and not the C library's, whose last bit differs from machine to machine.
            sqnr_db: (self.signal > 0.0 && self.noise > 0.0).then(|| 10.0 * libm::log10(self.signal / self.noise)),
            cosine,
            max_abs_error: f64::from(self.max_abs_error),
            amax: f64::from(self.amax),
            saturated: self.saturated,
        }
    }
}

/// The sums of a piece in `T`.
struct Piece<T> {
    signal: T,
    decoded: T,
    noise: T,
    product: T,
    max_abs_error: f32,
    amax: f32,
}

/// Sums a piece: lane `i % 16` takes element `i`, and lanes fold as a binary tree.
///
/// Plain loops throughout: the standard library's array combinators do not inline into a function with target features.
#[inline(always)]
fn sum<T, V: Value>(values: &[V], decoded: &[f32]) -> Piece<T>
where
    T: From<f32> + Copy + Default + AddAssign + Mul<Output = T> + Sub<Output = T>,
{
    let mut lanes = [[T::default(); LANES]; 4];
    let mut greatest = [[0f32; LANES]; 2];
    let (value_chunks, value_rest) = values.as_chunks::<LANES>();
    let (decoded_chunks, decoded_rest) = decoded.as_chunks::<LANES>();
    for (x, y) in value_chunks.iter().zip(decoded_chunks) {
        let x = gather(x);
        for lane in 0..LANES {
            element(&mut lanes, &mut greatest, lane, x[lane], y[lane]);
        }
    }
    for lane in 0..value_rest.len().min(decoded_rest.len()) {
        element(&mut lanes, &mut greatest, lane, value_rest[lane].get(), decoded_rest[lane]);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            for sum in &mut lanes {
                let upper = sum[lane + width];
                sum[lane] += upper;
            }
            for most in &mut greatest {
                most[lane] = greater(most[lane], most[lane + width]);
            }
        }
        width /= 2;
    }
    let [signal, decoded, noise, product] = lanes;
    let [errors, magnitudes] = greatest;
    Piece {
        signal: signal[0],
        decoded: decoded[0],
        noise: noise[0],
        product: product[0],
        max_abs_error: errors[0],
        amax: magnitudes[0],
    }
}

#[inline(always)]
fn element<T>(lanes: &mut [[T; LANES]; 4], greatest: &mut [[f32; LANES]; 2], lane: usize, x: f32, y: f32)
where
    T: From<f32> + Copy + AddAssign + Mul<Output = T> + Sub<Output = T>,
{
    greatest[0][lane] = greater((x - y).abs(), greatest[0][lane]);
    greatest[1][lane] = greater(x.abs(), greatest[1][lane]);
    let (x, y) = (T::from(x), T::from(y));
    let error = x - y;
    lanes[0][lane] += x * x;
    lanes[1][lane] += y * y;
    lanes[2][lane] += error * error;
    lanes[3][lane] += x * y;
}

/// One instruction, which f32::max with its rule for NaN is not.
#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_within_a_millionth_of_exact_at_every_magnitude() {
        for exponent in [-149, -126, -100, -60, -20, 0, 20, 60, 100, 120] {
            let unit = 2f64.powi(exponent);
            let value = |i: usize| ((i as f64 * 0.618_034).fract() * 100.0 - 50.0) * unit;
            let values: Vec<f32> = (0..256).map(|i| value(i) as f32).collect();
            let decoded: Vec<f32> = values.iter().map(|x| ((f64::from(*x) / unit).round() * unit) as f32).collect();
            let mut sums = Sums::default();
            sums.add(&values, &decoded, 0);
            let sum = |f: fn(f64, f64) -> f64| -> f64 {
                values.iter().zip(&decoded).map(|(x, y)| f(f64::from(*x), f64::from(*y))).sum()
            };
            let close = |got: f64, expected: f64| (got - expected).abs() <= 1e-6 * expected.abs();
            assert!(close(sums.signal, sum(|x, _| x * x)), "{exponent}: {sums:?}");
            assert!(close(sums.decoded, sum(|_, y| y * y)), "{exponent}");
            assert!(close(sums.product, sum(|x, y| x * y)), "{exponent}");
            assert!(close(sums.noise, sum(|x, y| (x - y) * (x - y))), "{exponent}");
        }
    }

    #[test]
    fn an_error_far_below_the_signal_is_not_lost() {
        let mut sums = Sums::default();
        sums.add(&[1.0, 1e-30], &[1.0, 0.0], 0);
        assert!((sums.noise / 1e-60 - 1.0).abs() < 1e-6);
        assert!(sums.metrics().sqnr_db.is_some_and(|db| (db - 600.0).abs() < 1e-3));
    }

    #[test]
    fn undefined_metrics_are_none_and_never_nan() {
        let zeros = {
            let mut s = Sums::default();
            s.add(&[0.0; 5], &[0.0; 5], 0);
            s.metrics()
        };
        assert_eq!((zeros.mse, zeros.sqnr_db, zeros.cosine), (Some(0.0), None, None));
        let none = Sums::default().metrics();
        assert_eq!((none.mse, none.sqnr_db, none.cosine), (None, None, None));
    }
}
