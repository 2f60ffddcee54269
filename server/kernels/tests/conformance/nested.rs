//! Scales that are quantized too: codes are those of the magnitudes, and what they lose is told by the scales.

use proptest::prelude::*;
use quarrel_kernels::{
    Arith, Codebook, Coded, Codes, Decoded, Dtype, Format, Grid, Importance, Level, Part, Scaling, Sums, dequantize,
    packed_bytes, quantize,
};

use crate::asked;

const GROUP: usize = 32;

fn quantized(level: Level, format: Format, values: &[f32], grid: Grid<'_>) -> (Vec<u8>, Sums) {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let importance = Importance::NONE;
    let part = Part { dtype: Dtype::F32, bytes: &bytes, column: 0, group: GROUP, ahead: &[], importance };
    let mut codes = vec![0; packed_bytes(format.codes, values.len())];
    let sums = quantize(level, format, Arith::F32, &part, grid, &mut codes);
    (codes, sums)
}

proptest! {
    #![proptest_config(asked::cases(64))]

    #[test]
    fn codes_are_of_magnitudes_and_mean_what_scales_say(
        groups in prop::collection::vec((prop::collection::vec(-1f32..1.0, GROUP), 0.001f32..8.0, -0.01f32..8.0), 1..20),
        book in prop::sample::select(vec![Codebook::Nf4, Codebook::Fp4]),
    ) {
        let values: Vec<f32> = groups.iter().flat_map(|(values, by, _)| values.iter().map(move |value| value * by)).collect();
        let magnitudes: Vec<f32> =
            values.chunks(GROUP).map(|group| group.iter().fold(0f32, |most, value| most.max(value.abs()))).collect();
        let scales: Vec<f32> = groups.iter().map(|(_, _, scale)| *scale).collect();
        let codes = Codes::Codebook(book);
        let plain = Format { codes, scaling: Scaling::Absmax };
        let by_magnitudes = Grid { scales: &magnitudes, magnitudes: &[], zero_points: &[], global: 1.0 };
        let (expected, _) = quantized(asked::scalar(), plain, &values, by_magnitudes);
        let grid = Grid { scales: &scales, magnitudes: &magnitudes, ..by_magnitudes };
        let mut decoded = vec![0; values.len() * 4];
        let coded = Coded { codes, packed: &expected, column: 0, group: GROUP, grid };
        dequantize(asked::scalar(), &coded, Decoded::F32, &mut decoded);
        let decoded = decoded.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        let worst = values.iter().zip(decoded).fold(0f32, |most, (value, decoded)| most.max((value - decoded).abs()));
        let (_, all) = quantized(asked::scalar(), Format { codes, scaling: Scaling::Nested }, &values, grid);
        for level in asked::levels() {
            let (found, sums) = quantized(*level, Format { codes, scaling: Scaling::Nested }, &values, grid);
            prop_assert_eq!(&found, &expected, "{:?}", level);
            prop_assert_eq!(sums.metrics().max_abs_error, f64::from(worst), "{:?}", level);
            prop_assert_eq!(sums.metrics(), all.metrics(), "{:?}", level);
        }
    }
}
