//! What can be said on the command line.

use std::{
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
};

use clap::{Args as Group, Parser, Subcommand, ValueEnum};
use quarrel_flight::{Config, Level, LogFormat};

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    a fault in Quarrel: please report it
  2    the command line, the scheme or the recipe is wrong
  3    the file, or a layer in it, cannot be worked on
  4    no server there, or it has no room now: try again later
  5    the system refused to read or write
  6    done, but layers failed (`--on-error continue`); they are in the file as they were
  7    a layer is worse than `--sqnr-db-min` or `--cosine-min`: no checkpoint was written
  129, 130, 143  stopped by SIGHUP, Ctrl-C, SIGTERM: nothing is left behind, but of a folder what is complete; the
       same command goes on from there";

/// Quantizes neural-network weights, here or on an Arrow Flight server.
#[derive(Debug, Parser)]
#[command(name = "quarrel", version, propagate_version = true, after_help = EXIT_CODES)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the Arrow Flight server
    ///
    /// The first line on standard output says where it listens; logs go to standard error. SIGTERM and Ctrl-C stop it:
    /// running streams have `--drain-seconds` to end.
    Serve(Box<ServeArgs>),
    /// Quantize a checkpoint: a safetensors file or a model's folder in, the same in the layout of compressed-tensors out; or GGUF in and out
    ///
    /// Of a folder, all other files are copied, and `config.json` says what transformers and vLLM must know. Stopped, the
    /// same command goes on where it was. Every layer is measured; a report in JSON is written beside the result. Either end may be a file of layers in columns,
    /// Parquet or Arrow IPC, the source a folder of such files. With `--scheme`, embeddings, output heads,
    /// norms and routers stay as they are, and so do layers whose columns a group does not divide. To a file `.gguf`, `--scheme` is what `llama-quantize` calls a
    /// type (`Q4_K_M`), and makes its tensors, byte for byte.
    #[command(after_help = EXIT_CODES)]
    Quantize(Box<QuantizeArgs>),
    /// Say what `quantize` would make, from headers alone: schemes, sizes, bits per weight, memory
    #[command(after_help = EXIT_CODES)]
    Estimate(Box<EstimateArgs>),
    /// Compute a dense checkpoint from a quantized one: a file or a model's folder
    #[command(after_help = EXIT_CODES)]
    Dequantize(Box<DequantizeArgs>),
    /// List the tensors of a checkpoint, and which layers of it are quantized how
    #[command(after_help = EXIT_CODES)]
    Inspect(InspectArgs),
    /// Measure how far a checkpoint is from another, layer by layer; either may be quantized
    #[command(after_help = EXIT_CODES)]
    Measure(MeasureArgs),
    /// List the schemes
    #[command(after_help = EXIT_CODES)]
    Schemes(SchemesArgs),
    /// Print completions for a shell, to be sourced from its start-up file
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Group)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) config: Config,

    /// Stop when standard input ends: for a parent that wants no server to outlive it
    #[arg(long)]
    pub(crate) stop_with_stdin: bool,

    /// What to log: `error`, `warn`, `info`, `debug`, or a filter such as `quarrel_flight=debug`
    #[arg(long, env = "QUARREL_LOG", default_value = "info", value_name = "FILTER")]
    pub(crate) log: String,

    /// How log lines look
    #[arg(long, env = "QUARREL_LOG_FORMAT", value_enum, default_value = "text")]
    pub(crate) log_format: LogFormat,
}

/// Where the work is done.
#[derive(Debug, Default, Group)]
pub(crate) struct PlaceArgs {
    /// A server: `HOST:PORT`, `grpc://HOST:PORT` or `unix:PATH` [default: this process]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) server: Option<String>,

    /// Send over so many connections at once
    #[arg(long, value_name = "N", requires = "server")]
    pub(crate) streams: Option<NonZeroUsize>,

    /// Threads that compute, in this process [default: one a core]
    #[arg(long, value_name = "N", conflicts_with = "server")]
    pub(crate) threads: Option<NonZeroUsize>,

    /// CPU level to compute with, in this process: scalar, avx2 or avx512 [default: the best that the CPU has]
    #[arg(long, value_name = "LEVEL", conflicts_with = "server", value_parser = Level::named)]
    pub(crate) cpu_level: Option<Level>,
}

/// What is printed.
#[derive(Debug, Clone, Copy, Group)]
pub(crate) struct OutputArgs {
    /// Print JSON on standard output, and no table
    #[arg(long)]
    pub(crate) json: bool,

    /// Print errors only
    #[arg(long, short, conflicts_with_all = ["json", "verbose"])]
    pub(crate) quiet: bool,

    /// A line for every layer
    #[arg(long, short)]
    pub(crate) verbose: bool,
}

/// What is read and written.
#[derive(Debug, Group)]
pub(crate) struct FileArgs {
    /// The safetensors or GGUF file, or the folder of a model, to read; for `quantize`, also a file or a folder of columns
    #[arg(value_name = "SRC")]
    pub(crate) source: PathBuf,

    /// The file, or folder, to write; it is complete under its name, or not there
    #[arg(value_name = "DST")]
    pub(crate) destination: PathBuf,

    /// Replace what exists; a symbolic link is replaced, not followed
    #[arg(long, short)]
    pub(crate) force: bool,
}

#[derive(Debug, Group)]
pub(crate) struct QuantizeArgs {
    #[command(flatten)]
    pub(crate) files: FileArgs,

    /// Where the report goes [default: DST with the ending `.report.json`, or DST/quarrel.report.json]
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,

    /// A GGUF file of the same model, whose metadata and tokenizer a GGUF file is to have, instead of those of `config.json` and the tokenizer's files
    #[arg(long, value_name = "FILE")]
    pub(crate) metadata: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) what: WhatArgs,

    /// Fail, and write no checkpoint, if a quantized layer has less SQNR
    #[arg(long, value_name = "DB")]
    pub(crate) sqnr_db_min: Option<f64>,

    /// The same for the cosine between weights and decoded weights
    #[arg(long, value_name = "C")]
    pub(crate) cosine_min: Option<f64>,

    #[command(flatten)]
    pub(crate) place: PlaceArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

/// Which layers are quantized, and how.
#[derive(Debug, Group)]
pub(crate) struct WhatArgs {
    #[command(flatten)]
    pub(crate) how: HowArgs,

    /// Group size, in columns: makes `intN` grouped, changes that of W4A16, W4A16_ASYM, W8A16, nf4 and fp4
    #[arg(long, value_name = "N", conflicts_with_all = ["recipe", "profile"])]
    pub(crate) group_size: Option<NonZeroU32>,

    /// How many leading dimensions make up the output channels (2 for fused experts)
    #[arg(long, value_name = "N", conflicts_with_all = ["recipe", "profile"])]
    pub(crate) channel_dims: Option<NonZeroU32>,

    /// Leave these layers too: a name, a glob, `re:REGEX`; may be given again
    #[arg(long, value_name = "TARGET", conflicts_with_all = ["recipe", "profile"])]
    pub(crate) ignore: Vec<String>,

    /// Do not leave embeddings, output heads, norms and routers as they are
    #[arg(long, conflicts_with_all = ["recipe", "profile"])]
    pub(crate) no_standard: bool,

    /// What a group that does not divide a layer's columns does
    #[arg(long, value_enum, value_name = "WHAT", conflicts_with_all = ["recipe", "profile"])]
    pub(crate) on_indivisible: Option<OnIndivisible>,

    /// What a fault in a layer's numbers does
    #[arg(long, value_enum, value_name = "WHAT", default_value = "fail")]
    pub(crate) on_error: OnError,

    /// In which type intermediates are rounded; `weight-dtype` repeats llm-compressor on CPU, bit for bit
    #[arg(long, value_enum, value_name = "TYPE", default_value = "f32")]
    pub(crate) arith: Arith,
}

#[derive(Debug, Group)]
pub(crate) struct EstimateArgs {
    /// The safetensors or GGUF file, or the folder of a model
    #[arg(value_name = "SRC")]
    pub(crate) source: PathBuf,

    /// As a GGUF file, where a scheme is what `llama-quantize` calls so
    #[arg(long)]
    pub(crate) gguf: bool,

    /// With `--gguf`: as for `quantize`
    #[arg(long, value_name = "FILE", requires = "gguf")]
    pub(crate) metadata: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) what: WhatArgs,

    /// Print JSON
    #[arg(long, conflicts_with = "verbose")]
    pub(crate) json: bool,

    /// A line for every layer
    #[arg(long, short)]
    pub(crate) verbose: bool,
}

/// How layers are quantized: one of three.
#[derive(Debug, Group)]
#[group(required = true, multiple = false)]
pub(crate) struct HowArgs {
    /// One scheme for every layer: `W4A16`, `int8`, `fp8/channel`; `quarrel schemes` lists them
    #[arg(long, short)]
    pub(crate) scheme: Option<String>,

    /// A file of rules, YAML or JSON: `rules: [{targets: [..], scheme: ..}]`, `ignore: [..]`
    #[arg(long, value_name = "FILE")]
    pub(crate) recipe: Option<PathBuf>,

    /// Rules with a name: `edge`, `local`, `cloud`
    #[arg(long)]
    pub(crate) profile: Option<String>,
}

#[derive(Debug, Group)]
pub(crate) struct DequantizeArgs {
    #[command(flatten)]
    pub(crate) files: FileArgs,

    /// The element type to write [default: the one that each layer's scales have: its weights' own, f32 for f64]
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) dtype: Option<FloatType>,

    #[command(flatten)]
    pub(crate) place: PlaceArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Group)]
pub(crate) struct InspectArgs {
    /// The safetensors file, or the folder of a model
    #[arg(value_name = "SRC")]
    pub(crate) source: PathBuf,

    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Group)]
pub(crate) struct MeasureArgs {
    /// What is right: a safetensors file, or the folder of a model
    #[arg(value_name = "A")]
    pub(crate) first: PathBuf,

    /// What is measured
    #[arg(value_name = "B")]
    pub(crate) second: PathBuf,

    /// Fail, with exit code 7, if a layer has less SQNR than so many dB
    #[arg(long, value_name = "DB")]
    pub(crate) sqnr_db_min: Option<f64>,

    /// Fail, with exit code 7, if a layer's cosine is less
    #[arg(long, value_name = "COSINE")]
    pub(crate) cosine_min: Option<f64>,

    /// Threads that compute [default: one a core]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,

    /// CPU level to compute with: scalar, avx2 or avx512 [default: the best that the CPU has]
    #[arg(long, value_name = "LEVEL", value_parser = Level::named)]
    pub(crate) cpu_level: Option<Level>,

    #[command(flatten)]
    pub(crate) output: OutputArgs,
}

#[derive(Debug, Group)]
pub(crate) struct SchemesArgs {
    /// Print JSON: the answer of the action `schemes.list`
    #[arg(long)]
    pub(crate) json: bool,

    /// A server: `HOST:PORT`, `grpc://HOST:PORT` or `unix:PATH` [default: this process]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) server: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnIndivisible {
    /// Leave the layer as it is (the default)
    Keep,
    /// Stop
    Fail,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnError {
    /// Stop
    Fail,
    /// Leave the layer as it is, and go on
    Continue,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Arith {
    F32,
    WeightDtype,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FloatType {
    F32,
    Bf16,
    F16,
}

/// The contract's word for a value.
pub(crate) fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}
