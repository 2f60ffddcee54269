//! The quantized layers of a file: of GGUF, each a tensor of blocks; of safetensors in the layout of compressed-tensors, or of DeepSeek's FP8, or of bitsandbytes: the inverse of
//! `stored`.
//!
//! A file of ours says in its metadata which scheme each has. Of others the scheme is told from types and shapes; where
//! those allow two readings, that is an error and not a guess.

mod parts;

use half::{bf16, f16};
use quarrel_engine::{Codes, Granularity, Packing, Scheme, SchemeError, decoded_scales, e4m3_value, packed_bytes};
use safetensors::Dtype;

use self::parts::Parts;
use crate::{
    bits::unpack_down,
    bitsandbytes,
    element::Element,
    error::CheckpointError,
    layer::module_of,
    said::said,
    source::{Source, Tensor},
    stored::SCALES_PART,
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
    /// None where the codes hold them.
    scales: Option<Tensor>,
    zero_points: Option<Tensor>,
    shape_tensor: Option<Tensor>,
    global: Option<Tensor>,
    nested: Option<NestedScales>,
    /// What else goes with the codes, and is of no use without them: scales of activations, what bitsandbytes says.
    others: Vec<Tensor>,
}

/// What scales are under that are quantized too.
#[derive(Debug, Clone)]
pub(crate) struct NestedScales {
    /// The greatest distances from the mean, of 256 scales each.
    pub(crate) absmax: Tensor,
    /// What a byte stands for.
    pub(crate) values: Vec<f32>,
    /// The mean.
    pub(crate) offset: f32,
}

/// Finds them, in the order of their codes.
///
/// # Errors
/// [`CheckpointError::Module`] for a layer that is quantized in another layout, or in a way that cannot be told.
pub fn modules(source: &Source) -> Result<Vec<Module>, CheckpointError> {
    if source.gguf().is_some() {
        return source.tensors().iter().filter_map(|tensor| blocks(source, tensor)).collect();
    }
    let said = said(source)?;
    let mut found = Vec::new();
    for tensor in source.tensors() {
        // Of `weight_g_idx` the groups are not of neighbouring columns.
        let foreign = ["qweight", "weight_g_idx"];
        if let Some((mark, module)) = foreign.into_iter().find_map(|mark| Some((mark, prefix(&tensor.name, mark)?))) {
            return Err(CheckpointError::Foreign { module: module.to_owned(), mark });
        }
        let Some(module) = prefix(&tensor.name, "weight_packed").or_else(|| prefix(&tensor.name, "weight")) else {
            continue;
        };
        let is_dense = tensor.name.ends_with("weight_packed");
        if let Some(of_bitsandbytes) = (!is_dense).then(|| bitsandbytes::module(source, module, tensor)).flatten() {
            found.push(of_bitsandbytes.map_err(|wrong| wrong.of(module))?);
            continue;
        }
        // Bytes or FP8 without scales are somebody's own numbers.
        let is_plain = matches!(tensor.dtype.plain(), Some(Dtype::I8 | Dtype::F8_E4M3))
            && (scales_of(source, module).is_some() || said.contains_key(module));
        if is_dense || is_plain {
            let parts = Parts::of(source, module, tensor, is_dense);
            found.push(parts.and_then(|parts| Ok(parts.module(said.get(module))?)).map_err(|wrong| wrong.of(module))?);
        }
    }
    Ok(found)
}

impl Module {
    /// Of codes and their scales alone.
    pub(crate) fn of_parts(
        name: &str,
        scheme: Scheme,
        shape: Vec<u64>,
        dtype: Dtype,
        codes: Tensor,
        scales: Tensor,
        others: Vec<Tensor>,
    ) -> Module {
        let (name, scales) = (name.to_owned(), Some(scales));
        Module {
            name,
            scheme,
            shape,
            dtype,
            codes,
            scales,
            zero_points: None,
            shape_tensor: None,
            global: None,
            nested: None,
            others,
        }
    }

    /// Whose scales are quantized too, if they are.
    pub(crate) fn with_nested(self, nested: Option<NestedScales>) -> Module {
        Module { nested, ..self }
    }

    /// The same layer, whose blocks are taken as they are: what multiplies them stays beside them.
    pub(crate) fn without_scale(self) -> Module {
        Module { global: None, ..self }
    }

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
        let Some(scales) = &self.scales else { return Ok(Vec::new()) };
        let bytes = source.read_whole(scales)?;
        if let Some(NestedScales { absmax, values, offset }) = &self.nested {
            return Ok(decoded_scales(&bytes, &source.read_whole(absmax)?, *offset, values));
        }
        Ok(match scales.dtype.of_values() {
            Dtype::F16 => bytes.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
            Dtype::BF16 => bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
            Dtype::U8 => bytes.iter().map(|exponent| power_of_two(*exponent)).collect(),
            Dtype::F8_E4M3 => bytes.iter().map(|bits| e4m3_value(*bits)).collect(),
            _ => bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        })
    }

    /// What its scales are divided by, or of blocks multiplied by, if that is another number than 1.
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
        let shape = self.scales.as_ref().map(|scales| scales.shape.as_slice()).unwrap_or_default();
        let (Codes::Int { bits, packing: Packing::Dense, .. }, [.., channels, groups]) = (self.scheme.codes(), shape)
        else {
            return Ok(Some(bytes.iter().map(|byte| i32::from(*byte as i8)).collect()));
        };
        let (channels, groups) = (*channels as usize, *groups as usize);
        let size = ((channels * usize::from(bits)).div_ceil(32) * 4 * groups).max(1);
        Ok(Some(bytes.chunks(size).flat_map(|matrix| unpack_down(matrix, channels, groups, bits)).collect()))
    }

    /// The names of all tensors that it is made of.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        let nested = self.nested.as_ref().map(|nested| &nested.absmax);
        let others = [self.zero_points.as_ref(), self.shape_tensor.as_ref(), self.global.as_ref(), nested];
        let parts = [Some(&self.codes), self.scales.as_ref()].into_iter().chain(others).flatten();
        parts.chain(&self.others).map(|part| part.name.as_str())
    }
}

/// What a module has beside its weights where activations are quantized with scales that are known before.
const ACTIVATIONS: [&str; 4] = ["input_scale", "input_global_scale", "input_zero_point", "output_scale"];

/// What FP8 of DeepSeek has for scales: of blocks of 128 x 128, and multiplied as `weight_scale` is.
pub(crate) const DEEPSEEK_SCALES: &str = "weight_scale_inv";

/// The layer that a tensor of blocks is.
pub(crate) fn blocks(source: &Source, tensor: &Tensor) -> Option<Result<Module, CheckpointError>> {
    let Element::Blocks(of) = tensor.dtype else { return None };
    let name = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name).to_owned();
    let Some(block) = of.block() else { return Some(Err(CheckpointError::Foreign { module: name, mark: of.name })) };
    let dims = tensor.shape.len().saturating_sub(1);
    let scheme = match dims {
        0 => {
            return Some(Err(CheckpointError::Module {
                module: name,
                detail: format!("a tensor of {of} and one dimension", of = of.name),
            }));
        }
        1 => block.name().to_owned(),
        dims => format!("{};channel_dims={dims}", block.name()),
    };
    let scheme = scheme.parse().map_err(|error: SchemeError| CheckpointError::Ours(error.to_string()));
    let scale = source.tensor(&format!("{}.scale", module_of(&tensor.name))).cloned();
    if let Some(scale) = scale.as_ref().filter(|scale| scale.dtype != Dtype::F32.into() || scale.bytes() != 4) {
        let detail = format!("`{}` is {} {:?}: expected one F32", scale.name, scale.dtype, scale.shape);
        return Some(Err(CheckpointError::Module { module: name, detail }));
    }
    let module = |scheme| Module {
        name,
        scheme,
        shape: tensor.shape.clone(),
        dtype: Dtype::F32,
        codes: tensor.clone(),
        scales: None,
        zero_points: None,
        shape_tensor: None,
        // What llama.cpp multiplies by, where it is there.
        global: scale,
        nested: None,
        others: Vec::new(),
    };
    Some(scheme.map(module))
}

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
