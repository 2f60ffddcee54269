//! What a quantized layer is stored as: the tensors of compressed-tensors 0.20, their names, types, shapes and bytes; or those of
//! `bitsandbytes`.
//!
//! Source: its compressors `pack-quantized`, `int-quantized`, `float-quantized`, `nvfp4-pack-quantized`, `mxfp4-pack-quantized`,
//! `mxfp6-pack-quantized` and `mxfp8-quantized`; `tests/golden/test_checkpoints.py` holds every one of these against what
//! they write.

use half::{bf16, f16};
use quarrel_engine::{Codes, Granularity, Packing, Scaling, Scheme, e4m3_bits, packed_bytes};
use safetensors::Dtype;

use crate::{bits::pack_down, bitsandbytes, element::Element};

/// A tensor that is still to be filled: its name, type and shape.
pub(crate) type Entry = (String, Element, Vec<u64>);

/// What a tensor of a quantized layer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Codes,
    Scales,
    Shape,
    Global,
    ZeroPoints,
    /// What the scales are under where they are quantized too.
    Nested,
    /// What follows from the scheme, the type and the shape: bitsandbytes says it.
    Said,
}

/// The tensors that the layer `NAME.weight` becomes, its codes first; `shape` and `dtype` are those of its weights.
pub(crate) fn layout(module: &str, scheme: &Scheme, (dtype, shape): (Dtype, &[u64])) -> Vec<(Part, Entry)> {
    if let Some(parts) = bitsandbytes::layout(module, scheme, (dtype, shape)) {
        return parts;
    }
    let dims = (scheme.channel_dims().get() as usize).min(shape.len());
    let (channels, columns) = (&shape[..dims], shape[dims..].iter().product::<u64>());
    let per_scale = scale_shape(scheme, channels, columns);
    let name = |part: &str| format!("{module}.{part}");
    if let Codes::Block(block) = scheme.codes() {
        return vec![(Part::Codes, (name(codes_part(scheme)), block.into(), shape.to_vec()))];
    }
    let (part, codes_type, codes_shape) = codes_stored(scheme, shape, channels, columns);
    let mut parts = vec![(Part::Codes, (name(part), codes_type.into(), codes_shape))];
    parts.push((Part::Scales, (name(SCALES_PART), stored_type(scheme, dtype).into(), per_scale.clone())));
    if let Codes::Int { packing: Packing::Dense, .. } = scheme.codes() {
        parts.push((Part::Shape, (name("weight_shape"), Dtype::I64.into(), vec![shape.len() as u64])));
    }
    if scheme.format().scaling == Scaling::E4m3 {
        parts.push((Part::Global, (name("weight_global_scale"), Dtype::F32.into(), vec![1])));
    }
    if !scheme.codes().symmetric() {
        let (dtype, shape) = points_stored(scheme.codes(), &per_scale);
        parts.push((Part::ZeroPoints, (name("weight_zero_point"), dtype.into(), shape)));
    }
    parts
}

/// Bytes of such a tensor.
pub(crate) fn bytes((_, element, shape): &Entry) -> u64 {
    element.bytes(shape).unwrap_or(0)
}

/// The part, type and shape of a layer's codes.
pub(crate) fn codes_stored(
    scheme: &Scheme,
    shape: &[u64],
    channels: &[u64],
    columns: u64,
) -> (&'static str, Dtype, Vec<u64>) {
    let bytes = packed_bytes(scheme.codes(), columns as usize) as u64;
    let (dtype, shape) = match scheme.codes() {
        Codes::Int { packing: Packing::Dense, .. } => (Dtype::I32, [channels, &[bytes / 4]].concat()),
        Codes::Int { packing: Packing::Plain, .. } | Codes::Rowwise => (Dtype::I8, shape.to_vec()),
        Codes::Fp8E4m3 => (Dtype::F8_E4M3, shape.to_vec()),
        Codes::Fp6E2m3 | Codes::Fp4E2m1 | Codes::Codebook(_) | Codes::Block(_) => {
            (Dtype::U8, [channels, &[bytes]].concat())
        }
    };
    (codes_part(scheme), dtype, shape)
}

/// What the tensor of a layer's scales is called.
pub(crate) const SCALES_PART: &str = "weight_scale";

/// The same under any scheme.
pub(crate) fn scales_part(scheme: &Scheme) -> &'static str {
    match scheme.codes() {
        Codes::Codebook(_) => bitsandbytes::ABSMAX,
        Codes::Rowwise => bitsandbytes::ROW_ABSMAX,
        _ => SCALES_PART,
    }
}

/// What the tensor of a layer's codes is called.
pub(crate) fn codes_part(scheme: &Scheme) -> &'static str {
    match scheme.codes() {
        Codes::Int { packing: Packing::Plain, .. }
        | Codes::Fp8E4m3
        | Codes::Codebook(_)
        | Codes::Rowwise
        | Codes::Block(_) => "weight",
        Codes::Int { packing: Packing::Dense, .. } | Codes::Fp6E2m3 | Codes::Fp4E2m1 => "weight_packed",
    }
}

/// The shape of a layer's scales.
pub(crate) fn scale_shape(scheme: &Scheme, channels: &[u64], columns: u64) -> Vec<u64> {
    match scheme.granularity() {
        Granularity::Tensor => vec![1],
        Granularity::Channel => [channels, &[1]].concat(),
        Granularity::Group(size) => [channels, &[columns / u64::from(size.get())]].concat(),
        Granularity::Block { rows, columns: width } => {
            let mut shape = channels.to_vec();
            if let Some(last) = shape.last_mut() {
                *last = last.div_ceil(u64::from(rows.get()));
            }
            shape.push(columns.div_ceil(u64::from(width.get())));
            shape
        }
    }
}

/// The type that scales are stored in: the weights' own for the 16-bit types, else f32; bytes of exponents; or FP8.
pub(crate) fn stored_type(scheme: &Scheme, dtype: Dtype) -> Dtype {
    match (scheme.format().scaling, dtype) {
        (Scaling::E8m0(_) | Scaling::Nested, _) => Dtype::U8,
        (Scaling::E4m3, _) => Dtype::F8_E4M3,
        (Scaling::Weights, Dtype::F16 | Dtype::BF16) => dtype,
        (Scaling::Weights | Scaling::Absmax | Scaling::InBlocks, _) => Dtype::F32,
    }
}

/// Scales as bytes of their stored type. The engine rounded them to it, so nothing is lost here.
pub(crate) fn narrowed(scales: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F16 => scales.iter().flat_map(|scale| f16::from_f32(*scale).to_le_bytes()).collect(),
        Dtype::BF16 => scales.iter().flat_map(|scale| bf16::from_f32(*scale).to_le_bytes()).collect(),
        // The exponent of 2^(e-127) is f32's own, but of the subnormal 2^-127, which is 0 there too.
        Dtype::U8 => scales.iter().map(|scale| (scale.to_bits() >> 23) as u8).collect(),
        Dtype::F8_E4M3 => scales.iter().map(|scale| e4m3_bits(*scale)).collect(),
        _ => scales.iter().flat_map(|scale| scale.to_le_bytes()).collect(),
    }
}

/// Zero points: bytes of their own, or, beside dense codes of channels and groups, packed along the channels. They are all of the layer's, row-major over
/// channels and groups, in the signed domain of the codes.
pub(crate) fn stored_points(scheme: &Scheme, shape: &[u64], points: &[i8]) -> Vec<u8> {
    let dims = (scheme.channel_dims().get() as usize).min(shape.len());
    let per_scale = scale_shape(scheme, &shape[..dims], shape[dims..].iter().product());
    match (scheme.codes(), per_scale.as_slice()) {
        (Codes::Int { bits, packing: Packing::Dense, .. }, [.., channels, groups]) => {
            let size = (channels * groups).max(1) as usize;
            points.chunks(size).flat_map(|matrix| pack_down(matrix, *groups as usize, bits)).collect()
        }
        _ => points.iter().map(|point| *point as u8).collect(),
    }
}

/// The type and shape of the zero points of asymmetric codes.
pub(crate) fn points_stored(codes: Codes, per_scale: &[u64]) -> (Dtype, Vec<u64>) {
    let mut shape = per_scale.to_vec();
    match (codes, shape.as_mut_slice()) {
        (Codes::Int { bits, packing: Packing::Dense, .. }, [.., channels, _]) => {
            *channels = (*channels * u64::from(bits)).div_ceil(32);
            (Dtype::I32, shape)
        }
        _ => (Dtype::I8, shape),
    }
}
