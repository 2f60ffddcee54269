//! The tensors of a module of safetensors, and what they tell of its scheme.

use std::ops::RangeInclusive;

use quarrel_engine::{Scaling, Scheme, SchemeError};
use safetensors::Dtype;

use super::{ACTIVATIONS, DEEPSEEK_SCALES, Module, scales_of};
use crate::{
    bitsandbytes,
    error::Wrong,
    source::{Source, Tensor},
    stored::{SCALES_PART, codes_stored, points_stored, scale_shape, stored_type},
};

/// The tensors of one module.
pub(super) struct Parts {
    codes: Tensor,
    scales: Tensor,
    zero_points: Option<Tensor>,
    shape_tensor: Option<Tensor>,
    global: Option<Tensor>,
    others: Vec<Tensor>,
    shape: Vec<u64>,
    is_dense: bool,
    name: String,
}

impl Parts {
    pub(super) fn of(source: &Source, module: &str, codes: &Tensor, is_dense: bool) -> Result<Parts, Wrong> {
        let part = |part: &str| source.tensor(&format!("{module}.{part}")).cloned();
        let scales = scales_of(source, module).ok_or("it has codes but no `weight_scale`")?;
        if scales.name.ends_with(SCALES_PART) && part(DEEPSEEK_SCALES).is_some() {
            return Err(format!("it has scales of two layouts, `weight_scale` and `{DEEPSEEK_SCALES}`").into());
        }
        let (of_codes, of_scales) = (codes.dtype.plain(), scales.dtype.plain());
        let is_float = matches!(of_scales, Some(Dtype::F32 | Dtype::F16 | Dtype::BF16));
        let is_small = matches!(of_scales, Some(Dtype::U8 | Dtype::F8_E4M3));
        let is_known = match (is_dense, of_codes) {
            (true, Some(Dtype::I32)) => is_float,
            (true, Some(Dtype::U8)) => is_small,
            (false, Some(Dtype::F8_E4M3)) => is_float || of_scales == Some(Dtype::U8),
            (false, Some(Dtype::I8)) => is_float,
            _ => false,
        };
        if !is_known {
            return Err(format!(
                "its codes are {} and its scales {}: this version reads int and FP8 codes with float scales, and \
                 FP4, FP6 and FP8 with scales of one byte",
                codes.dtype, scales.dtype
            )
            .into());
        }
        let shape_tensor = part("weight_shape");
        let shape = match (&shape_tensor, is_dense, of_codes) {
            (_, true, Some(Dtype::U8)) => packed_shape(codes, &scales)?,
            (None, true, _) => return Err("it has `weight_packed` but no `weight_shape`".into()),
            (Some(tensor), true, _) => shape_of(source, tensor)?,
            (_, false, _) => codes.shape.clone(),
        };
        // Zeros as ones: so no product of some of them overflows either.
        for shape in [&shape, &codes.shape, &scales.shape] {
            let product = shape.iter().try_fold(1u64, |all, dimension| all.checked_mul((*dimension).max(1)));
            if product.is_none_or(|product| product >= 1 << 48) {
                return Err(format!("its shape {shape:?} is beyond 2^48 elements").into());
            }
        }
        let zero_points = part("weight_zero_point");
        let global = part("weight_global_scale");
        let others = ACTIVATIONS.iter().filter_map(|name| part(name)).collect();
        let (codes, name) = (codes.clone(), module.to_owned());
        Ok(Parts { codes, scales, zero_points, shape_tensor, global, others, shape, is_dense, name })
    }

    pub(super) fn module(self, said: Option<&Scheme>) -> Result<Module, String> {
        let scheme = match said {
            Some(scheme) => *scheme,
            None => self.told()?,
        };
        if bitsandbytes::is_one(&scheme) {
            return Err(format!("it is said to be `{scheme}`, and does not lie as bitsandbytes stores it"));
        }
        self.check(&scheme)?;
        let Parts { codes, scales, zero_points, shape_tensor, global, others, shape, name, .. } = self;
        // Scales of one byte do not tell the weights' type; bf16 is what compressed-tensors decompresses them to.
        // So is what DeepSeek's FP8 was, whose scales are f32.
        let dtype = match scheme.format().scaling {
            Scaling::Weights if scales.name.ends_with(DEEPSEEK_SCALES) => Dtype::BF16,
            Scaling::Weights | Scaling::Absmax | Scaling::Nested | Scaling::InBlocks => scales.dtype.of_values(),
            Scaling::E8m0(_) | Scaling::E4m3 => Dtype::BF16,
        };
        let module = Module::of_parts(&name, scheme, shape, dtype, codes, scales, others);
        Ok(Module { zero_points, shape_tensor, global, ..module })
    }

    /// The scheme that types and shapes tell.
    fn told(&self) -> Result<Scheme, String> {
        let dims = if self.is_dense { self.codes.shape.len().saturating_sub(1).max(1) } else { 1 };
        let columns: u64 = self.shape.iter().skip(dims).product();
        // The rule by which MX scales were chosen does not matter any more.
        let preset = match (self.codes.dtype.plain(), self.scales.dtype.plain()) {
            (Some(Dtype::U8), Some(Dtype::F8_E4M3)) => Some("NVFP4A16"),
            (Some(Dtype::U8), _) if self.codes.shape.last().copied() == Some(columns / 2) => Some("MXFP4A16"),
            (Some(Dtype::U8), _) => Some("MXFP6A16"),
            (Some(Dtype::F8_E4M3), Some(Dtype::U8)) => Some("MXFP8A16"),
            _ => None,
        };
        if let Some(preset) = preset {
            let dims = if dims == 1 { String::new() } else { format!(";channel_dims={dims}") };
            return format!("{preset}{dims}").parse().map_err(|error: SchemeError| error.to_string());
        }
        let name = match (self.is_dense, self.codes.dtype.plain()) {
            (true, _) => self.dense_name(columns)?,
            (false, Some(Dtype::I8)) if self.zero_points.is_some() => "int8-asym".to_owned(),
            (false, Some(Dtype::I8)) => "int8".to_owned(),
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
                    "`{}` is {} {:?}: `{scheme}` of weights {:?} has {dtype:?} {shape:?}",
                    part.name, found.0, found.1, self.shape
                )
            };
            if found == (dtype.into(), &shape) { Ok(()) } else { Err(wrong()) }
        };
        expect(&self.codes, (codes_type, codes_shape))?;
        let scales_type = self.scales.dtype.of_values();
        let scales_type = match scheme.format().scaling {
            Scaling::Weights | Scaling::Absmax | Scaling::Nested | Scaling::InBlocks => scales_type,
            Scaling::E8m0(_) | Scaling::E4m3 => stored_type(scheme, scales_type),
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
    let group = if scales.dtype == Dtype::F8_E4M3.into() { 16 } else { 32 };
    let ([channels @ .., _], Some(groups)) = (codes.shape.as_slice(), scales.shape.last()) else {
        return Err(format!("codes of shape {:?} have no columns", codes.shape));
    };
    let columns = groups.checked_mul(group).ok_or_else(|| format!("{groups} groups of {group} columns"))?;
    Ok([channels, &[columns]].concat())
}

/// The dimensions that the tensor `weight_shape` holds.
fn shape_of(source: &Source, tensor: &Tensor) -> Result<Vec<u64>, Wrong> {
    let most = 32;
    if tensor.dtype != Dtype::I64.into() || tensor.bytes() > 8 * most {
        return Err(format!(
            "`weight_shape` is {} of {:?}: expected I64 [rank], at most {most}",
            tensor.dtype, tensor.shape
        )
        .into());
    }
    let bytes = source.read_whole(tensor)?;
    let dimensions = bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes));
    let dimensions = dimensions.map(|dimension| u64::try_from(dimension).ok());
    let shape: Option<Vec<u64>> = dimensions.collect();
    shape.filter(|shape| !shape.is_empty()).ok_or_else(|| "`weight_shape` holds no shape".into())
}
