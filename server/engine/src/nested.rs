//! Scales that are quantized themselves: bitsandbytes' double quantization.
//!
//! Source: bitsandbytes 0.50, `functional.py::quantize_4bit` with `compress_statistics`, `create_dynamic_map`, and
//! `backends/default/ops.py::quantize_blockwise`. Held bit for bit by tests/golden.

/// Magnitudes that share one of their own.
pub const NESTED_BLOCK: usize = 256;

/// What a byte stands for, times its block's greatest magnitude: rising. A mantissa that is the longer the greater the number.
pub static NESTED_VALUES: [f32; 256] = values();

/// Half-way between two of them; of these the lower has the byte.
static MIDDLES: [f32; 255] = middles();

/// A layer's greatest magnitudes, a byte each: their distances from their mean.
#[derive(Debug, Clone, PartialEq)]
pub struct Nested {
    /// Indices into [`NESTED_VALUES`], one a magnitude.
    pub codes: Vec<u8>,
    /// The greatest distance of each [`NESTED_BLOCK`]; the last may be of fewer.
    pub absmax: Vec<f32>,
    /// The mean: of the sum in f64, in order. torch's own depends on its number of threads.
    pub offset: f32,
}

impl Nested {
    /// Of finite magnitudes.
    pub fn of(magnitudes: &[f32]) -> Nested {
        let sum = magnitudes.iter().fold(0.0, |sum, magnitude| sum + f64::from(*magnitude));
        let offset = if magnitudes.is_empty() { 0.0 } else { (sum / magnitudes.len() as f64) as f32 };
        let mut nested = Nested { codes: Vec::with_capacity(magnitudes.len()), absmax: Vec::new(), offset };
        for block in magnitudes.chunks(NESTED_BLOCK) {
            let amax = block.iter().fold(0f32, |most, magnitude| most.max((magnitude - offset).abs()));
            let code = |unit: f32| MIDDLES.partition_point(|middle| *middle < unit.clamp(-1.0, 1.0)) as u8;
            // A last block of fewer is divided by its magnitude, which is stored as no less than that.
            let (is_whole, least) = (block.len() == NESTED_BLOCK, amax.max(1e-38));
            let by = 1.0 / least;
            nested.absmax.push(if is_whole { amax } else { least });
            nested.codes.extend(block.iter().map(|magnitude| match is_whole {
                true => code((magnitude - offset) * by),
                false => code((magnitude - offset) / least),
            }));
        }
        nested
    }

    /// The magnitudes that they stand for: near 0 they may be below it.
    pub fn magnitudes(&self) -> impl Iterator<Item = f32> {
        decoded(&self.codes, self.absmax.iter().copied(), self.offset, &NESTED_VALUES)
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.absmax.len() * 4 + 4
    }

    /// Bits that stand beside the bytes of so many magnitudes.
    pub fn bits_beside(magnitudes: usize) -> usize {
        (magnitudes.div_ceil(NESTED_BLOCK) + 1) * 32
    }
}

/// The scales that such bytes stand for, under greatest distances as they are stored, little-endian; each byte by one of 256 values.
pub fn decoded_scales(codes: &[u8], absmax: &[u8], offset: f32, values: &[f32]) -> Vec<f32> {
    decoded(codes, absmax.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)), offset, values).collect()
}

fn decoded(codes: &[u8], absmax: impl Iterator<Item = f32>, offset: f32, values: &[f32]) -> impl Iterator<Item = f32> {
    let blocks = codes.chunks(NESTED_BLOCK).zip(absmax);
    blocks.flat_map(move |(codes, absmax)| codes.iter().map(move |code| values[usize::from(*code)] * absmax + offset))
}

/// Of each power of ten from 10^-6 to 1, so many parts of 0.1..1: the middles of each, below and above 0; then 0 and 1.
const fn values() -> [f32; 256] {
    const POWERS: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut values = [0.0; 256];
    let (mut power, mut rank) = (0, 0);
    while power < POWERS.len() {
        let parts = 1 << power;
        let mut part = 0;
        while part < parts {
            let middle = (bound(part, parts) + bound(part + 1, parts)) / 2.0;
            let value = POWERS[power] * middle;
            // 127 below 0, of which the last is the least; 0; as many above, and 1.
            values[126 - rank] = -value;
            values[128 + rank] = value;
            rank += 1;
            part += 1;
        }
        power += 1;
    }
    values[255] = 1.0;
    values
}

/// The bounds of so many equal parts of 0.1..1, as torch computes them: from the nearer end, and rounded once, as on every CPU with FMA; on others
/// 42 of its values are neighbours of these.
const fn bound(at: usize, parts: usize) -> f32 {
    // In f64 nothing is rounded.
    let (first, step) = (0.1f32 as f64, ((1.0f32 - 0.1) / parts as f32) as f64);
    (if at < parts.div_ceil(2) { first + step * at as f64 } else { 1.0 - step * (parts - at) as f64 }) as f32
}

const fn middles() -> [f32; 255] {
    let (values, mut middles, mut at) = (values(), [0.0; 255], 0);
    while at < 255 {
        middles[at] = (values[at] + values[at + 1]) / 2.0;
        at += 1;
    }
    middles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_rise_and_have_codes_of_their_own() {
        assert!(NESTED_VALUES.is_sorted_by(|low, high| low < high));
        assert_eq!((NESTED_VALUES[127], NESTED_VALUES[255]), (0.0, 1.0));
        for (code, value) in NESTED_VALUES.iter().enumerate() {
            assert_eq!(MIDDLES.partition_point(|middle| middle < value), code);
        }
    }

    #[test]
    fn what_they_stand_for_is_near() {
        let magnitudes = Vec::from_iter((0..1000).map(|at| 0.01 + f32::from(at as i16 % 97) * 1e-4));
        let nested = Nested::of(&magnitudes);
        for (found, magnitude) in nested.magnitudes().zip(&magnitudes) {
            assert!((found - magnitude).abs() < 1e-4, "{found} {magnitude}");
        }
        let equal = Nested::of(&[0.5; 300]);
        assert!(equal.magnitudes().eq([0.5; 300]));
        assert_eq!(equal.absmax, [0.0, 1e-38]);
        assert_eq!(Nested::of(&[]), Nested { codes: vec![], absmax: vec![], offset: 0.0 });
    }
}
