//! A layer as bitsandbytes stores it: names, types, shapes and bytes of its tensors, what `config.json` says of them, and the way back.
//!
//! Source: bitsandbytes 0.50, `functional.py::QuantState.as_dict` and `nn/modules.py`; `BitsAndBytesConfig` of transformers 5.23.

use std::collections::BTreeSet;

use quarrel_engine::{Codebook, Codes, Granularity, NESTED_BLOCK, NESTED_VALUES, Scaling, Scheme, SchemeError};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use crate::{
    element::Element,
    error::Wrong,
    modules::{DEEPSEEK_SCALES, Module, NestedScales},
    source::{Source, Tensor},
    stored::{Entry, Part, SCALES_PART, stored_type},
};

/// What the tensors of a layer are called behind the module's name.
pub(crate) const ABSMAX: &str = "weight.absmax";
pub(crate) const ROW_ABSMAX: &str = "SCB";
const BOOK: &str = "weight.quant_map";
const NESTED_ABSMAX: &str = "weight.nested_absmax";
const NESTED_BOOK: &str = "weight.nested_quant_map";
const STATE: &str = "weight.quant_state.bitsandbytes__";
const ROW_FORMAT: &str = "weight_format";
/// More than any state takes.
const STATE_BYTES_MAX: u64 = 4096;

/// Whether it is one of bitsandbytes' schemes.
pub(crate) fn is_one(scheme: &Scheme) -> bool {
    matches!(scheme.codes(), Codes::Codebook(_) | Codes::Rowwise)
}

/// The tensors that a layer becomes, its codes first; none of another ecosystem's scheme.
pub(crate) fn layout(module: &str, scheme: &Scheme, weights: (Dtype, &[u64])) -> Option<Vec<(Part, Entry)>> {
    let elements: u64 = weights.1.iter().product();
    let entry = |part: &str, dtype: Dtype, shape: Vec<u64>| (format!("{module}.{part}"), Element::from(dtype), shape);
    Some(match (scheme.codes(), scheme.granularity()) {
        (Codes::Codebook(book), Granularity::Group(size)) => {
            let state = said(scheme, weights, None).len() as u64;
            let blocks = elements / u64::from(size.get());
            let mut parts = vec![
                (Part::Codes, entry("weight", Dtype::U8, vec![elements.div_ceil(2), 1])),
                (Part::Scales, entry(ABSMAX, stored_type(scheme, weights.0), vec![blocks])),
                (Part::Said, entry(BOOK, Dtype::F32, vec![16])),
            ];
            if scheme.format().scaling == Scaling::Nested {
                let absmax = vec![blocks.div_ceil(NESTED_BLOCK as u64)];
                parts.push((Part::Nested, entry(NESTED_ABSMAX, Dtype::F32, absmax)));
                parts.push((Part::Said, entry(NESTED_BOOK, Dtype::F32, vec![NESTED_VALUES.len() as u64])));
            }
            parts.push((Part::Said, entry(&format!("{STATE}{}", book.name()), Dtype::U8, vec![state])));
            parts
        }
        (Codes::Rowwise, _) => {
            let channels = weights.1.iter().take(scheme.channel_dims().get() as usize).product();
            vec![
                (Part::Codes, entry("weight", Dtype::I8, weights.1.to_vec())),
                (Part::Scales, entry(ROW_ABSMAX, Dtype::F32, vec![channels])),
                (Part::Said, entry(ROW_FORMAT, Dtype::U8, vec![])),
            ]
        }
        _ => return None,
    })
}

/// The bytes of a tensor that follows from a layer's scheme, type and shape, and from the mean of its scales where they are quantized too.
pub(crate) fn constant(name: &str, scheme: &Scheme, weights: (Dtype, &[u64]), offset: Option<f32>) -> Vec<u8> {
    match scheme.codes() {
        Codes::Codebook(_) if name.ends_with(NESTED_BOOK) => little_endian(NESTED_VALUES.iter().copied()),
        Codes::Codebook(book) if name.ends_with(BOOK) => book_bytes(book),
        Codes::Codebook(_) => said(scheme, weights, offset).into_bytes(),
        // Row by row.
        _ => vec![0],
    }
}

fn book_bytes(book: Codebook) -> Vec<u8> {
    // Its table has one zero, its kernels have two.
    little_endian(book.values().iter().map(|value| value + 0.0))
}

fn little_endian(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values.flat_map(f32::to_le_bytes).collect()
}

/// The state of a layer of four bits, as Python's `json.dumps` writes it; behind it spaces where a mean is shorter than the longest, since
/// where a file's tensors lie is known before any number of them.
fn said(scheme: &Scheme, (dtype, shape): (Dtype, &[u64]), offset: Option<f32>) -> String {
    let (Codes::Codebook(book), Granularity::Group(size)) = (scheme.codes(), scheme.granularity()) else {
        return String::new();
    };
    let shape = Vec::from_iter(shape.iter().map(u64::to_string)).join(", ");
    let (name, dtype) = (book.name(), word(dtype));
    let state = format!(r#"{{"quant_type": "{name}", "blocksize": {size}, "dtype": "{dtype}", "shape": [{shape}]"#);
    if scheme.format().scaling != Scaling::Nested {
        return format!("{state}}}");
    }
    let offset = format!("{:?}}}", f64::from(offset.unwrap_or_default()));
    format!(
        r#"{state}, "nested_blocksize": {NESTED_BLOCK}, "nested_dtype": "float32", "nested_offset": {offset:OFFSET_BYTES$}"#
    )
}

/// The longest mean and a brace: 17 digits, a point, an exponent of two digits and its sign.
const OFFSET_BYTES: usize = 17 + 1 + 4 + 1;

/// torch's word for a type of weights.
fn word(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::BF16 => "bfloat16",
        Dtype::F16 => "float16",
        _ => "float32",
    }
}

/// The `quantization_config` of a model of such layers, of which some are not converted.
pub(crate) fn configuration<'a>(
    config: &Map<String, Value>,
    scheme: &Scheme,
    mut all: impl Iterator<Item = &'a Scheme>,
    kept: &BTreeSet<String>,
) -> Value {
    let is_nested = all.any(|scheme| scheme.format().scaling == Scaling::Nested);
    let dtype = ["dtype", "torch_dtype"].iter().find_map(|key| config.get(*key)?.as_str());
    let book = match scheme.codes() {
        Codes::Codebook(book) => Some(book),
        _ => None,
    };
    // Of rows, what is said of four bits is the default.
    let computed = dtype.filter(|_| book.is_some()).unwrap_or("float32");
    // Patterns have no place here.
    let kept = Vec::from_iter(kept.iter().filter(|name| !name.starts_with("re:")));
    json!({
        "quant_method": "bitsandbytes",
        "load_in_4bit": book.is_some(),
        "load_in_8bit": book.is_none(),
        "_load_in_4bit": book.is_some(),
        "_load_in_8bit": book.is_none(),
        "bnb_4bit_quant_type": book.unwrap_or(Codebook::Fp4).name(),
        "bnb_4bit_compute_dtype": computed,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": is_nested,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": kept,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
    })
}

/// The module whose codes are a tensor, if bitsandbytes stored it.
pub(crate) fn module(source: &Source, name: &str, codes: &Tensor) -> Option<Result<Module, Wrong>> {
    let part = |part: &str| source.tensor(&format!("{name}.{part}")).cloned();
    let (rows, blocks) = (part(ROW_ABSMAX), part(ABSMAX));
    // One layout, or none is understood.
    let others = [SCALES_PART, DEEPSEEK_SCALES].into_iter().filter(|other| part(other).is_some());
    let found = others.chain(rows.as_ref().map(|_| ROW_ABSMAX)).chain(blocks.as_ref().map(|_| ABSMAX));
    match (rows, blocks, Vec::from_iter(found).as_slice()) {
        (None, None, _) => None,
        (_, _, [one, other, ..]) => Some(Err(format!("it has scales of two layouts, `{one}` and `{other}`").into())),
        (Some(scales), ..) => Some(rowwise(source, name, codes, scales, part(ROW_FORMAT))),
        (None, Some(scales), _) => Some(four_bits(source, name, codes, scales)),
    }
}

fn rowwise(
    source: &Source,
    name: &str,
    codes: &Tensor,
    scales: Tensor,
    format: Option<Tensor>,
) -> Result<Module, Wrong> {
    bounded(&codes.shape)?;
    let rows = |dims: &usize| codes.shape[..*dims].iter().product::<u64>();
    let dims = (1..codes.shape.len()).find(|dims| scales.shape == [rows(dims)]);
    let (true, Some(dims)) = (codes.dtype == Dtype::I8.into(), dims) else {
        let (dtype, shape) = (codes.dtype, &codes.shape);
        return Err(format!(
            "its codes are {dtype} {shape:?}, its scales {:?}: expected I8, one for each row",
            scales.shape
        )
        .into());
    };
    if scales.dtype != Dtype::F32.into() {
        return Err(format!("`{}` is {}: expected F32", scales.name, scales.dtype).into());
    }
    if let Some(format) = &format
        && (format.bytes() != 1 || source.read_whole(format)?[..] != [0])
    {
        return Err(
            format!("`{}` says that its codes do not lie row by row: this version reads those", format.name).into()
        );
    }
    let dims = if dims == 1 { String::new() } else { format!(";channel_dims={dims}") };
    let scheme = parsed(&format!("int8_rowwise{dims}"))?;
    let others = format.into_iter().collect();
    Ok(Module::of_parts(name, scheme, codes.shape.clone(), type_of_others(source), codes.clone(), scales, others))
}

/// What the weights of rows were is not said: what the rest of the file is, or f32, which holds all.
fn type_of_others(source: &Source) -> Dtype {
    let is_scale =
        |name: &str| [ROW_ABSMAX, ABSMAX, BOOK, NESTED_ABSMAX, NESTED_BOOK].iter().any(|part| name.ends_with(part));
    let others = source.tensors().iter().filter(|tensor| !is_scale(&tensor.name));
    let found = others.filter_map(|tensor| tensor.dtype.plain());
    { found }.find(|dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)).unwrap_or(Dtype::F32)
}

/// What a layer's state says.
#[derive(serde::Deserialize)]
struct State {
    quant_type: String,
    blocksize: u32,
    dtype: String,
    shape: Vec<u64>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f64>,
    nested_dtype: Option<String>,
}

fn four_bits(source: &Source, name: &str, codes: &Tensor, scales: Tensor) -> Result<Module, Wrong> {
    let part = |part: &str| source.tensor(&format!("{name}.{part}")).cloned();
    let (book, state) = match (part(&format!("{STATE}nf4")), part(&format!("{STATE}fp4"))) {
        (Some(state), None) => (Codebook::Nf4, state),
        (None, Some(state)) => (Codebook::Fp4, state),
        (None, None) => return Err(format!("it has `{ABSMAX}` but no `{STATE}nf4` or `{STATE}fp4` beside it").into()),
        (Some(_), Some(_)) => return Err(format!("it has both `{STATE}nf4` and `{STATE}fp4`").into()),
    };
    if state.dtype != Dtype::U8.into() || state.bytes() > STATE_BYTES_MAX {
        let (dtype, shape) = (state.dtype, &state.shape);
        return Err(format!("`{}` is {dtype} {shape:?}: expected U8, at most {STATE_BYTES_MAX}", state.name).into());
    }
    let said: State = serde_json::from_slice(&source.read_whole(&state)?)
        .map_err(|error| format!("`{}` is no state: {error}", state.name))?;
    if said.quant_type != book.name() {
        return Err(format!("`{}` says `{}`: expected `{}`", state.name, said.quant_type, book.name()).into());
    }
    let nested = match (said.nested_blocksize, said.nested_offset) {
        (None, None) => None,
        (Some(NESTED_BLOCK), Some(offset)) if (offset as f32).is_finite() => Some(offset as f32),
        (blocks, offset) => {
            return Err(format!(
                "`{}` says of its scales `nested_blocksize` {}, `nested_offset` {}: expected {NESTED_BLOCK} and a number of f32",
                state.name,
                blocks.map_or("none".to_owned(), |blocks| blocks.to_string()),
                offset.map_or("none".to_owned(), |offset| offset.to_string()),
            ).into());
        }
    };
    if let Some(dtype) = said.nested_dtype.as_deref().filter(|dtype| *dtype != "float32") {
        return Err(format!("`{}` says of its scales `nested_dtype` `{dtype}`: expected `float32`", state.name).into());
    }
    let double = if nested.is_some() { ";double_quant=true" } else { "" };
    let scheme = parsed(&format!("{}/g{}{double}", book.name(), said.blocksize))?;
    let dtype = match said.dtype.as_str() {
        "bfloat16" => Dtype::BF16,
        "float16" => Dtype::F16,
        "float32" => Dtype::F32,
        other => return Err(format!("its weights were `{other}`: expected bfloat16, float16 or float32").into()),
    };
    let columns = bounded(&said.shape)?;
    if !columns.is_multiple_of(u64::from(said.blocksize)) {
        return Err(format!("its blocks of {} cross the rows of shape {:?}", said.blocksize, said.shape).into());
    }
    if codes.dtype != Dtype::U8.into() {
        return Err(format!(
            "its codes are stored as {} (`bnb_4bit_quant_storage`): this version reads U8 (`uint8`)",
            codes.dtype
        )
        .into());
    }
    let expected = layout(name, &scheme, (dtype, &said.shape)).unwrap_or_default();
    let [(_, of_codes), (_, of_scales), ..] = expected.as_slice() else {
        return Err(format!("`{scheme}` is not one of bitsandbytes'").into());
    };
    let of_nested = expected.iter().find(|(part, _)| *part == Part::Nested).map(|(_, entry)| entry);
    let nested = match (nested, of_nested) {
        (Some(offset), Some(entry)) => {
            let absmax = part(NESTED_ABSMAX).ok_or_else(|| format!("it has no `{}`", entry.0))?;
            Some((absmax, offset, entry))
        }
        _ => None,
    };
    let parts = [(codes, of_codes), (&scales, of_scales)];
    for (found, entry) in parts.into_iter().chain(nested.as_ref().map(|(absmax, _, entry)| (absmax, *entry))) {
        if (found.dtype, &found.shape) != (entry.1, &entry.2) {
            let (name, dtype, shape) = (&found.name, found.dtype, &found.shape);
            return Err(format!("`{name}` is {dtype} {shape:?}: expected {} {:?}", entry.1, entry.2).into());
        }
    }
    let mut others = vec![state];
    if let Some(map) = part(BOOK) {
        if map.bytes() != 64 || source.read_whole(&map)?[..] != book_bytes(book) {
            return Err(format!("`{}` is not the codebook of `{scheme}`", map.name).into());
        }
        others.push(map);
    }
    let nested = match nested {
        Some((absmax, offset, _)) => {
            let map = part(NESTED_BOOK);
            let values = map.as_ref().map(|map| nested_book(source, map)).transpose()?;
            others.extend(map);
            Some(NestedScales { absmax, values: values.unwrap_or_else(|| NESTED_VALUES.to_vec()), offset })
        }
        None => None,
    };
    Ok(Module::of_parts(name, scheme, said.shape, dtype, codes.clone(), scales, others).with_nested(nested))
}

/// What the bytes of scales stand for, by the file's own word: torch rounds some of it otherwise on a CPU without FMA.
fn nested_book(source: &Source, map: &Tensor) -> Result<Vec<f32>, Wrong> {
    let wrong = || format!("`{}` is not a codebook of 256 rising F32 from -1 to 1", map.name);
    if map.dtype != Dtype::F32.into() || map.shape != [NESTED_VALUES.len() as u64] {
        return Err(wrong().into());
    }
    let bytes = source.read_whole(map)?;
    let values = Vec::from_iter(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
    let is_one = values.is_sorted_by(|low, high| low < high) && values.iter().all(|value| (-1.0..=1.0).contains(value));
    if is_one { Ok(values) } else { Err(wrong().into()) }
}

/// The columns of a shape of two dimensions or more, below 2^48 elements.
fn bounded(shape: &[u64]) -> Result<u64, String> {
    // Zeros as ones: so no product of some of them overflows either.
    let product = shape.iter().try_fold(1u64, |all, dimension| all.checked_mul((*dimension).max(1)));
    match (product.is_some_and(|elements| elements < 1 << 48), shape) {
        (true, [_, columns @ ..]) if !columns.is_empty() => Ok(columns.iter().product()),
        _ => Err(format!("its shape {shape:?} is not one of two dimensions or more, below 2^48 elements")),
    }
}

fn parsed(scheme: &str) -> Result<Scheme, String> {
    scheme.parse().map_err(|error: SchemeError| error.to_string())
}
