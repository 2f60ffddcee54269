//! How fast the kernels are on one core: 4096 x 4096 weights, output buffers warm, the best of many rounds, beside the C
//! library's memcpy in the same rounds. One JSON object a line; `make bench-kernels` reads them and puts the peers beside.
//!
//! The way of a channel is the engine's: ranges, scales, codes, while the channel is in the cache.

#![allow(clippy::unwrap_used, reason = "a benchmark's own arguments")]

use std::{hint::black_box, time::Instant};

use quarrel_kernels::{
    Arith, Block, Codebook, Coded, Codes, Decoded, Dtype, Format, Grid, Importance, Level, MxRule, Packing, Part,
    Qparams, Range, Scaler, Scaling, Search, dequantize, encode, errors, global_scale, mean_square, packed_bytes,
    quantize, ranges,
};

const SIDE: usize = 4096;
const COPIED: usize = 64 << 20;

/// A format as the engine lays it over a layer.
#[derive(Clone, Copy)]
struct Laid {
    name: &'static str,
    format: Format,
    /// Columns that share a scale.
    group: usize,
    /// Channels that do.
    height: usize,
    /// Whether columns have an importance.
    by_importance: bool,
    /// How scales are looked for.
    search: Option<Search>,
}

fn formats() -> Vec<Laid> {
    let laid = |name, codes, scaling, group, height| {
        let format = Format { codes, scaling };
        Laid { name, format, group, height, by_importance: false, search: None }
    };
    let int = |name, bits, symmetric, packing, group| {
        laid(name, Codes::Int { bits, symmetric, packing }, Scaling::Weights, group, 1)
    };
    let fp8 = |name, group, height| laid(name, Codes::Fp8E4m3, Scaling::Weights, group, height);
    let mx = |name, codes| laid(name, codes, Scaling::E8m0(MxRule::Even), 32, 1);
    // Blocks hold their own scales: of each channel, only whether it is finite is looked for before.
    let blocks = Block::ALL.map(|block| laid(block.name(), Codes::Block(block), Scaling::InBlocks, SIDE, 1));
    let mut formats = vec![
        int("W8A8", 8, true, Packing::Plain, SIDE),
        int("W8A16", 8, true, Packing::Dense, 128),
        int("W4A16", 4, true, Packing::Dense, 128),
        int("W4A16_ASYM", 4, false, Packing::Dense, 128),
        fp8("FP8_DYNAMIC", SIDE, 1),
        fp8("FP8_BLOCK", 128, 128),
        laid("NVFP4A16", Codes::Fp4E2m1, Scaling::E4m3, 16, SIDE),
        mx("MXFP4A16", Codes::Fp4E2m1),
        mx("MXFP6A16", Codes::Fp6E2m3),
        mx("MXFP8A16", Codes::Fp8E4m3),
        laid("nf4", Codes::Codebook(Codebook::Nf4), Scaling::Absmax, 64, 1),
        laid("fp4", Codes::Codebook(Codebook::Fp4), Scaling::Absmax, 64, 1),
        laid("int8_rowwise", Codes::Rowwise, Scaling::Absmax, SIDE, 1),
        int("int2", 2, true, Packing::Dense, SIDE),
        int("int3", 3, true, Packing::Dense, SIDE),
        int("int4", 4, true, Packing::Dense, SIDE),
        int("int5", 5, true, Packing::Dense, SIDE),
        int("int6", 6, true, Packing::Dense, SIDE),
        int("int7", 7, true, Packing::Dense, SIDE),
        int("int8", 8, true, Packing::Plain, SIDE),
    ];
    let searched =
        |name, symmetric, search| Laid { search: Some(search), ..int(name, 4, symmetric, Packing::Dense, 64) };
    formats.push(searched("int4/g64;solver=mse", true, Search::Mse));
    formats.push(searched("int4-asym/g64;solver=mse", false, Search::Mse));
    formats.push(searched("int4/g64;solver=hqq", true, Search::Hqq));
    formats.push(searched("int4-asym/g64;solver=hqq", false, Search::Hqq));
    formats.extend(blocks);
    let weighed = BY_IMPORTANCE.map(|(name, block)| Laid {
        by_importance: true,
        ..laid(name, Codes::Block(block), Scaling::InBlocks, SIDE, 1)
    });
    formats.extend(weighed);
    formats
}

const BY_IMPORTANCE: [(&str, Block); 10] = [
    ("Q4_0+importance", Block::Q4_0),
    ("Q4_1+importance", Block::Q4_1),
    ("Q5_0+importance", Block::Q5_0),
    ("Q5_1+importance", Block::Q5_1),
    ("Q2_K+importance", Block::Q2K),
    ("Q3_K+importance", Block::Q3K),
    ("Q4_K+importance", Block::Q4K),
    ("Q5_K+importance", Block::Q5K),
    ("Q6_K+importance", Block::Q6K),
    ("IQ4_NL+importance", Block::Iq4Nl),
];

struct Asked {
    level: Level,
    /// Whether each round computes one and the same channel, which stays in the cache: what the work takes without memory.
    in_cache: bool,
    dtypes: Vec<Dtype>,
    formats: Vec<String>,
    rounds: usize,
}

/// Buffers of one format and element type, and the best times so far.
struct Bench<'a> {
    laid: Laid,
    dtype: Dtype,
    weights: &'a [u8],
    found: Vec<Range>,
    scales: Vec<f32>,
    zero_points: Vec<i32>,
    global: f32,
    packed: Vec<u8>,
    values: Vec<u8>,
    best: [f64; 3],
    importance: Vec<f32>,
    tried: Vec<Qparams>,
    errors: Vec<f64>,
    in_cache: bool,
}

const OPS: [&str; 3] = ["quantize", "quantize+metrics", "dequantize"];

fn main() {
    let asked = Asked::parse();
    let stored: Vec<(Dtype, Vec<u8>)> = asked.dtypes.iter().map(|dtype| (*dtype, weights(*dtype))).collect();
    let mut benches: Vec<Bench<'_>> = Vec::new();
    for (dtype, weights) in &stored {
        for format in formats() {
            if asked.formats.is_empty() || asked.formats.iter().any(|name| name == format.name) {
                benches.push(Bench::new(format, *dtype, weights, asked.in_cache));
            }
        }
    }
    let (from, mut to) = (vec![1u8; COPIED], vec![2u8; COPIED]);
    let mut copy = f64::INFINITY;
    for _ in 0..asked.rounds {
        copy = copy.min(timed(|| black_box(&mut to).copy_from_slice(black_box(&from))));
        for bench in &mut benches {
            bench.round(asked.level);
        }
        copy = copy.min(timed(|| black_box(&mut to).copy_from_slice(black_box(&from))));
    }
    let level = asked.level.name();
    line("memcpy", "copy", "u8", level, copy, COPIED, COPIED, COPIED);
    for bench in &benches {
        let (weights, codes, values) = (bench.weights.len(), bench.packed.len(), bench.values.len());
        for (op, seconds) in OPS.iter().zip(bench.best) {
            if *op == "dequantize" && (bench.laid.by_importance || bench.laid.search.is_some()) {
                // The same as without.
                continue;
            }
            let (bytes_in, bytes_out) = if *op == "dequantize" { (codes, values) } else { (weights, codes) };
            line(bench.laid.name, op, bench.dtype.name(), level, seconds, SIDE * SIDE, bytes_in, bytes_out);
        }
    }
}

#[allow(clippy::too_many_arguments, reason = "the fields of a line, in order")]
fn line(
    format: &str,
    op: &str,
    dtype: &str,
    level: &str,
    seconds: f64,
    elements: usize,
    bytes_in: usize,
    bytes_out: usize,
) {
    println!(
        r#"{{"format": "{format}", "op": "{op}", "dtype": "{dtype}", "level": "{level}", "seconds": {seconds:.9}, "elements": {elements}, "bytes_in": {bytes_in}, "bytes_out": {bytes_out}}}"#
    );
}

fn timed(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

impl Asked {
    fn parse() -> Asked {
        let mut asked =
            Asked { level: Level::detect(), in_cache: false, dtypes: Vec::new(), formats: Vec::new(), rounds: 5 };
        // Cargo says `--bench` to every benchmark.
        let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
        while let Some(word) = words.next() {
            if word == "--in-cache" {
                asked.in_cache = true;
                continue;
            }
            let value = words.next().unwrap_or_else(|| panic!("`{word}` needs a value"));
            match word.as_str() {
                "--level" => asked.level = Level::named(&value).unwrap(),
                "--dtype" => asked.dtypes.push(Dtype::named(&value).unwrap()),
                "--format" => asked.formats.push(value),
                "--rounds" => asked.rounds = value.parse().unwrap(),
                _ => panic!("unknown argument `{word}`: expected --level, --dtype, --format, --rounds or --in-cache"),
            }
        }
        if asked.dtypes.is_empty() {
            asked.dtypes = vec![Dtype::F32, Dtype::Bf16];
        }
        asked
    }
}

/// Nearly normal numbers, the same in every run, as bytes of a type.
fn weights(dtype: Dtype) -> Vec<u8> {
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 24) as f32 - 0.5
    };
    let mut values = Vec::with_capacity(SIDE * SIDE * dtype.bytes());
    for _ in 0..SIDE * SIDE {
        let value = (uniform() + uniform() + uniform() + uniform()) * 0.05;
        match dtype {
            Dtype::F32 => values.extend(value.to_le_bytes()),
            Dtype::Bf16 => values.extend(half::bf16::from_f32(value).to_le_bytes()),
            Dtype::F16 => values.extend(half::f16::from_f32(value).to_le_bytes()),
            Dtype::F64 | Dtype::F8E4m3 | Dtype::F8E5m2 => panic!("expected f32, bf16 or f16"),
        }
    }
    values
}

impl<'a> Bench<'a> {
    fn new(laid: Laid, dtype: Dtype, weights: &'a [u8], in_cache: bool) -> Bench<'a> {
        let height = if laid.format.scaling == Scaling::E4m3 { 1 } else { laid.height };
        let scales = SIDE.div_ceil(height) * SIDE.div_ceil(laid.group);
        Bench {
            laid,
            dtype,
            weights,
            found: vec![Range::default(); scales],
            scales: vec![1.0; scales],
            zero_points: vec![0; scales],
            global: 1.0,
            packed: vec![1; SIDE * packed_bytes(laid.format.codes, SIDE)],
            values: vec![1; SIDE * SIDE * decoded(dtype).bytes()],
            best: [f64::INFINITY; 3],
            importance: (0..SIDE).map(|column| (column % 61) as f32 * 0.1).collect(),
            tried: Vec::new(),
            errors: Vec::new(),
            in_cache,
        }
    }

    fn round(&mut self, level: Level) {
        for op in 0..OPS.len() {
            let seconds = timed(|| match op {
                0 => self.quantize(level, Measuring::No),
                1 => self.quantize(level, Measuring::Yes),
                _ => self.dequantize(level),
            });
            self.best[op] = self.best[op].min(seconds);
        }
    }

    /// Where in memory each channel lies.
    fn lies(&self) -> impl Fn(usize) -> usize + use<> {
        let in_cache = self.in_cache;
        move |channel| if in_cache { 0 } else { channel }
    }

    /// Span by span: the ranges of its channels, then its scales, then the codes of its channels.
    fn quantize(&mut self, level: Level, measuring: Measuring) {
        let Laid { format, group, height, .. } = self.laid;
        let groups = SIDE.div_ceil(group);
        // Under a global scale, each channel has scales of its own all the same.
        let shared = if format.scaling == Scaling::E4m3 { 1 } else { height };
        let channel_bytes = SIDE * self.dtype.bytes();
        let packed_bytes = packed_bytes(format.codes, SIDE);
        let (weights, dtype) = (self.weights, self.dtype);
        let lies = self.lies();
        let part = |channel: usize| {
            let (bytes, ahead) = weights[lies(channel) * channel_bytes..].split_at(channel_bytes);
            let ahead = &ahead[..ahead.len().min(channel_bytes)];
            Part { dtype, bytes, column: 0, group, ahead, importance: Importance::NONE }
        };
        let slots = |channel: usize| channel / shared * groups..(channel / shared + 1) * groups;
        self.found.fill(Range::default());
        for first in (0..SIDE).step_by(height) {
            let channels = first..first + height;
            for channel in channels.clone() {
                ranges(level, format.codes, &part(channel), &mut self.found[slots(channel)]);
            }
            let slots_of_span = slots(first).start..slots(first + height - 1).end;
            if format.scaling == Scaling::E4m3 {
                let amax = self.found[slots_of_span.clone()].iter().fold(0f32, |most, range| most.max(range.amax()));
                self.global = global_scale(Arith::F32, dtype, format.codes, amax);
            }
            let zero_points =
                if format.codes.symmetric() { &mut [][..] } else { &mut self.zero_points[slots_of_span.clone()] };
            let scaler = Scaler { format, arith: Arith::F32, dtype, global: self.global };
            let found = &self.found[slots_of_span.clone()];
            scaler.write(level, found, &mut self.scales[slots_of_span.clone()], zero_points).unwrap();
            if let Some(search) = self.laid.search {
                let each = search.tried(format.codes);
                self.tried.resize(groups * each, Qparams { scale: 1.0, zero_point: 0 });
                for (range, tried) in found.iter().zip(self.tried.chunks_exact_mut(each)) {
                    search.write(level, scaler, *range, tried);
                }
                self.errors.clear();
                self.errors.resize(self.tried.len(), 0.0);
                errors(level, search, (format, Arith::F32), &part(first), &self.tried, &mut self.errors);
                let zero_points =
                    if format.codes.symmetric() { &mut [][..] } else { &mut self.zero_points[slots_of_span.clone()] };
                let scales = &mut self.scales[slots_of_span.clone()];
                search.choose(format.codes, &self.tried, &self.errors, scales, zero_points);
            }
            for channel in channels {
                let out = &mut self.packed[lies(channel) * packed_bytes..][..packed_bytes];
                let zero_points = if format.codes.symmetric() { &[][..] } else { &self.zero_points[slots(channel)] };
                let grid =
                    Grid { scales: &self.scales[slots(channel)], magnitudes: &[], zero_points, global: self.global };
                let mut part = part(channel);
                if self.laid.by_importance {
                    let mean_square = mean_square(dtype, part.bytes);
                    part.importance = Importance { columns: &self.importance, mean_square };
                }
                match measuring {
                    Measuring::Yes => {
                        black_box(quantize(level, format, Arith::F32, &part, grid, out));
                    }
                    Measuring::No => encode(level, format, &part, grid, out),
                }
            }
        }
    }

    fn dequantize(&mut self, level: Level) {
        let Laid { format, group, height, .. } = self.laid;
        let groups = SIDE.div_ceil(group);
        let shared = if format.scaling == Scaling::E4m3 { 1 } else { height };
        let packed_bytes = packed_bytes(format.codes, SIDE);
        let decoded = decoded(self.dtype);
        let lies = self.lies();
        for channel in 0..SIDE {
            let values = &mut self.values[lies(channel) * SIDE * decoded.bytes()..][..SIDE * decoded.bytes()];
            let slots = channel / shared * groups..(channel / shared + 1) * groups;
            let zero_points = if format.codes.symmetric() { &[][..] } else { &self.zero_points[slots.clone()] };
            let packed = &self.packed[lies(channel) * packed_bytes..][..packed_bytes];
            let grid = Grid { scales: &self.scales[slots], magnitudes: &[], zero_points, global: self.global };
            dequantize(level, &Coded { codes: format.codes, packed, column: 0, group, grid }, decoded, values);
        }
    }
}

#[derive(Clone, Copy)]
enum Measuring {
    Yes,
    No,
}

/// What codes of such weights are turned back into.
fn decoded(dtype: Dtype) -> Decoded {
    match dtype {
        Dtype::Bf16 => Decoded::Bf16,
        Dtype::F16 => Decoded::F16,
        Dtype::F32 | Dtype::F64 | Dtype::F8E4m3 | Dtype::F8E5m2 => Decoded::F32,
    }
}
