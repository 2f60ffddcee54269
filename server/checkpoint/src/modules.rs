//! The quantized layers of a file in the layout of compressed-tensors, or of DeepSeek's FP8: the inverse of `stored`.
//!
//! A file of ours says in its metadata which scheme each has. Of others the scheme is told from types and shapes; where
//! those allow two readings, that is an error and not a guess.

use std::ops::RangeInclusive;

use half::{bf16, f16};
use quarrel_engine::{Codes, Granularity, Packing, Scaling, Scheme, SchemeError, e4m3_value, packed_bytes};
use safetensors::Dtype;

use crate::{
    bits::unpack_down,
    error::CheckpointError,
    said::said,
    source::{Source, Tensor},
    stored::{SCALES_PART, codes_stored, points_stored, scale_shape, stored_type},
};

/// A quantized layer of a file.
#[derive(Debug, Clone)]
pub struct Module {
    /// The layer without its `.weight`.
    pub name: String,
    /// Its scheme.
    pub scheme: Scheme,
    /// The shape of its weights.
    pub shape: Vec<u64>,
    /// The type that its scales are stored in, which its weights had.
    pub dtype: Dtype,
    /// The tensor of its codes.
    pub codes: Tensor,
    scales: Tensor,
    zero_points: Option<Tensor>,
    shape_tensor: Option<Tensor>,
    global: Option<Tensor>,
    /// What goes with the codes where activations are quantized too: of no use without them.
    activations: Vec<Tensor>,
}

/// Finds them, in the order of their codes.
///
/// # Errors
/// [`CheckpointError::Module`] for a layer that is quantized in another layout, or in a way that cannot be told.
pub fn modules(source: &Source) -> Result<Vec<Module>, CheckpointError> {
    let said = said(source)?;
    let mut found = Vec::new();
    for tensor in source.tensors() {
        // Of `weight_g_idx` the groups are not of neighbouring columns.
        let foreign = ["qweight", "weight.absmax", "weight_g_idx"];
        if let Some((mark, module)) = foreign.into_iter().find_map(|mark| Some((mark, prefix(&tensor.name, mark)?))) {
            return Err(CheckpointError::Foreign { module: module.to_owned(), mark });
        }
        let Some(module) = prefix(&tensor.name, "weight_packed").or_else(|| prefix(&tensor.name, "weight")) else {
            continue;
        };
        let is_dense = tensor.name.ends_with("weight_packed");
        // Bytes or FP8 without scales are somebody's own numbers.
        let is_plain = matches!(tensor.dtype, Dtype::I8 | Dtype::F8_E4M3)
            && (scales_of(source, module).is_some() || said.contains_key(module));
        if is_dense || is_plain {
            let parts = Parts::of(source, module, tensor, is_dense);
            found.push(
                parts
                    .and_then(|parts| parts.module(said.get(module)))
                    .map_err(|detail| CheckpointError::Module { module: module.to_owned(), detail })?,
            );
        }
    }
    Ok(found)
}

impl Module {
    /// How many output channels it has, and the bytes of each one's codes.
    pub fn channels(&self) -> (u64, u64) {
        let dims = (self.scheme.channel_dims().get() as usize).min(self.shape.len());
        let channels = self.shape[..dims].iter().product();
        let columns: u64 = self.shape[dims..].iter().product();
        (channels, packed_bytes(self.scheme.codes(), columns as usize) as u64)
    }

    /// The type that its weights had, in the wire's word.
    pub fn dtype_word(&self) -> &'static str {
        match self.dtype {
            Dtype::BF16 => "bf16",
            Dtype::F16 => "f16",
            _ => "f32",
        }
    }

    /// How many channels share scales.
    pub fn span_channels(&self) -> u64 {
        match self.scheme.granularity() {
            Granularity::Channel | Granularity::Group(_) => 1,
            Granularity::Tensor => self.channels().0.max(1),
            Granularity::Block { rows, .. } => u64::from(rows.get()),
        }
    }

    /// How many spans begin before a channel: blocks begin anew in each matrix.
    pub(crate) fn spans_before(&self, channel: u64) -> u64 {
        let height = self.span_channels().max(1);
        let matrix = match self.scheme.granularity() {
            Granularity::Block { .. } => {
                let dims = (self.scheme.channel_dims().get() as usize).min(self.shape.len());
                self.shape[..dims].last().copied().unwrap_or(1)
            }
            _ => self.channels().0,
        };
        let matrix = matrix.max(1);
        channel / matrix * matrix.div_ceil(height) + (channel % matrix).div_ceil(height)
    }

    /// Its scales, row-major.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn scales(&self, source: &Source) -> Result<Vec<f32>, CheckpointError> {
        let bytes = source.read_whole(&self.scales)?;
        Ok(match self.scales.dtype {
            Dtype::F16 => bytes.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
            Dtype::BF16 => bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
            Dtype::U8 => bytes.iter().map(|exponent| power_of_two(*exponent)).collect(),
            Dtype::F8_E4M3 => bytes.iter().map(|bits| e4m3_value(*bits)).collect(),
            _ => bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        })
    }

    /// What its scales are divided by, if that is another number than 1.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn global_scale(&self, source: &Source) -> Result<Option<f32>, CheckpointError> {
        let Some(tensor) = &self.global else { return Ok(None) };
        let bytes = source.read_whole(tensor)?;
        Ok(bytes.first_chunk().map(|bytes| f32::from_le_bytes(*bytes)))
    }

    /// Its zero points, one for each scale, in the signed domain of the codes; none if it is symmetric.
    ///
    /// # Errors
    /// [`CheckpointError::Io`].
    pub fn zero_points(&self, source: &Source) -> Result<Option<Vec<i32>>, CheckpointError> {
        let Some(tensor) = &self.zero_points else { return Ok(None) };
        let bytes = source.read_whole(tensor)?;
        let (Codes::Int { bits, packing: Packing::Dense, .. }, [.., channels, groups]) =
            (self.scheme.codes(), self.scales.shape.as_slice())
        else {
            return Ok(Some(bytes.iter().map(|byte| i32::from(*byte as i8)).collect()));
        };
        let (channels, groups) = (*channels as usize, *groups as usize);
        let size = ((channels * usize::from(bits)).div_ceil(32) * 4 * groups).max(1);
        Ok(Some(bytes.chunks(size).flat_map(|matrix| unpack_down(matrix, channels, groups, bits)).collect()))
    }

    /// The names of all tensors that it is made of.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        let others = [self.zero_points.as_ref(), self.shape_tensor.as_ref(), self.global.as_ref()];
        let parts = [Some(&self.codes), Some(&self.scales)].into_iter().chain(others).flatten();
        parts.chain(&self.activations).map(|part| part.name.as_str())
    }
}

/// What a module has beside its weights where activations are quantized with scales that are known before.
const ACTIVATIONS: [&str; 4] = ["input_scale", "input_global_scale", "input_zero_point", "output_scale"];

/// What FP8 of DeepSeek has for scales: of blocks of 128 x 128, and multiplied as `weight_scale` is.
pub(crate) const DEEPSEEK_SCALES: &str = "weight_scale_inv";

/// The scales of a module.
fn scales_of(source: &Source, module: &str) -> Option<Tensor> {
    let part = |part: &str| source.tensor(&format!("{module}.{part}")).cloned();
    part(SCALES_PART).or_else(|| part(DEEPSEEK_SCALES))
}

/// 2^(exponent - 127).
fn power_of_two(exponent: u8) -> f32 {
    f32::from_bits(if exponent == 0 { 1 << 22 } else { u32::from(exponent) << 23 })
}

fn prefix<'a>(name: &'a str, part: &str) -> Option<&'a str> {
    name.strip_suffix(part)?.strip_suffix('.')
}

/// The tensors of one module.
struct Parts {
    codes: Tensor,
    scales: Tensor,
    zero_points: Option<Tensor>,
    shape_tensor: Option<Tensor>,
    global: Option<Tensor>,
    activations: Vec<Tensor>,
    shape: Vec<u64>,
    is_dense: bool,
    name: String,
}

impl Parts {
    fn of(source: &Source, module: &str, codes: &Tensor, is_dense: bool) -> Result<Parts, String> {
        let part = |part: &str| source.tensor(&format!("{module}.{part}")).cloned();
        let scales = scales_of(source, module).ok_or("it has codes but no `weight_scale`")?;
        if scales.name.ends_with(SCALES_PART) && part(DEEPSEEK_SCALES).is_some() {
            return Err(format!("it has scales of two layouts, `weight_scale` and `{DEEPSEEK_SCALES}`"));
        }
        let is_float = matches!(scales.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        let is_small = matches!(scales.dtype, Dtype::U8 | Dtype::F8_E4M3);
        let is_known = match (is_dense, codes.dtype) {
            (true, Dtype::I32) => is_float,
            (true, Dtype::U8) => is_small,
            (false, Dtype::F8_E4M3) => is_float || scales.dtype == Dtype::U8,
            (false, Dtype::I8) => is_float,
            _ => false,
        };
        if !is_known {
            return Err(format!(
                "its codes are {:?} and its scales {:?}: this version reads int and FP8 codes with float scales, and \
                 FP4, FP6 and FP8 with scales of one byte",
                codes.dtype, scales.dtype
            ));
        }
        let shape_tensor = part("weight_shape");
        let shape = match (&shape_tensor, is_dense, codes.dtype) {
            (_, true, Dtype::U8) => packed_shape(codes, &scales)?,
            (None, true, _) => return Err("it has `weight_packed` but no `weight_shape`".to_owned()),
            (Some(tensor), true, _) => shape_of(source, tensor)?,
            (_, false, _) => codes.shape.clone(),
        };
        // Zeros as ones: so no product of some of them overflows either.
        for shape in [&shape, &codes.shape, &scales.shape] {
            let product = shape.iter().try_fold(1u64, |all, dimension| all.checked_mul((*dimension).max(1)));
            if product.is_none_or(|product| product >= 1 << 48) {
                return Err(format!("its shape {shape:?} is beyond 2^48 elements"));
            }
        }
        let zero_points = part("weight_zero_point");
        let global = part("weight_global_scale");
        let activations = ACTIVATIONS.iter().filter_map(|name| part(name)).collect();
        let (codes, name) = (codes.clone(), module.to_owned());
        Ok(Parts { codes, scales, zero_points, shape_tensor, global, activations, shape, is_dense, name })
    }

    fn module(self, said: Option<&Scheme>) -> Result<Module, String> {
        let scheme = match said {
            Some(scheme) => *scheme,
            None => self.told()?,
        };
        self.check(&scheme)?;
        let Parts { codes, scales, zero_points, shape_tensor, global, activations, shape, name, .. } = self;
        // Scales of one byte do not tell the weights' type; bf16 is what compressed-tensors decompresses them to.
        // So is what DeepSeek's FP8 was, whose scales are f32.
        let dtype = match scheme.format().scaling {
            Scaling::Weights if scales.name.ends_with(DEEPSEEK_SCALES) => Dtype::BF16,
            Scaling::Weights | Scaling::InBlocks => scales.dtype,
            Scaling::E8m0(_) | Scaling::E4m3 => Dtype::BF16,
        };
        Ok(Module { name, scheme, shape, dtype, codes, scales, zero_points, shape_tensor, global, activations })
    }

    /// The scheme that types and shapes tell.
    fn told(&self) -> Result<Scheme, String> {
        let dims = if self.is_dense { self.codes.shape.len().saturating_sub(1).max(1) } else { 1 };
        let columns: u64 = self.shape.iter().skip(dims).product();
        // The rule by which MX scales were chosen does not matter any more.
        let preset = match (self.codes.dtype, self.scales.dtype) {
            (Dtype::U8, Dtype::F8_E4M3) => Some("NVFP4A16"),
            (Dtype::U8, _) if self.codes.shape.last().copied() == Some(columns / 2) => Some("MXFP4A16"),
            (Dtype::U8, _) => Some("MXFP6A16"),
            (Dtype::F8_E4M3, Dtype::U8) => Some("MXFP8A16"),
            _ => None,
        };
        if let Some(preset) = preset {
            let dims = if dims == 1 { String::new() } else { format!(";channel_dims={dims}") };
            return format!("{preset}{dims}").parse().map_err(|error: SchemeError| error.to_string());
        }
        let name = match (self.is_dense, self.codes.dtype) {
            (true, _) => self.dense_name(columns)?,
            (false, Dtype::I8) if self.zero_points.is_some() => "int8-asym".to_owned(),
            (false, Dtype::I8) => "int8".to_owned(),
            (false, _) => "fp8".to_owned(),
        };
        let granularity = self.told_granularity(&name, dims, columns)?;
        let dims = if dims == 1 { String::new() } else { format!(";channel_dims={dims}") };
        let text = format!("{name}{granularity}{dims}");
        text.parse()
            .map_err(|_| format!("its types and shapes are those of `{text}`, which this version does not read"))
    }

    /// Dense codes: as many bits as fill the words of a channel.
    fn dense_name(&self, columns: u64) -> Result<String, String> {
        let words = self.codes.shape.last().copied().unwrap_or(0);
        let fits = |bits: &u64| (columns * bits).div_ceil(32) == words;
        let bits = Vec::from_iter(RangeInclusive::new(2, 8).filter(fits));
        match (bits.as_slice(), self.zero_points.is_some()) {
            // Of the schemes with dense int8, only W8A16 has a name.
            ([8], false) => Ok("W8A16".to_owned()),
            ([bits], false) => Ok(format!("int{bits}")),
            ([bits], true) => Ok(format!("int{bits}-asym")),
            ([], _) => Err(format!("{words} words for {columns} columns are of no width from 2 to 8 bits")),
            (many, _) => {
                Err(format!("{words} words for {columns} columns may be of {many:?} bits: its scheme cannot be told"))
            }
        }
    }

    fn told_granularity(&self, name: &str, dims: usize, columns: u64) -> Result<String, String> {
        let matrix = self.shape[..dims.min(self.shape.len())].last().copied().unwrap_or(1);
        match self.scales.shape.as_slice() {
            [1] => Ok("/tensor".to_owned()),
            // A scale for each channel is a group of all columns; W8A16 knows groups alone.
            [.., rows, 1] if *rows == matrix && name == "W8A16" => Ok(format!("/g{columns}")),
            [.., rows, 1] if *rows == matrix => Ok("/channel".to_owned()),
            [.., rows, groups]
                if *rows == matrix && name != "fp8" && *groups > 0 && columns.is_multiple_of(*groups) =>
            {
                Ok(format!("/g{}", columns / groups))
            }
            [rows, across] if name == "fp8" && (*rows, *across) == (matrix.div_ceil(128), columns.div_ceil(128)) => {
                Ok("/b128x128".to_owned())
            }
            other => {
                Err(format!("scales of shape {other:?} for weights of {:?}: its scheme cannot be told", self.shape))
            }
        }
    }

    /// Whether every part is of the type and shape that the scheme gives it.
    fn check(&self, scheme: &Scheme) -> Result<(), String> {
        let dims = (scheme.channel_dims().get() as usize).min(self.shape.len());
        let (channels, columns) = (&self.shape[..dims], self.shape[dims..].iter().product::<u64>());
        let (_, codes_type, codes_shape) = codes_stored(scheme, &self.shape, channels, columns);
        let per_scale = scale_shape(scheme, channels, columns);
        let expect = |part: &Tensor, (dtype, shape): (Dtype, Vec<u64>)| {
            let found = (part.dtype, &part.shape);
            let wrong = || {
                format!(
                    "`{}` is {:?} {:?}: `{scheme}` of weights {:?} has {dtype:?} {shape:?}",
                    part.name, found.0, found.1, self.shape
                )
            };
            if found == (dtype, &shape) { Ok(()) } else { Err(wrong()) }
        };
        expect(&self.codes, (codes_type, codes_shape))?;
        let scales_type = match scheme.format().scaling {
            Scaling::Weights | Scaling::InBlocks => self.scales.dtype,
            Scaling::E8m0(_) | Scaling::E4m3 => stored_type(scheme, self.scales.dtype),
        };
        expect(&self.scales, (scales_type, per_scale.clone()))?;
        match (&self.global, scheme.format().scaling) {
            (Some(global), Scaling::E4m3) => expect(global, (Dtype::F32, vec![1]))?,
            (None, Scaling::E4m3) => {
                return Err(format!("it has no global scale (`weight_global_scale`): `{scheme}` has one"));
            }
            (Some(global), _) => return Err(format!("`{}` is there: `{scheme}` has no global scale", global.name)),
            (None, _) => {}
        }
        match (&self.zero_points, scheme.codes().symmetric()) {
            (None, true) => Ok(()),
            (Some(points), false) => expect(points, points_stored(scheme.codes(), &per_scale)),
            (Some(points), true) => Err(format!("`{}` is there: `{scheme}` has no zero points", points.name)),
            (None, false) => Err(format!("it has no zero points (`weight_zero_point`): `{scheme}` has them")),
        }
    }
}

/// The shape of FP4 and FP6 codes, which are not said: groups of 16 (FP8 scales) or 32 (bytes of exponents) columns.
fn packed_shape(codes: &Tensor, scales: &Tensor) -> Result<Vec<u64>, String> {
    let group = if scales.dtype == Dtype::F8_E4M3 { 16 } else { 32 };
    let ([channels @ .., _], Some(groups)) = (codes.shape.as_slice(), scales.shape.last()) else {
        return Err(format!("codes of shape {:?} have no columns", codes.shape));
    };
    let columns = groups.checked_mul(group).ok_or_else(|| format!("{groups} groups of {group} columns"))?;
    Ok([channels, &[columns]].concat())
}

/// The dimensions that the tensor `weight_shape` holds.
fn shape_of(source: &Source, tensor: &Tensor) -> Result<Vec<u64>, String> {
    let most = 32;
    if tensor.dtype != Dtype::I64 || tensor.bytes() > 8 * most {
        return Err(format!(
            "`weight_shape` is {:?} of {:?}: expected I64 [rank], at most {most}",
            tensor.dtype, tensor.shape
        ));
    }
    let bytes = source.read_whole(tensor).map_err(|error| error.to_string())?;
    let dimensions = bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes));
    let dimensions = dimensions.map(|dimension| u64::try_from(dimension).ok());
    let shape: Option<Vec<u64>> = dimensions.collect();
    shape.filter(|shape| !shape.is_empty()).ok_or_else(|| "`weight_shape` holds no shape".to_owned())
}
