//! How a verb fails: what is told, and the exit code. The codes are documented in `--help`.

use std::{io, process::ExitCode};

use quarrel_checkpoint::CheckpointError;
use quarrel_client::{Error, Kind};

pub(crate) const INTERRUPTED: u8 = 130;
pub(crate) const TERMINATED: u8 = 143;

const OURS: u8 = 1;
const USAGE: u8 = 2;
const INPUT: u8 = 3;
const SERVER: u8 = 4;
const SYSTEM: u8 = 5;
const LAYERS_FAILED: u8 = 6;

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
        anstream::eprintln!("{red}quarrel:{red:#} {reason}{}", self.sentence);
        if let Some(advice) = &self.advice {
            anstream::eprintln!("{bold}  what to do:{bold:#} {advice}");
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
    pub(crate) fn stopped(code: u8) -> Failure {
        Failure::new(code, "stopped; nothing was written")
    }

    /// A command line or a recipe that cannot be.
    pub(crate) fn usage(sentence: impl Into<String>, advice: impl Into<String>) -> Failure {
        Failure::new(USAGE, sentence).advise(advice)
    }

    /// A file that cannot be worked on.
    pub(crate) fn input(sentence: impl Into<String>, advice: impl Into<String>) -> Failure {
        Failure::new(INPUT, sentence).advise(advice)
    }

    /// An address that cannot be had.
    pub(crate) fn listen(address: &quarrel_flight::Listen, error: &io::Error) -> Failure {
        Failure::new(SYSTEM, format!("cannot listen at {address}: {error}"))
    }

    /// The system's word.
    pub(crate) fn system(error: &io::Error) -> Failure {
        Failure::new(SYSTEM, error.to_string())
    }

    /// The system's word on a file.
    pub(crate) fn file(what: &str, path: &std::path::Path, error: &io::Error) -> Failure {
        Failure::new(SYSTEM, format!("{what} `{}`: {error}", path.display()))
    }

    /// Layers that failed where the command said to go on.
    pub(crate) fn layers(failed: usize, worst: &str) -> Failure {
        let sentence = format!("{failed} layers failed and are in the file as they were; the first: {worst}");
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
        Failure { reason, ..Failure::new(code, error.to_string()).advise(error.advice()) }
    }
}

impl From<CheckpointError> for Failure {
    fn from(error: CheckpointError) -> Failure {
        let sentence = error.to_string();
        match error {
            CheckpointError::Io { .. } => Failure::new(SYSTEM, sentence),
            CheckpointError::Malformed { .. } => {
                Failure::new(INPUT, sentence).advise("Check that it was copied whole, and that it is safetensors.")
            }
            CheckpointError::Command { reason, .. } => {
                let code = if is_about_the_command(reason.word()) { USAGE } else { INPUT };
                Failure {
                    reason: Some(reason.word().to_owned()),
                    ..Failure::new(code, sentence).advise(reason.advice())
                }
            }
            CheckpointError::Exists { .. } => {
                Failure::new(USAGE, sentence).advise("Choose another name, or replace it with `--force`.")
            }
            CheckpointError::Module { .. } => Failure::new(INPUT, sentence),
            CheckpointError::Twice { .. } => Failure::new(INPUT, sentence).advise("Rename one of them in the source."),
            _ => Failure::ours(sentence),
        }
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
