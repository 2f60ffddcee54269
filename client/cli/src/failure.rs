//! How a verb fails: what is told, and the exit code. The codes are documented in `--help`.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use quarrel_checkpoint::CheckpointError;
use quarrel_client::{Error, Kind, proto::Reason};

use crate::table::clean;

pub(crate) const INTERRUPTED: u8 = 130;
pub(crate) const TERMINATED: u8 = 143;
pub(crate) const HUNG_UP: u8 = 129;

const OURS: u8 = 1;
const USAGE: u8 = 2;
const INPUT: u8 = 3;
const SERVER: u8 = 4;
const SYSTEM: u8 = 5;
const LAYERS_FAILED: u8 = 6;
const GATE: u8 = 7;

/// Why a verb is not done.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    /// The contract's word, if there is one.
    reason: Option<String>,
    sentence: String,
    advice: Option<String>,
}

impl Failure {
    /// Tells it on standard error.
    pub(crate) fn tell(&self) -> ExitCode {
        let bold = anstyle::Style::new().bold();
        let red = bold.fg_color(Some(anstyle::AnsiColor::Red.into()));
        let reason = self.reason.as_ref().map_or_else(String::new, |reason| format!("[{reason}] "));
        let mut out = anstream::stderr();
        // Where nobody can be told, there is still the exit code.
        let _ = writeln!(out, "{red}quarrel:{red:#} {reason}{}", clean(&self.sentence));
        if let Some(advice) = &self.advice {
            let _ = writeln!(out, "{bold}  what to do:{bold:#} {advice}");
        }
        ExitCode::from(self.code)
    }

    fn new(code: u8, sentence: impl Into<String>) -> Failure {
        Failure { code, reason: None, sentence: sentence.into(), advice: None }
    }

    fn advise(self, advice: impl Into<String>) -> Failure {
        Failure { advice: Some(advice.into()), ..self }
    }

    /// Somebody wanted it stopped.
    pub(crate) fn stopped(code: u8, keeps: bool) -> Failure {
        match keeps {
            false => Failure::new(code, "stopped; nothing was written"),
            true => Failure::new(code, "stopped; the files that are complete stay")
                .advise("Run the same command again to go on, or with `--force` to start over."),
        }
    }

    /// A command line or a recipe that cannot be.
    pub(crate) fn usage(sentence: impl Into<String>, advice: impl Into<String>) -> Failure {
        Failure::new(USAGE, sentence).advise(advice)
    }

    /// An address that cannot be had.
    pub(crate) fn listen(address: &quarrel_flight::Listen, error: &io::Error) -> Failure {
        let advice = "Choose another address with `--listen`, or stop what listens there.";
        Failure::new(SYSTEM, format!("cannot listen at {address}: {error}")).advise(advice)
    }

    /// The system's word on standard output.
    pub(crate) fn output(error: &io::Error) -> Failure {
        Failure::new(SYSTEM, format!("cannot write to standard output: {error}")).advise(of_the_system(error))
    }

    /// The system's word.
    pub(crate) fn system(error: &io::Error) -> Failure {
        Failure::new(SYSTEM, error.to_string()).advise(of_the_system(error))
    }

    /// The system's word on a file.
    pub(crate) fn file(what: &str, path: &std::path::Path, error: &io::Error) -> Failure {
        Failure::new(SYSTEM, format!("{what} `{}`: {error}", path.display())).advise(of_the_system(error))
    }

    /// Layers that failed where the command said to go on.
    pub(crate) fn layers(failed: usize, worst: &str) -> Failure {
        let are = if failed == 1 { "layer failed and is" } else { "layers failed and are" };
        let sentence = format!("{failed} {are} in the file unquantized; the first: {worst}");
        Failure::new(LAYERS_FAILED, sentence).advise("See `status` and `message` of each layer in the report.")
    }

    /// A fault of ours.
    pub(crate) fn ours(sentence: impl Into<String>) -> Failure {
        Failure::new(OURS, sentence).advise("Please report it, with `quarrel --version` and the command line.")
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let code = match (&error, error.kind()) {
            (Error::Address { .. }, _) => USAGE,
            (Error::Source { .. }, _) => SYSTEM,
            (_, Kind::Caller | Kind::Unsupported) => INPUT,
            (_, Kind::Busy | Kind::Unavailable) => SERVER,
            (_, _) => OURS,
        };
        let reason = error.reason().map(|reason| reason.word().to_owned());
        let code = if reason.as_deref().is_some_and(is_about_the_command) { USAGE } else { code };
        let advice = error.reason().map_or(error.advice(), advice);
        Failure { reason, ..Failure::new(code, error.to_string()).advise(advice) }
    }
}

impl From<CheckpointError> for Failure {
    fn from(error: CheckpointError) -> Failure {
        let sentence = error.to_string();
        match error {
            CheckpointError::Io { error, .. } => Failure::new(SYSTEM, sentence).advise(of_the_system(&error)),
            CheckpointError::Read { error, .. } => Failure::new(SYSTEM, sentence).advise(of_the_system(&error)),
            CheckpointError::NoFile { .. } => Failure::new(USAGE, sentence).advise("Name a file."),
            CheckpointError::Columns { .. } => Failure::new(INPUT, sentence)
                .advise("Write it as Arrow IPC without compression, or as Parquet, in the columns of SPEC.md, section \"Input\"."),
            CheckpointError::Gguf { .. } => {
                Failure::new(INPUT, sentence).advise("Check that it was copied whole, and that it is GGUF.")
            }
            CheckpointError::Malformed { .. } => {
                Failure::new(INPUT, sentence).advise("Check that it was copied whole, and that it is safetensors.")
            }
            CheckpointError::Command { reason, .. } => {
                let code = if is_about_the_command(reason.word()) { USAGE } else { INPUT };
                Failure {
                    reason: Some(reason.word().to_owned()),
                    ..Failure::new(code, sentence).advise(advice(reason))
                }
            }
            CheckpointError::Layer { reason, .. } => {
                let code = if is_about_the_command(reason.word()) { USAGE } else { INPUT };
                let reason_word = Some(reason.word().to_owned());
                Failure { reason: reason_word, ..Failure::new(code, sentence).advise(advice(reason)) }
            }
            CheckpointError::Exists { .. } => {
                Failure::new(USAGE, sentence).advise("Choose another name, or replace it with `--force`.")
            }
            CheckpointError::Module { .. } | CheckpointError::Foreign { .. } => Failure::new(INPUT, sentence).advise(
                "Look at it with `quarrel inspect`; start from the checkpoint that it was made of if it is damaged.",
            ),
            CheckpointError::Model { .. } => {
                Failure::new(INPUT, sentence).advise(
                    "If what was expected should be there, check that the model was copied whole, with its index; for a GGUF file, \
                     `--metadata` may name another of the same model.",
                )
            }
            CheckpointError::NothingQuantized { .. } => {
                Failure::new(INPUT, sentence).advise("Look at it with `quarrel inspect`.")
            }
            CheckpointError::NoFolder { .. } => Failure::new(USAGE, sentence).advise("Name a folder."),
            CheckpointError::JobChanged { .. } => Failure::new(USAGE, sentence).advise(
                "Run the command that began it, choose another name, or start over with `--force`: what it has made goes.",
            ),
            CheckpointError::JobRuns { .. } => {
                Failure::new(USAGE, sentence).advise("Wait for it, or choose another name.")
            }
            CheckpointError::Gate { .. } => Failure::new(GATE, sentence)
                .advise("Choose a scheme of more bits or smaller groups, or leave the layer out with `--ignore`."),
            CheckpointError::Uri { .. } => Failure::new(USAGE, sentence)
                .advise("Check the URI, and what AWS_*, GOOGLE_* and AZURE_* of the environment say of its store."),
            CheckpointError::Overlap { .. } => Failure::new(USAGE, sentence).advise("Choose another destination."),
            CheckpointError::NotAllowed { .. } => Failure::new(USAGE, sentence).advise(Reason::UriNotAllowed.advice()),
            CheckpointError::Twice { .. } => Failure::new(INPUT, sentence).advise("Rename one of them in the source."),
            _ => Failure::ours(sentence),
        }
    }
}

/// What to do, in the command line's own words where it has them.
fn advice(reason: Reason) -> &'static str {
    match reason {
        Reason::SchemeUnknown => "Choose one that `quarrel schemes` lists.",
        Reason::NonFinite => {
            "Repair the layer, leave it out with `--ignore` (of a GGUF file with a recipe), or go on without it with `--on-error continue`."
        }
        Reason::ScaleOverflow => "Leave it out with `--ignore`, or go on without it with `--on-error continue`.",
        Reason::GroupSizeIndivisible => {
            "Use a scheme of smaller groups or without, or leave such layers: with `--on-indivisible keep`, in a recipe `on_indivisible: keep`."
        }
        Reason::RankUnsupported => {
            "Use a scheme without blocks, leave the layer out with `--ignore`, or check `--channel-dims`."
        }
        _ => reason.advice(),
    }
}

/// What to do about the system's word.
fn of_the_system(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => "Check the path, and that its folder is there.",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => "Check who may read and write there.",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "Make room: the quantized tensors are written twice, the second time into the file."
        }
        io::ErrorKind::InvalidFilename => "Choose a shorter name.",
        io::ErrorKind::UnexpectedEof => "Somebody cut the file meanwhile: start again when it is whole.",
        io::ErrorKind::Other => {
            "See what the system or the store says; credentials and endpoints of stores are AWS_*, GOOGLE_* and AZURE_* of the environment."
        }
        _ => "See what the system says; it is not a fault of the checkpoint.",
    }
}

/// Whether a reason is about what was asked, not about what was given.
fn is_about_the_command(word: &str) -> bool {
    matches!(
        word,
        "command_malformed"
            | "field_unknown"
            | "option_conflict"
            | "option_invalid"
            | "scheme_unknown"
            | "profile_unknown"
            | "recipe_invalid"
            | "needs_calibration"
    )
}
