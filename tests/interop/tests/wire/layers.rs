//! Layers of f32, as batches; and what `int8` makes of them.

use std::sync::Arc;

use arrow_array::{
    ArrayRef, LargeListArray, ListArray, RecordBatch, StringArray,
    types::{Float32Type, Int64Type},
};

/// Least and greatest: with an absolute maximum of 127.5 the scale is 1, and the rest lie halfway between codes.
const TIES: [f32; 8] = [127.5, -127.5, 0.5, -0.5, 1.5, 2.5, -2.5, 126.5];

pub struct Layer {
    pub name: &'static str,
    /// Channels and columns.
    pub shape: [usize; 2],
    pub values: Vec<f32>,
}

/// What a layer becomes.
pub struct Coded {
    /// One for each channel.
    pub scales: Vec<f32>,
    pub codes: Vec<i8>,
}

impl Layer {
    /// A channel of zeros, one of ties, and others of numbers that are no two layers' alike.
    pub fn new(name: &'static str, shape: [usize; 2]) -> Layer {
        let [channels, columns] = shape;
        let mut state =
            name.bytes().fold(0x9e37_79b9_7f4a_7c15_u64, |state, byte| state.rotate_left(8) ^ u64::from(byte));
        let next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
        };
        let mut values = Vec::from_iter(std::iter::repeat_with(next).take(channels * columns));
        values[..2 * columns].fill(0.0);
        values[columns..columns + TIES.len()].copy_from_slice(&TIES);
        Layer { name, shape, values }
    }

    /// SPEC.md, section Numbers: symmetric, a scale for each channel, f32 stored as f32.
    pub fn int8(&self) -> Coded {
        let mut coded = Coded { scales: Vec::new(), codes: Vec::new() };
        for channel in self.values.chunks(self.shape[1]) {
            let absolute_maximum = channel.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            let scale = absolute_maximum / 127.5;
            let scale = if scale == 0.0 { f32::EPSILON } else { scale };
            let code = |value: &f32| (value / scale).clamp(-128.0, 127.0).round_ties_even() as i8;
            coded.codes.extend(channel.iter().map(code));
            coded.scales.push(scale);
        }
        coded
    }

    /// What the codes stand for.
    pub fn decoded(&self) -> Vec<f32> {
        let Coded { scales, codes } = self.int8();
        let channels = codes.chunks(self.shape[1]).zip(scales);
        channels.flat_map(|(codes, scale)| codes.iter().map(move |&code| f32::from(code) * scale)).collect()
    }
}

/// A row for each layer.
pub fn batch(layers: &[Layer]) -> RecordBatch {
    batch_with_names(layers, Arc::new(StringArray::from_iter_values(layers.iter().map(|layer| layer.name))))
}

/// The same, with a name column of the caller's making.
pub fn batch_with_names(layers: &[Layer], names: ArrayRef) -> RecordBatch {
    let weights = layers.iter().map(|layer| Some(layer.values.iter().copied().map(Some)));
    let weights = LargeListArray::from_iter_primitive::<Float32Type, _, _>(weights);
    let shapes = layers.iter().map(|layer| Some(layer.shape.map(|dimension| Some(dimension as i64))));
    let shapes = ListArray::from_iter_primitive::<Int64Type, _, _>(shapes);
    let columns: [(&str, ArrayRef); 3] =
        [("layer_name", names), ("weights", Arc::new(weights)), ("shape", Arc::new(shapes))];
    RecordBatch::try_from_iter(columns).unwrap()
}
