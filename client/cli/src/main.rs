//! `quarrel`: the command line. For now it serves.

#![forbid(unsafe_code)]

use std::{io::Write, process::ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand};
use quarrel_flight::{Config, LogFormat, bind, run, start_telemetry};

/// Messages and results are megabytes that come and go; the C library's allocator gives them back to the system each
/// time, and fresh pages cost more than the copies into them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Quantizes neural-network weights as a service, in Apache Arrow.
#[derive(Debug, Parser)]
#[command(name = "quarrel", version, propagate_version = true)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the Arrow Flight server
    ///
    /// The first line on standard output says where it listens; logs go to standard error. SIGTERM and Ctrl-C stop it:
    /// running streams have `--drain-seconds` to end.
    Serve {
        #[command(flatten)]
        config: Box<Config>,

        /// What to log: `error`, `warn`, `info`, `debug`, or a filter such as `quarrel_flight=debug`
        #[arg(long, env = "QUARREL_LOG", default_value = "info", value_name = "FILTER")]
        log: String,

        /// How log lines look
        #[arg(long, env = "QUARREL_LOG_FORMAT", value_enum, default_value = "text")]
        log_format: LogFormat,
    },
}

fn main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line, without the backtrace that anyhow adds where RUST_BACKTRACE is set: the mistake is not in here.
            let _ = writeln!(std::io::stderr(), "quarrel: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> anyhow::Result<()> {
    let Command::Serve { config, log, log_format } = Args::parse().command;
    start_telemetry(&log, log_format).map_err(anyhow::Error::msg)?;
    config.check()?;
    // Async threads only move bytes. With one of them for two cores, exchange was 5 to 20 % faster than with two: the cores
    // are the computing threads' and, on one machine, the client's.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(cores.div_ceil(2)).enable_all().build()?;
    runtime.block_on(async {
        // Before anybody knows the address, so that no signal is missed.
        let stop = stop_signal()?;
        let bound = bind(&config.listen).await.with_context(|| format!("cannot listen at {}", config.listen))?;
        let mut out = std::io::stdout();
        writeln!(out, "listening {}", bound.address)?;
        out.flush()?;
        run(bound, *config, stop).await.map_err(anyhow::Error::from_boxed)
    })
}

/// Ends when the process is asked to stop.
fn stop_signal() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
