//! ggml's blocks: the same bits at every level, however a channel is cut, and nothing outside the buffers. That they are ggml's own is held by
//! `tests/golden/test_ggml.py`.

use quarrel_kernels::{
    Arith, Block, Coded, Codes, Decoded, Dtype, Format, Grid, Importance, Level, Part, Scaling, Sums, dequantize,
    encode, mean_square, packed_bytes, quantize,
};

use crate::{
    asked,
    channel::Places,
    data::{numbers, store},
    oracle,
    place::Place,
};

const GRID: Grid<'static> = Grid { scales: &[], magnitudes: &[], zero_points: &[], global: 1.0 };

#[derive(Debug, PartialEq)]
struct Outcome {
    blocks: Vec<u8>,
    /// Nothing where a scale is beyond f16: then they are not numbers.
    sums: Option<Sums>,
    /// In f32, bf16 and f16; so too.
    values: Option<[Vec<u8>; 3]>,
}

/// The whole way of a part's elements.
fn channel(level: Level, block: Block, dtype: Dtype, bytes: &[u8], places: Places) -> Outcome {
    by_importance(level, block, dtype, bytes, Importance::NONE, places)
}

fn by_importance(
    level: Level,
    block: Block,
    dtype: Dtype,
    bytes: &[u8],
    importance: Importance<'_>,
    places: Places,
) -> Outcome {
    let format = Format { codes: Codes::Block(block), scaling: Scaling::InBlocks };
    let columns = bytes.len() / dtype.bytes();
    let input = places.input.holding(bytes, 0x11);
    let part = Part { dtype, bytes: &input, column: 0, group: block.elements(), ahead: &input, importance };
    // Filled with different bits, so that a byte that is not written shows.
    let mut blocks = places.packed.room(packed_bytes(format.codes, columns), 0xaa);
    let mut encoded = places.packed.room(packed_bytes(format.codes, columns), 0x55);
    let sums = quantize(level, format, Arith::F32, &part, GRID, &mut blocks);
    encode(level, format, &part, GRID, &mut encoded);
    assert_eq!(blocks[..], encoded[..], "{block:?} measured and not");
    let coded = Coded { codes: format.codes, packed: &blocks, column: 0, group: block.elements(), grid: GRID };
    let values = [Decoded::F32, Decoded::Bf16, Decoded::F16].map(|decoded| {
        let mut values = places.decoded.room(columns * decoded.bytes(), 0xcc);
        dequantize(level, &coded, decoded, &mut values);
        values.to_vec()
    });
    let is_number = block.first_overflow(&blocks).is_none();
    Outcome { blocks: blocks.to_vec(), sums: is_number.then_some(sums), values: is_number.then_some(values) }
}

/// Whole blocks around the ends of tiles, and of the two tiles that are searched at once.
fn lengths(block: Block) -> impl Iterator<Item = usize> {
    (0..=40).map(move |blocks| blocks * block.elements()).filter(|columns| *columns <= 2_304)
}

/// Any bytes are a block; the same everywhere.
fn any_blocks(block: Block, count: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    std::iter::repeat_with(next).take(count * block.bytes()).collect()
}

/// Numbers below and beyond what blocks hold make quotients and sums that are none, which valgrind compares otherwise than a CPU.
fn is_tried(seed: usize) -> bool {
    !(asked::is_quick() && [4, 5, 9].contains(&(seed % 10)))
}

#[test]
fn every_level_gives_the_bits_of_the_scalar_one() {
    for (turn, block) in Block::ALL.into_iter().enumerate() {
        for (index, columns) in lengths(block).enumerate() {
            for (of, dtype) in Dtype::ALL.into_iter().enumerate() {
                if !is_tried(index + of + turn) {
                    continue;
                }
                let bytes = store(dtype, &numbers(columns, index + of + turn));
                let scalar = channel(asked::scalar(), block, dtype, &bytes, Places::OWN);
                for level in asked::levels() {
                    // Each buffer meets each alignment in turn.
                    let places = Places {
                        input: Place::Shifted((index * 7 + of) % 64),
                        packed: Place::Shifted((index * 5 + turn) % 64),
                        ..Places::OWN
                    };
                    let found = channel(*level, block, dtype, &bytes, places);
                    assert!(found == scalar, "{block:?}, {columns} columns of {dtype:?}, {level:?}");
                }
            }
        }
    }
}

#[test]
fn every_level_goes_by_importance_as_the_scalar_one_does() {
    for (turn, block) in Block::ALL.into_iter().filter(|block| block.takes_importance()).enumerate() {
        for (index, columns) in lengths(block).enumerate() {
            let dtype = Dtype::ALL[(index + turn) % Dtype::ALL.len()];
            if !is_tried(index + turn) || !is_tried(index + turn + 1) {
                continue;
            }
            let bytes = store(dtype, &numbers(columns, index + turn));
            // Some columns count for nothing.
            let counts: Vec<f32> = numbers(columns, index + turn + 1).into_iter().map(|x| x.abs().min(1e9)).collect();
            let importance = Importance { columns: &counts, mean_square: mean_square(dtype, &bytes) };
            let outcome = |level, places| by_importance(level, block, dtype, &bytes, importance, places);
            let scalar = outcome(asked::scalar(), Places::OWN);
            for level in asked::levels() {
                let places = Places { input: Place::Shifted((index * 7 + turn) % 64), ..Places::OWN };
                assert!(outcome(*level, places) == scalar, "{block:?}, {columns} columns of {dtype:?}, {level:?}");
            }
        }
    }
}

#[test]
fn any_bytes_decode_to_the_same_values_at_every_level() {
    for (turn, block) in Block::ALL.into_iter().enumerate() {
        for count in 1..=9 {
            let bytes = any_blocks(block, count, (turn * 10 + count) as u32);
            let decode = |level: Level, decoded: Decoded| {
                let mut values = vec![0xcc; count * block.elements() * decoded.bytes()];
                let codes = Codes::Block(block);
                let coded = Coded { codes, packed: &bytes, column: 0, group: block.elements(), grid: GRID };
                dequantize(level, &coded, decoded, &mut values);
                values
            };
            for decoded in [Decoded::F32, Decoded::Bf16, Decoded::F16] {
                let scalar = decode(asked::scalar(), decoded);
                for level in asked::levels() {
                    let found = decode(*level, decoded);
                    // NaN is one value, whatever its bits.
                    let same = found == scalar || decoded != Decoded::Bf16 && alike(&found, &scalar, decoded);
                    assert!(same, "{block:?}, {count} blocks, {level:?}, {decoded:?}");
                }
            }
        }
    }
}

fn alike(found: &[u8], expected: &[u8], decoded: Decoded) -> bool {
    let dtype = if decoded == Decoded::F32 { Dtype::F32 } else { Dtype::F16 };
    let (found, expected) = (oracle::read(dtype, found), oracle::read(dtype, expected));
    found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

#[test]
fn blocks_do_not_depend_on_what_lies_beside_them() {
    for (turn, block) in Block::ALL.into_iter().enumerate() {
        let columns = 9 * 256;
        for kind in 0..10 {
            let bytes = store(Dtype::F32, &numbers(columns, kind + 10 * turn));
            let whole = channel(asked::scalar(), block, Dtype::F32, &bytes, Places::OWN);
            let level = asked::levels()[kind % asked::levels().len()];
            let mut sums = Sums::default();
            // Cut at tiles, as the engine may.
            let mut blocks = Vec::new();
            for part in bytes.chunks(256 * 4) {
                let found = channel(level, block, Dtype::F32, part, Places::OWN);
                sums = sums.then(&found.sums.unwrap_or_default());
                blocks.extend(found.blocks);
            }
            assert!(blocks == whole.blocks, "{block:?}, numbers of kind {kind}");
            let whole = whole.sums.unwrap_or(sums);
            assert!(sums == whole, "{block:?}, numbers of kind {kind}: {sums:?} instead of {whole:?}");
        }
    }
}

#[test]
fn what_is_measured_is_what_is_decoded() {
    for (turn, block) in Block::ALL.into_iter().enumerate() {
        for kind in 0..10 {
            let values = numbers(5 * 256, kind + 10 * turn);
            let bytes = store(Dtype::F32, &values);
            let found = channel(asked::levels()[0], block, Dtype::F32, &bytes, Places::OWN);
            let (Some(sums), Some([decoded, ..])) = (found.sums, found.values) else { continue };
            let decoded = oracle::read(Dtype::F32, &decoded);
            let pairs = || values.iter().zip(&decoded);
            let worst = pairs().map(|(x, y)| (x - y).abs()).fold(0f32, f32::max);
            assert_eq!(sums.max_abs_error, worst, "{block:?}, numbers of kind {kind}");
            let sum = |of: fn(f64, f64) -> f64| pairs().map(|(x, y)| of(f64::from(*x), f64::from(*y))).sum::<f64>();
            let close = |got: f64, expected: f64| (got - expected).abs() <= 2e-6 * expected.abs();
            assert!(close(sums.signal, sum(|x, _| x * x)), "{block:?}, kind {kind}");
            assert!(close(sums.noise, sum(|x, y| (x - y) * (x - y))), "{block:?}, kind {kind}");
            assert!(close(sums.decoded, sum(|_, y| y * y)), "{block:?}, kind {kind}");
        }
    }
}

#[cfg(unix)]
#[test]
fn quantizing_and_back_stays_within_its_buffers() {
    for (turn, block) in Block::ALL.into_iter().enumerate() {
        for (index, columns) in lengths(block).enumerate() {
            let dtype = Dtype::ALL[(index + turn) % 6];
            let bytes = store(dtype, &numbers(columns, 1));
            let own = channel(asked::scalar(), block, dtype, &bytes, Places::OWN);
            for (level, end) in
                asked::levels().iter().flat_map(|level| [Place::BeforeGuard, Place::AfterGuard].map(|end| (level, end)))
            {
                let found = channel(*level, block, dtype, &bytes, Places::all(end));
                assert!(found == own, "{block:?}, {columns} columns of {dtype:?}, {level:?}, {end:?}");
            }
        }
    }
}

#[test]
fn a_scale_beyond_f16_is_seen() {
    for block in Block::ALL {
        let values: Vec<f32> = numbers(256, 1).iter().map(|value| value * 1e9).collect();
        let found = channel(asked::scalar(), block, Dtype::F32, &store(Dtype::F32, &values), Places::OWN);
        let has_f16 = !matches!(block, Block::Mxfp4 | Block::Nvfp4);
        assert_eq!(block.first_overflow(&found.blocks), has_f16.then_some(0), "{block:?}");
    }
}

#[test]
#[should_panic(expected = "33 elements in blocks of 32")]
fn a_part_of_a_block_is_refused() {
    channel(asked::scalar(), Block::Q8_0, Dtype::F32, &[0; 33 * 4], Places::OWN);
}
