//! What the fuzz targets share: inputs cut into parts, parts made into files, and the calls that open them.
//!
//! A target (`targets/`) is a reader of bytes from outside, and promises what its first lines say. What is wrong with an input must come back as an error:
//! a panic, an input that takes two seconds, and an allocation of 256 MiB end the run (`make fuzz`). `bin/seeds.rs` writes what each one starts from.
//!
//! libFuzzer's macro makes functions with unmangled names, which are `unsafe` by the book; none of it is written here.

#![forbid(unsafe_code)]

use std::{
    backtrace::Backtrace,
    env,
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    panic,
    path::{Path, PathBuf},
    process,
};

use quarrel_checkpoint::{CheckpointError, Ends, Estimate, Gate, Job, Limits, Location, Model, Replace, Source, Stop};
use quarrel_proto::v1;
use serde_json::{Map, Value};

/// Between the parts of an input. No text holds it, and a mutation seldom hits all of it.
pub const MARK: [u8; 4] = [0xff, b'Q', b'F', 0xfe];
/// Between a file's header and its data.
const HEAD: [u8; 4] = [0xff, b'Q', b'H', 0xfe];
/// A file's data at most.
const DATA_BYTES_MAX: u64 = 1 << 20;

/// The parts of an input.
pub fn parts(input: &[u8]) -> impl Iterator<Item = &[u8]> {
    cut(input, MARK)
}

fn cut(input: &[u8], mark: [u8; 4]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(input);
    std::iter::from_fn(move || {
        let whole = rest?;
        let at = whole.windows(mark.len()).position(|bytes| bytes == mark);
        let (part, after) = at.map_or((whole, None), |at| (&whole[..at], Some(&whole[at + mark.len()..])));
        rest = after;
        Some(part)
    })
}

/// How a part is made into a file of safetensors: a length or an offset would hardly ever survive a mutation beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// It is the file.
    Raw,
    /// It is the header and the data; their lengths are written before the one and cut from the other.
    Framed,
    /// The offsets of the tensors are written as well, where the header can be read.
    Placed,
}

impl Made {
    const ALL: [Made; 3] = [Made::Raw, Made::Framed, Made::Placed];

    /// The part that is made so of a header and data.
    pub fn part(self, header: &str, data: &[u8]) -> Vec<u8> {
        let head = (header.len() as u64).to_le_bytes();
        let first = Made::ALL.iter().position(|made| *made == self).unwrap_or_default() as u8;
        match self {
            Made::Raw => [&[first][..], &head, header.as_bytes(), data].concat(),
            Made::Framed | Made::Placed => [&[first][..], header.as_bytes(), &HEAD, data].concat(),
        }
    }
}

/// A file: its first bytes, and how long it is. What is between is a hole.
struct Bytes {
    first: Vec<u8>,
    length: u64,
}

fn file(part: &[u8]) -> Bytes {
    let Some((made, rest)) = part.split_first() else { return Bytes { first: Vec::new(), length: 0 } };
    let made = Made::ALL[usize::from(*made) % Made::ALL.len()];
    if made == Made::Raw {
        return Bytes { first: rest.to_owned(), length: rest.len() as u64 };
    }
    let mut both = cut(rest, HEAD);
    let (mut header, data) = (both.next().unwrap_or_default().to_owned(), both.next().unwrap_or_default());
    let mut tensors = serde_json::from_slice::<Map<String, Value>>(&header).unwrap_or_default();
    if made == Made::Placed && place(&mut tensors) {
        header = Value::Object(tensors.clone()).to_string().into_bytes();
    }
    let ends = tensors.values().filter_map(|tensor| tensor["data_offsets"][1].as_u64());
    let length = ends.max().unwrap_or(data.len() as u64).min(DATA_BYTES_MAX);
    let data = &data[..data.len().min(length as usize)];
    let first = [&(header.len() as u64).to_le_bytes()[..], &header, data].concat();
    Bytes { length: 8 + header.len() as u64 + length, first }
}

/// Puts tensors one after the other, whatever their offsets were; false if nothing was said.
fn place(tensors: &mut Map<String, Value>) -> bool {
    let mut end = 0u64;
    for tensor in tensors.values_mut().filter(|tensor| tensor["shape"].is_array()) {
        let bits = tensor["dtype"].as_str().map_or(8, bits);
        let shape = tensor["shape"].as_array().into_iter().flatten().map(Value::as_u64);
        let bits = shape.fold(Some(bits), |bits, dimension| bits?.checked_mul(dimension?));
        let start = end;
        end += bits.map_or(0, |bits| bits / 8).min(DATA_BYTES_MAX);
        tensor["data_offsets"] = serde_json::json!([start, end]);
    }
    end > 0
}

fn bits(dtype: &str) -> u64 {
    match dtype {
        "F64" | "I64" | "U64" | "C64" => 64,
        "F32" | "I32" | "U32" => 32,
        "F16" | "BF16" | "I16" | "U16" => 16,
        "F6_E2M3" | "F6_E3M2" => 6,
        "F4" => 4,
        _ => 8,
    }
}

/// A folder of this process, in which each input has its files.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Default for Folder {
    fn default() -> Folder {
        Folder(env::temp_dir().join(format!("quarrel-fuzz-{}", process::id())))
    }
}

impl Folder {
    /// Where a file of it is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Empties it.
    ///
    /// # Panics
    /// If the disk does not do what it is told.
    pub fn clear(&self) {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => panic!("{}: {error}", self.0.display()),
            _ => fs::create_dir_all(&self.0).expect("a folder for the files of an input"),
        }
    }

    /// Writes a file.
    ///
    /// # Panics
    /// If the disk does not do what it is told.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        fs::create_dir_all(&self.0).expect("a folder for the files of an input");
        fs::write(self.path(name), bytes).expect("a file of an input");
    }

    /// Writes a model, and nothing else: each part is a file, and an empty one a file that is missing.
    ///
    /// # Panics
    /// If the disk does not do what it is told.
    pub fn put_model(&self, input: &[u8]) {
        self.clear();
        let files = ["model.safetensors.index.json", "config.json", "a.safetensors", "b.safetensors"];
        for (name, part) in files.into_iter().zip(parts(input)).filter(|(_, part)| !part.is_empty()) {
            match name.ends_with(".json") {
                true => self.put(name, part),
                false => self.put_tensors(name, part),
            }
        }
    }

    /// Writes what a part says as a file of safetensors ([`Made`]).
    ///
    /// # Panics
    /// If the disk does not do what it is told.
    pub fn put_tensors(&self, name: &str, part: &[u8]) {
        let bytes = file(part);
        self.put(name, &[]);
        let out = File::options().write(true).open(self.path(name)).expect("a file of an input");
        out.write_all_at(&bytes.first, 0).expect("a file of an input");
        out.set_len(bytes.length).expect("a file of an input");
    }
}

/// Small ones: what is larger would only take longer.
pub const LIMITS: Limits = Limits {
    message_bytes_max: 1 << 20,
    span_bytes_max: 1 << 20,
    batch_rows_max: 1 << 10,
    layers_max: 1 << 10,
    name_bytes_max: 1 << 10,
};

/// libFuzzer's crate ends the process at every panic: those that readers turn into errors are none, and reach no hook.
pub fn contain() {
    panic::set_hook(Box::new(|panicked| eprintln!("{panicked}\n{}", Backtrace::force_capture())));
}

/// Opens a file.
///
/// # Errors
/// Those of [`Source::open`].
pub fn open_source(path: &Path) -> Result<Source, CheckpointError> {
    Source::open(&Location::disk(path))
}

/// Opens a model.
///
/// # Errors
/// Those of [`Model::open`].
pub fn open_model(path: &Path) -> Result<Model, CheckpointError> {
    Model::open(&Location::disk(path))
}

/// What a job would make of a model.
///
/// # Errors
/// Those of [`quarrel_checkpoint::estimate`].
pub fn estimate(path: &Path, command: &v1::Quantize) -> Result<Estimate, CheckpointError> {
    quarrel_checkpoint::estimate(&Location::disk(path), command.clone(), None, 48 << 20)
}

/// Opens a job that quantizes.
///
/// # Errors
/// Those of [`Job::open`].
pub fn open_job(from: &Path, to: &Path, command: v1::Quantize) -> Result<Job, CheckpointError> {
    let (source, destination) = (Location::disk(from), Location::disk(to));
    let ends = Ends { source: &source, destination: &destination, metadata: None };
    Job::open(ends, command, (Replace::Never, Gate::default()), &Stop::default())
}

/// Opens a job that dequantizes.
///
/// # Errors
/// Those of [`Job::open_dense`].
pub fn open_dense_job(from: &Path, to: &Path) -> Result<Job, CheckpointError> {
    Job::open_dense(&Location::disk(from), &Location::disk(to), None, Replace::Never, &Stop::default())
}
