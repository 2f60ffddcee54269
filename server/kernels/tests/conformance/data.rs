//! What is tested: formats, groups, and numbers that are hard on them.

use half::{bf16, f16};
use proptest::{collection::vec, prelude::*};
use quarrel_kernels::{Arith, Codebook, Codes, Dtype, Format, MxRule, Packing, Scaling};

use crate::{
    channel::{Case, Grid},
    oracle,
};

/// Every format that a scheme has, and the kernels therefore.
///
/// A static, so that all its bytes are initialised: of a value made while running, those that a variant does not have are not,
/// and valgrind objects when compiled code looks at all of them at once.
pub static FORMATS: [Format; 30] = [
    int(2, true, Packing::Dense),
    int(2, false, Packing::Dense),
    int(3, true, Packing::Dense),
    int(3, false, Packing::Dense),
    int(4, true, Packing::Dense),
    int(4, false, Packing::Dense),
    int(5, true, Packing::Dense),
    int(5, false, Packing::Dense),
    int(6, true, Packing::Dense),
    int(6, false, Packing::Dense),
    int(7, true, Packing::Dense),
    int(7, false, Packing::Dense),
    int(8, true, Packing::Dense),
    int(8, false, Packing::Dense),
    int(8, true, Packing::Plain),
    int(8, false, Packing::Plain),
    Format { codes: Codes::Fp8E4m3, scaling: Scaling::Weights },
    Format { codes: Codes::Fp8E4m3, scaling: Scaling::E8m0(MxRule::Floor) },
    Format { codes: Codes::Fp8E4m3, scaling: Scaling::E8m0(MxRule::Rceil) },
    Format { codes: Codes::Fp8E4m3, scaling: Scaling::E8m0(MxRule::Even) },
    Format { codes: Codes::Fp6E2m3, scaling: Scaling::E8m0(MxRule::Floor) },
    Format { codes: Codes::Fp6E2m3, scaling: Scaling::E8m0(MxRule::Rceil) },
    Format { codes: Codes::Fp6E2m3, scaling: Scaling::E8m0(MxRule::Even) },
    Format { codes: Codes::Fp4E2m1, scaling: Scaling::E8m0(MxRule::Floor) },
    Format { codes: Codes::Fp4E2m1, scaling: Scaling::E8m0(MxRule::Rceil) },
    Format { codes: Codes::Fp4E2m1, scaling: Scaling::E8m0(MxRule::Even) },
    Format { codes: Codes::Fp4E2m1, scaling: Scaling::E4m3 },
    Format { codes: Codes::Codebook(Codebook::Nf4), scaling: Scaling::Absmax },
    Format { codes: Codes::Codebook(Codebook::Fp4), scaling: Scaling::Absmax },
    Format { codes: Codes::Rowwise, scaling: Scaling::Absmax },
];

const fn int(bits: u8, symmetric: bool, packing: Packing) -> Format {
    Format { codes: Codes::Int { bits, symmetric, packing }, scaling: Scaling::Weights }
}

pub const ARITHS: [Arith; 2] = [Arith::F32, Arith::WeightDtype];

/// Columns that share a scale: all, the usual ones, one that nothing divides, each its own, and more than there can be.
pub const GROUPS: [usize; 7] = [300, 128, 100, 32, 16, 1, usize::MAX];

/// Values as bytes of a type, each about the nearest that the type has, and finite.
pub fn store(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let each = |(index, value): (usize, &f32)| match dtype {
        Dtype::F32 => value.to_le_bytes().to_vec(),
        // With bits that f32 does not hold: below a half, a half, and above.
        Dtype::F64 => {
            let below = [0, 0x0fff_ffff, 0x1000_0000, 0x1000_0001][index % 4];
            let bits = f64::from(*value).to_bits();
            let fits = value.abs() < f32::MAX && value.abs() >= f32::MIN_POSITIVE;
            f64::from_bits(if fits { bits | below } else { bits }).to_le_bytes().to_vec()
        }
        Dtype::F16 => f16::from_f32_const(value.clamp(-65504.0, 65504.0)).to_le_bytes().to_vec(),
        Dtype::Bf16 => bf16::from_f32_const(value.clamp(-3.3895e38, 3.3895e38)).to_le_bytes().to_vec(),
        Dtype::F8E4m3 => {
            let code = oracle::Table::of(Codes::Fp8E4m3).unwrap().nearest(value.abs()) as u8;
            vec![if value.is_sign_negative() { code | 0x80 } else { code }]
        }
        Dtype::F8E5m2 => vec![f16::from_f32_const(value.clamp(-57344.0, 57344.0)).to_le_bytes()[1]],
    };
    values.iter().enumerate().flat_map(each).collect()
}

/// Numbers that look random and are the same everywhere: of one magnitude, of many, tied, tiny, huge, constant, with
/// an outlier, and with zeros of both signs; by `seed`.
pub fn numbers(len: usize, seed: usize) -> Vec<f32> {
    let mut state = (seed as u32).wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let each = |index: usize| match seed % 10 {
        0 | 1 => next() * next() * 3.0,
        2 => next() * 10f32.powi((index * 5 % 12) as i32 - 6),
        3 => (next() * 100.0).round() * 0.5,
        4 => next() * f32::MIN_POSITIVE,
        5 => next() * 1e38,
        6 => 0.371,
        7 => next() * if index % 97 == 41 { 1e5 } else { 1.0 },
        8 => [0.0, -0.0, next(), next() * 1e-20][index % 4],
        _ => next() * 1e-12,
    };
    (0..len).map(each).collect()
}

/// An element, before it is known in which format it will be hard.
#[derive(Debug, Clone, Copy)]
pub enum Element {
    /// Half-way between two neighbouring values of the codes, and so many steps of f32 from there.
    Tie(usize, i32),
    /// The largest or the smallest value of the codes, and so many steps of f32 from there.
    End(usize, i32),
    /// A multiple of the scale.
    Multiple(f32),
    /// As it is.
    Bits(f32),
}

impl Element {
    /// The element, for codes and a scale; always finite.
    pub fn value(self, codes: Codes, scale: f32, zero_point: i32) -> f32 {
        let values = oracle::values(codes);
        let scaled = |units: f64| ((units - f64::from(zero_point)) * f64::from(scale)) as f32;
        let value = match self {
            Element::Tie(index, steps) => {
                let index = index % (values.len() - 1);
                stepped(scaled((values[index] + values[index + 1]) / 2.0), steps)
            }
            Element::End(index, steps) => stepped(scaled(values[[0, values.len() - 1][index % 2]]), steps),
            Element::Multiple(units) => (f64::from(units) * f64::from(scale)) as f32,
            Element::Bits(value) => value,
        };
        value.clamp(-f32::MAX, f32::MAX)
    }
}

/// So many f32 up, or down.
pub fn stepped(value: f32, steps: i32) -> f32 {
    (0..steps.abs()).fold(value, |value, _| if steps > 0 { value.next_up() } else { value.next_down() })
}

/// Elements of a channel.
pub fn elements() -> impl Strategy<Value = Vec<Element>> {
    let tie = || (any::<usize>(), -3..=3).prop_map(|(index, steps)| Element::Tie(index, steps));
    let end = || (any::<usize>(), -3..=3).prop_map(|(index, steps)| Element::End(index, steps));
    let multiple = || (-300f32..300.0).prop_map(Element::Multiple);
    let magnitudes =
        || (-1f32..1.0, -6..6).prop_map(|(value, exponent)| Element::Multiple(value * 10f32.powi(exponent)));
    let zero = || prop_oneof![Just(Element::Bits(0.0)), Just(Element::Bits(-0.0))];
    let subnormal = || {
        (1u32..0x80_0000, any::<bool>())
            .prop_map(|(bits, negative)| Element::Bits(f32::from_bits(bits | if negative { 1 << 31 } else { 0 })))
    };
    let finite = || prop::num::f32::NORMAL.prop_map(Element::Bits);
    let huge = || prop_oneof![1e37f32..f32::MAX, -f32::MAX..-1e37, Just(f32::MAX), Just(-f32::MAX)];
    let one = move || {
        prop_oneof![
            6 => tie(), 2 => end(), 4 => multiple(), 2 => zero(), 1 => subnormal(), 1 => finite(),
            1 => huge().prop_map(Element::Bits),
        ]
    };
    let outlier = (vec((-1f32..1.0).prop_map(Element::Multiple), 1..300), any::<prop::sample::Index>(), 10f32..1e9)
        .prop_map(|(mut all, at, large)| {
            let at = at.index(all.len());
            all[at] = Element::Multiple(large);
            all
        });
    prop_oneof![
        3 => vec(one(), 0..300),
        2 => vec(prop_oneof![4 => tie(), 1 => zero(), 2 => end(), 2 => multiple()], 0..300),
        1 => vec(magnitudes(), 0..300),
        1 => vec(zero(), 0..300),
        1 => vec(subnormal(), 0..300),
        1 => (one(), 0usize..300).prop_map(|(element, len)| vec![element; len]),
        1 => outlier,
    ]
}

/// Scales over all exponents: powers of two, any, subnormal, and around where a reciprocal ceases to be normal.
pub fn scales() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => (-149..128).prop_map(|exponent| 2f64.powi(exponent) as f32),
        4 => prop::num::f32::NORMAL.prop_map(f32::abs),
        4 => 1e-4f32..10.0,
        1 => prop::num::f32::SUBNORMAL.prop_map(f32::abs),
        1 => (-3..=3).prop_map(|steps| stepped(f32::MIN_POSITIVE, steps)),
        1 => (-3..=3).prop_map(|steps| stepped(2f32.powi(126), steps)),
    ]
}

/// Elements on the grid that will follow from them: in each group the first is so large that the scale is about `scale`.
pub fn anchored(case: &Case, elements: &[Element], scale: f32) -> Vec<f32> {
    let codes = case.format.codes;
    let values = oracle::values(codes);
    let (low, high) = (values[0], values[values.len() - 1]);
    let reach = match codes {
        // A scale is the range over the limits' difference, or the magnitude over half of it.
        Codes::Int { symmetric: true, .. } => (high - low) / 2.0,
        _ => high,
    };
    let anchor = ((reach * f64::from(scale)) as f32).min(f32::MAX);
    let value = |(index, element): (usize, &Element)| match index % case.group {
        0 if case.group > 1 => anchor,
        1 if !codes.symmetric() => ((low * f64::from(scale)) as f32).max(-f32::MAX),
        _ => element.value(codes, scale, 0),
    };
    elements.iter().enumerate().map(value).collect()
}

/// A grid of a format: scales as they come, but of the kind that its scaling has.
pub fn grid(case: &Case, groups: usize, scales: &[f32], global: f32) -> Grid {
    let codes = case.format.codes;
    let all = oracle::values(codes);
    let scale = |index: usize| {
        let scale = scales[index % scales.len()];
        match case.format.scaling {
            Scaling::Weights | Scaling::Absmax | Scaling::Nested | Scaling::InBlocks => scale,
            Scaling::E8m0(_) => 2f64.powi(f64::from(scale).log2().floor().clamp(-127.0, 127.0) as i32) as f32,
            Scaling::E4m3 => {
                let table = oracle::values(Codes::Fp8E4m3);
                let positive = &table[table.len() / 2 + 1..];
                positive[scale.to_bits() as usize % positive.len()] as f32
            }
        }
    };
    let zero_point = |index: usize| {
        let span = all.len() as i64;
        ((scales[index % scales.len()].to_bits() as i64 + index as i64) % span + all[0] as i64) as i32
    };
    Grid {
        scales: (0..groups).map(scale).collect(),
        zero_points: if codes.symmetric() { Vec::new() } else { (0..groups).map(zero_point).collect() },
        global: if case.format.scaling == Scaling::E4m3 { global.clamp(1e-30, 1e36) } else { 1.0 },
    }
}
