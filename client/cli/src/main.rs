//! `quarrel`: the command line. Each verb is a file; all of them talk to a server, in this process or elsewhere.

#![forbid(unsafe_code)]

mod args;
mod dequantize;
mod failure;
mod inspect;
mod place;
mod progress;
mod quantize;
mod recipe;
mod report;
mod schemes;
mod seal;
mod serve;
mod table;

use std::{io, process::ExitCode, thread};

use clap::{CommandFactory, Parser};
use tokio::{runtime, signal::unix};

use crate::{
    args::{Args, Command},
    failure::Failure,
};

/// Messages and results are megabytes that come and go; the C library's allocator gives them back to the system each
/// time, and fresh pages cost more than the copies into them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::Serve(args) => run(serve::serve(args)),
        Command::Quantize(args) => run(unless_stopped(quantize::quantize(args))),
        Command::Dequantize(args) => run(unless_stopped(dequantize::dequantize(args))),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Schemes(args) => run(unless_stopped(schemes::schemes(args))),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Args::command(), "quarrel", &mut io::stdout());
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.tell(),
    }
}

fn run(verb: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    // Async threads only move bytes. With one of them for two cores, exchange was 5 to 20 % faster than with two: the cores
    // are the computing threads' and, on one machine, the client's.
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let runtime = runtime::Builder::new_multi_thread().worker_threads(cores.div_ceil(2)).enable_all().build();
    runtime.map_err(|error| Failure::system(&error))?.block_on(verb)
}

/// Runs a verb until it is done, or until somebody wants it stopped. Dropped, it leaves nothing behind.
async fn unless_stopped(verb: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let mut interrupt = unix::signal(unix::SignalKind::interrupt()).map_err(|error| Failure::system(&error))?;
    let mut terminate = unix::signal(unix::SignalKind::terminate()).map_err(|error| Failure::system(&error))?;
    tokio::select! {
        done = verb => done,
        _ = interrupt.recv() => Err(Failure::stopped(failure::INTERRUPTED)),
        _ = terminate.recv() => Err(Failure::stopped(failure::TERMINATED)),
    }
}
