//! Two readings of the same weights, compared: what `metrics` says, of values that were not made here.

use quarrel_kernels::{Decoded, Dtype, Level, Metrics, Sums, convert};

/// Sums over elements and what they are elsewhere.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Compared(Sums);

impl Compared {
    /// Adds as many elements as there are: f32, little-endian, of both. In f64, in their order.
    pub fn add(&mut self, values: &[u8], others: &[u8]) {
        let mut sums = self.0;
        for (value, other) in values.as_chunks().0.iter().zip(others.as_chunks().0) {
            let (value, other) = (f32::from_le_bytes(*value), f32::from_le_bytes(*other));
            let (x, y) = (f64::from(value), f64::from(other));
            sums.elements += 1;
            sums.signal += x * x;
            sums.decoded += y * y;
            sums.product += x * y;
            sums.noise += (x - y) * (x - y);
            sums.max_abs_error = sums.max_abs_error.max((value - other).abs());
            sums.amax = sums.amax.max(value.abs());
        }
        self.0 = sums;
    }

    /// What follows from them; undefined where a number is none or infinite.
    pub fn metrics(&self) -> Metrics {
        self.0.metrics()
    }
}

/// Elements of the type that the wire calls `dtype`, as f32; none for a word that is none of its.
pub fn to_f32(level: Level, dtype: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    let dtype = Dtype::named(dtype)?;
    let mut out = vec![0; bytes.len() / dtype.bytes() * 4];
    convert(level, dtype, bytes, Decoded::F32, &mut out);
    Some(out)
}
