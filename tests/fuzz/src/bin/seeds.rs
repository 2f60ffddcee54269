//! Writes what the targets start from into the folder that it is given: small inputs that are right, and words.
//!
//! Nothing of it is tracked: what a layout is stands in code once, here as shapes.

#![forbid(unsafe_code)]

use std::{env, error::Error, fmt::Write as _, fs, path::Path, sync::Arc};

use arrow_array::{
    ArrayRef, Float32Array, LargeListArray, RecordBatch, StringArray,
    types::{Float32Type, Int64Type},
};
use arrow_schema::{DataType, Field};
use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, Encoding, GzipLevel, ZstdLevel},
    file::properties::{WriterProperties, WriterVersion},
    schema::types::ColumnPath,
};
use prost::Message;
use quarrel_checkpoint::modules;
use quarrel_engine::{Cancel, Intake, Level, Limits, Need, Output, PRESETS, Plan};
use quarrel_fuzz::{Folder, MARK, Made, open_model, open_source};
use quarrel_proto::command;
use quarrel_shelf::Shelf;
use quarrel_wire::{Encoder, FrameOut, pieces, schema_frame};

type Failed = Box<dyn Error>;

/// A tensor: its name, type, shape and bytes for each element of its file.
type Tensor = (&'static str, &'static str, &'static [u64], u64);

/// Files, each of one kind: dense, and in the layouts that are read. Tensors stand in the order of their names, in which they are placed.
const FILES: [&[Tensor]; 14] = [
    &[("m.weight", "F32", &[2, 4], 4), ("m.bias", "F16", &[2], 2), ("n", "I64", &[], 8), ("e", "BF16", &[0, 3], 2)],
    &[("m.q_proj.weight", "BF16", &[2, 32], 2), ("m.k_proj.weight", "BF16", &[2, 32], 2)],
    &[
        ("m.weight_packed", "I32", &[4, 16], 4),
        ("m.weight_scale", "F16", &[4, 1], 2),
        ("m.weight_shape", "I64", &[2], 8),
    ],
    &[
        ("m.weight_packed", "I32", &[8, 8], 4),
        ("m.weight_scale", "BF16", &[8, 2], 2),
        ("m.weight_shape", "I64", &[2], 8),
        ("m.weight_zero_point", "I32", &[1, 2], 4),
    ],
    &[("m.weight", "I8", &[4, 6], 1), ("m.weight_scale", "F32", &[4, 1], 4)],
    &[("m.weight", "F8_E4M3", &[3, 5], 1), ("m.weight_scale", "BF16", &[1, 1], 2)],
    &[
        ("m.weight_packed", "U8", &[2, 16], 1),
        ("m.weight_scale", "F8_E4M3", &[2, 2], 1),
        ("m.weight_global_scale", "F32", &[1], 4),
    ],
    &[("m.weight_packed", "U8", &[2, 16], 1), ("m.weight_scale", "U8", &[2, 1], 1)],
    &[("m.weight_packed", "U8", &[2, 24], 1), ("m.weight_scale", "U8", &[2, 1], 1)],
    &[("m.weight", "F8_E4M3", &[2, 32], 1), ("m.weight_scale", "U8", &[2, 1], 1)],
    &[("m.weight", "F8_E4M3", &[3, 5], 1), ("m.weight_scale_inv", "F32", &[1, 1], 4)],
    &[("m.SCB", "F32", &[2], 4), ("m.weight", "I8", &[2, 8], 1)],
    &[
        ("m.weight", "U8", &[32, 1], 1),
        ("m.weight.absmax", "F32", &[2], 4),
        ("m.weight.quant_state.bitsandbytes__nf4", "U8", &[160], 1),
    ],
    &[
        ("m.weight", "U8", &[32, 1], 1),
        ("m.weight.absmax", "U8", &[2], 1),
        ("m.weight.nested_absmax", "F32", &[1], 4),
        ("m.weight.quant_state.bitsandbytes__fp4", "U8", &[160], 1),
    ],
];

/// What is said of blocks of bitsandbytes, in the files that have them.
const STATES: [(usize, &str); 2] = [
    (12, r#"{"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [2, 32]}"#),
    (
        13,
        r#"{"quant_type": "fp4", "blocksize": 32, "dtype": "float16", "shape": [2, 32], "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}"#,
    ),
];

/// The shape that `weight_shape` holds, in the files that have one.
const SHAPES: [(usize, [i64; 2]); 2] = [(2, [4, 128]), (3, [8, 64])];

const COMMANDS: [&str; 6] = [
    r#"{"quantize":{"scheme":"int8"}}"#,
    r#"{"quantize":{"scheme":"int4/g32","on_indivisible":"keep","arith":"weight-dtype","on_error":"continue","return_kept":true}}"#,
    r#"{"quantize":{"recipe":{"rules":[{"targets":["re:.*proj","*.m{a,b}"],"scheme":"NVFP4A16","amax":2.5},{"targets":["Linear"],"scheme":"int2/g64","fallback":{"schemes":["int8"],"sqnr_db_min":18}}],"ignore":["@standard","lm_head"]}}}"#,
    r#"{"quantize":{"profile":"edge"}}"#,
    r#"{"quantize":{"scheme":"fp8/b128x128","channel_dims":2}}"#,
    r#"{"dequantize":{"dtype":"bf16"}}"#,
];

/// Those of streams: patterns take longer to compile than all the rest.
const STREAMED: [&str; 5] = [
    COMMANDS[0],
    COMMANDS[1],
    r#"{"quantize":{"scheme":"int2/g16","on_error":"continue","fallback":{"schemes":["int4/g16","int8"],"sqnr_db_min":18}}}"#,
    r#"{"quantize":{"scheme":"NVFP4A16","return_kept":true}}"#,
    COMMANDS[4],
];

const SCHEMES: [&str; 14] = [
    "int8",
    "int4-asym/g32",
    "int3/tensor;channel_dims=2",
    "fp8/b128x128",
    "fp8/channel",
    "W4A16/g64",
    "W4A16;solver=mse",
    "NVFP4A16",
    "MXFP4A16;mx=rceil",
    "MXFP6A16",
    "MXFP8A16",
    "int5/channel;solver=absmax",
    "int4-asym/g64;solver=hqq",
    "nf4/g32;channel_dims=2;double_quant=true",
];

fn main() -> Result<(), Failed> {
    let folder = env::args().nth(1).ok_or("expected the folder to write into")?;
    let put = |target: &str, seeds: Vec<Vec<u8>>| -> Result<(), Failed> {
        let folder = Path::new(&folder).join(target);
        fs::create_dir_all(&folder)?;
        for (at, seed) in seeds.iter().enumerate() {
            fs::write(folder.join(format!("seed-{at}")), seed)?;
        }
        Ok(())
    };
    let (files, models) = (files(), models());
    are_right(&files, &models)?;
    put("safetensors", files)?;
    put("model", models)?;
    put(
        "gguf",
        vec![
            gguf(3, 32, &[(0, &[4, 2], 32)]),
            gguf(2, 64, &[(8, &[32, 2], 68), (30, &[2, 2, 2], 16), (16, &[256], 66)]),
        ],
    )?;
    put("command", commands()?)?;
    put("scheme", SCHEMES.map(|scheme| scheme.as_bytes().to_vec()).to_vec())?;
    let streams = streams()?;
    put("frames", frames(&streams)?)?;
    put("stream", streams.iter().map(Stream::joined).collect())?;
    let columns = streams.iter().map(Stream::file).chain(streams.iter().map(Stream::messages)).chain(tables()?);
    put("columns", columns.collect())?;
    fs::write(Path::new(&folder).join("words"), words()?)?;
    Ok(())
}

/// A seed that is refused at the door would teach nothing.
fn are_right(files: &[Vec<u8>], models: &[Vec<u8>]) -> Result<(), Failed> {
    let folder = Folder::default();
    for (at, part) in files.iter().enumerate() {
        folder.put_tensors("x.safetensors", part);
        let found = modules(&open_source(&folder.path("x.safetensors"))?)?.len();
        let coded = usize::from((2..FILES.len()).contains(&at) || at >= FILES.len() + 2);
        assert_eq!(found, coded, "seed {at}");
    }
    for model in models {
        folder.put_model(&model[1..]);
        open_model(&folder.path(""))?;
    }
    folder.clear();
    Ok(())
}

/// A GGUF file with keys of each kind, and these tensors: type, dimensions, bytes.
fn gguf(version: u32, alignment: u32, tensors: &[(u32, &[u64], usize)]) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let key = |name: &str, kind: u32, value: &[u8]| [text(name).as_slice(), &kind.to_le_bytes(), value].concat();
    let list = [&8u32.to_le_bytes()[..], &1u64.to_le_bytes(), &text("t")].concat();
    let keys = [
        key("general.architecture", 8, &text("llama")),
        key("llama.block_count", 4, &1u32.to_le_bytes()),
        key("general.alignment", 4, &alignment.to_le_bytes()),
        key("tokenizer.ggml.tokens", 9, &list),
    ];
    let counts = [tensors.len() as u64, keys.len() as u64].map(u64::to_le_bytes).concat();
    let mut file = [&b"GGUF"[..], &version.to_le_bytes(), &counts, &keys.concat()].concat();
    let (mut offset, align) = (0usize, alignment as usize);
    for (at, (kind, dimensions, bytes)) in tensors.iter().enumerate() {
        file.extend(text(&format!("blk.0.{at}.weight")));
        file.extend((dimensions.len() as u32).to_le_bytes());
        file.extend(dimensions.iter().flat_map(|dimension| dimension.to_le_bytes()));
        file.extend(kind.to_le_bytes());
        file.extend((offset as u64).to_le_bytes());
        offset = (offset + bytes).next_multiple_of(align);
    }
    file.resize(file.len().next_multiple_of(align) + offset, 0x11);
    file
}

fn header(at: usize, metadata: &str) -> String {
    let mut start = 0;
    let mut header = format!("{{{metadata}");
    for (name, dtype, shape, size) in FILES[at] {
        let end = start + size * shape.iter().product::<u64>();
        let comma = if header.len() > 1 { "," } else { "" };
        let _ =
            write!(header, r#"{comma}"{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#);
        start = end;
    }
    header + "}"
}

/// Of every kind, as a part made so.
fn part(at: usize, made: Made, metadata: &str) -> Vec<u8> {
    let mut data = Vec::new();
    for (name, _, shape, size) in FILES[at] {
        let bytes = size * shape.iter().product::<u64>();
        let shape = SHAPES.iter().find(|(of, _)| *of == at && name.ends_with("weight_shape"));
        let state = STATES.iter().find(|(of, _)| *of == at && name.contains("quant_state"));
        match (shape, state) {
            (Some((_, shape)), _) => data.extend(shape.iter().flat_map(|dimension| dimension.to_le_bytes())),
            (_, Some((_, state))) => data.extend(format!("{state:width$}", width = bytes as usize).bytes()),
            _ => data.extend((0..bytes).map(|byte| (byte % 64) as u8)),
        }
    }
    made.part(&header(at, metadata), &data)
}

fn files() -> Vec<Vec<u8>> {
    let said = r#""__metadata__":{"format":"pt","quarrel.schemes":"{\"W4A16\":[\"m\"]}"}"#;
    let plain = (0..FILES.len()).map(|at| part(at, Made::Placed, ""));
    let others =
        [part(0, Made::Raw, ""), part(0, Made::Framed, ""), part(2, Made::Placed, said), part(2, Made::Raw, "")];
    plain.chain(others).collect()
}

fn models() -> Vec<Vec<u8>> {
    let index = r#"{"metadata":{"total_size":96},"weight_map":{"m.weight":"a.safetensors","m.bias":"a.safetensors","n":"a.safetensors","e":"a.safetensors","m.q_proj.weight":"b.safetensors","m.k_proj.weight":"b.safetensors"}}"#;
    let config = r#"{"model_type":"llama","torch_dtype":"bfloat16","text_config":{"hidden_size":32}}"#;
    let coded = r#"{"weight_map":{"m.weight_packed":"a.safetensors","m.weight_scale":"a.safetensors"}}"#;
    let model = |scheme: u8, index: &str, config: &str, shards: [&[u8]; 2]| {
        let parts = [index.as_bytes(), config.as_bytes(), shards[0], shards[1]];
        [vec![scheme], parts.join(&MARK[..])].concat()
    };
    let (dense, fused) = (part(0, Made::Placed, ""), part(1, Made::Placed, ""));
    let mut models = Vec::from_iter((0..7).map(|scheme| model(scheme, index, config, [&dense, &fused])));
    models.push(model(1, "", "", [&[], &fused]));
    models.push(model(0, coded, "{}", [&part(6, Made::Placed, ""), &[]]));
    models.push(model(0, "", r#"{"quantization_config":{}}"#, [&part(2, Made::Raw, ""), &[]]));
    models
}

fn commands() -> Result<Vec<Vec<u8>>, Failed> {
    let mut seeds = Vec::new();
    for text in COMMANDS {
        seeds.push(text.as_bytes().to_vec());
        seeds.push(command::parse(text.as_bytes())?.encode_to_vec());
    }
    Ok(seeds)
}

/// A request: its command, and frames.
struct Stream {
    command: Vec<u8>,
    frames: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Stream {
    fn new(command: &str, batches: &[RecordBatch]) -> Result<Stream, Failed> {
        let schema = batches.first().ok_or("a stream has batches")?.schema();
        let mut encoder = Encoder::new(&schema)?;
        let mut frames = vec![schema_frame(&schema)];
        for batch in batches {
            frames.extend(encoder.batch(batch, Vec::new())?);
        }
        let flat = |frame: FrameOut| {
            let body = frame.body.iter().flat_map(|buffer| buffer.as_slice()).copied().collect();
            (frame.header.to_vec(), body)
        };
        Ok(Stream { command: command.into(), frames: frames.into_iter().map(flat).collect() })
    }

    /// As a file in the format of streams.
    fn messages(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (header, body) in &self.frames {
            let padded = header.len().next_multiple_of(8);
            bytes.extend_from_slice(&[0xff; 4]);
            bytes.extend_from_slice(&(padded as u32).to_le_bytes());
            bytes.extend_from_slice(header);
            bytes.resize(bytes.len() + padded - header.len(), 0);
            bytes.extend_from_slice(body);
        }
        bytes
    }

    /// As a file, without its footer.
    fn file(&self) -> Vec<u8> {
        [&b"ARROW1\0\0"[..], &self.messages(), &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]].concat()
    }

    fn joined(&self) -> Vec<u8> {
        let frames = self.frames.iter().flat_map(|(header, body)| [&header[..], &body[..]]);
        Vec::from_iter([&self.command[..]].into_iter().chain(frames)).join(&MARK[..])
    }
}

/// Weights: of a fixed size, and of shapes.
fn weights() -> Result<(RecordBatch, RecordBatch), Failed> {
    let shapes = || {
        let shape = |rows: i64| Some(vec![Some(rows), Some(128)]);
        arrow_array::ListArray::from_iter_primitive::<Int64Type, _, _>([shape(2), shape(2), shape(1)])
    };
    let row = |from: f32| Some((0..128).map(|at| Some(from + at as f32)).collect::<Vec<_>>());
    let weights = LargeListArray::from_iter_primitive::<Float32Type, _, _>([row(-3.5), row(0.25), row(7.0)]);
    let names = StringArray::from(vec!["m.up_proj.weight", "m.up_proj.weight", "m.norm"]);
    let whole: Vec<(&str, ArrayRef)> =
        vec![("layer_name", Arc::new(names.clone())), ("weights", Arc::new(weights)), ("shape", Arc::new(shapes()))];
    let whole = RecordBatch::try_from_iter(whole)?;
    let field = Arc::new(Field::new("item", DataType::Float32, false));
    let fixed = arrow_array::FixedSizeListArray::new(field, 4, Arc::new(Float32Array::from(vec![1.0; 12])), None);
    let views = arrow_array::StringViewArray::from(vec!["a", "b", "a name that is longer than a view"]);
    let fixed = RecordBatch::try_from_iter(vec![
        ("layer_name", Arc::new(views) as ArrayRef),
        ("weights", Arc::new(fixed) as ArrayRef),
    ])?;
    Ok((fixed, whole))
}

/// The same as Parquet: both versions of pages, every encoding and codec that a writer of ours knows.
fn tables() -> Result<Vec<Vec<u8>>, Failed> {
    let (fixed, whole) = weights()?;
    let plain = || WriterProperties::builder().set_dictionary_enabled(false);
    let compressed = |codec| WriterProperties::builder().set_compression(codec).build();
    let column = ColumnPath::from("layer_name");
    let items = ColumnPath::new(["weights", "list", "item"].map(str::to_owned).to_vec());
    let written = [
        WriterProperties::default(),
        WriterProperties::builder().set_writer_version(WriterVersion::PARQUET_2_0).build(),
        plain().build(),
        plain()
            .set_writer_version(WriterVersion::PARQUET_2_0)
            .set_column_encoding(items, Encoding::BYTE_STREAM_SPLIT)
            .build(),
        plain().set_column_encoding(column.clone(), Encoding::DELTA_BYTE_ARRAY).build(),
        plain().set_column_encoding(column, Encoding::DELTA_LENGTH_BYTE_ARRAY).build(),
        compressed(Compression::SNAPPY),
        compressed(Compression::LZ4_RAW),
        compressed(Compression::ZSTD(ZstdLevel::default())),
        compressed(Compression::GZIP(GzipLevel::default())),
        plain().set_compression(Compression::SNAPPY).set_writer_version(WriterVersion::PARQUET_2_0).build(),
    ];
    let mut seeds = Vec::new();
    for properties in written {
        for batch in [&fixed, &whole] {
            let Ok(mut writer) = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties.clone())) else {
                continue;
            };
            // Not every encoding is for every type.
            if writer.write(batch).is_ok() {
                seeds.push(writer.into_inner()?);
            }
        }
    }
    assert!(seeds.len() > 12, "{} seeds of Parquet", seeds.len());
    Ok(seeds)
}

/// Weights in every command of the list, and the answers of some as codes.
fn streams() -> Result<Vec<Stream>, Failed> {
    let (fixed, whole) = weights()?;
    let mut streams = vec![Stream::new(COMMANDS[0], std::slice::from_ref(&fixed))?];
    for command in STREAMED {
        streams.push(Stream::new(command, &[whole.slice(0, 1), whole.slice(1, 2)])?);
    }
    // Layers of rank 2 have one channel dimension.
    for scheme in SCHEMES.iter().filter(|scheme| !scheme.contains("channel_dims")) {
        let command = format!(r#"{{"quantize":{{"scheme":"{scheme}"}}}}"#);
        streams.push(Stream::new(COMMANDS[5], &answers(&command, &whole)?)?);
    }
    Ok(streams)
}

/// What a server answers.
fn answers(text: &str, batch: &RecordBatch) -> Result<Vec<RecordBatch>, Failed> {
    let plan = Plan::new(&command::parse(text.as_bytes())?)?;
    let limits = Limits {
        message_bytes_max: 1 << 20,
        span_bytes_max: 1 << 20,
        batch_rows_max: 100,
        layers_max: 100,
        name_bytes_max: 100,
    };
    let mut output = Output::new(&plan, Arc::new(Output::schema(&plan)));
    let mut intake = Intake::new(&plan, limits, &batch.schema()).map_err(|error| format!("{error:?}"))?;
    intake.begin(batch).map_err(|error| format!("{error:?}"))?;
    let mut batches = Vec::new();
    while let Some(need) = intake.next().map_err(|error| format!("{error:?}"))? {
        let Need::Unit(unit) = need else { continue };
        let result =
            unit.compute(Level::detect(), &Cancel::default(), &Shelf::default()).map_err(|_| "nobody cancels")?;
        batches.extend(output.take(result).0.into_iter().map(|answer| answer.batch));
    }
    Ok(batches)
}

/// The same streams as gRPC messages.
fn frames(streams: &[Stream]) -> Result<Vec<Vec<u8>>, Failed> {
    let mut seeds = Vec::new();
    for (stream, cuts) in streams.iter().zip([&[255][..], &[1], &[7, 3], &[64, 1, 200]].into_iter().cycle()) {
        let mut bytes = Vec::new();
        for (header, body) in &stream.frames {
            let frame = FrameOut {
                descriptor: stream.command.clone().into(),
                header: header.clone().into(),
                body: vec![body.clone().into()],
                ..FrameOut::default()
            };
            pieces(frame)?.iter().for_each(|piece| bytes.extend_from_slice(piece));
        }
        seeds.push([cuts, &MARK, &bytes].concat());
    }
    Ok(seeds)
}

/// What a mutation may write: the words of the formats, as libFuzzer reads them.
fn words() -> Result<String, Failed> {
    let texts = "PAR1 ARROW:schema F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F6_E2M3 F4 I64 I32 I8 U8 BOOL dtype shape data_offsets __metadata__ weight weight_packed \
                 weight_scale weight_shape weight_zero_point weight_global_scale weight_g_idx .absmax .nested_absmax .quant_state.bitsandbytes__nf4 quant_type blocksize nested_blocksize nested_offset SCB qweight q_proj k_proj v_proj gate_proj up_proj \
                 weight_map metadata a.safetensors b.safetensors config.json quantization_config model_type gpt2 \
                 quarrel.schemes quantize dequantize measure scheme recipe rules targets ignore fallback schemes sqnr_db_min \
                 cosine_min amax profile edge group_size channel_dims on_indivisible keep re:.* @standard Linear \
                 ;channel_dims= ;double_quant=true ;solver=mse ;mx=even /channel /tensor /g -asym \
                 1152921504606846976 18446744073709551615 9223372036854775807 281474976710656 4294967296";
    let numbers = [1u64 << 60, 1 << 63, 1 << 48, 1 << 32, u64::MAX].map(u64::to_le_bytes);
    let texts = texts.split_whitespace().map(str::as_bytes).chain(PRESETS.iter().map(|preset| preset.name.as_bytes()));
    let all = texts.chain(numbers.iter().map(|number| &number[..])).chain([&MARK[..]]);
    let mut words = String::new();
    for word in all {
        let escaped = word.iter().fold(String::new(), |text, byte| text + &format!("\\x{byte:02x}"));
        writeln!(words, "\"{escaped}\"")?;
    }
    Ok(words)
}
