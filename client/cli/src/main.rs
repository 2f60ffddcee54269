//! `quarrel`: the command line. Each verb is a file; all of them talk to a server, in this process or elsewhere.

#![forbid(unsafe_code)]

mod args;
mod dequantize;
mod estimate;
mod failure;
mod inspect;
mod measure;
mod paths;
mod place;
mod progress;
mod quantize;
mod recipe;
mod report;
mod schemes;
mod serve;
mod served;
mod table;

use std::{
    process::ExitCode,
    sync::{Arc, LazyLock},
    thread,
    time::Duration,
};

use clap::{CommandFactory, Parser};
use quarrel_checkpoint::Stop;
use tokio::{runtime, signal::unix};

use crate::{
    args::{Args, Command},
    failure::Failure,
};

/// Messages and results are megabytes that come and go; the C library's allocator gives them back to the system each
/// time, and fresh pages cost more than the copies into them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How long threads that wait for a disk or a store may take at the end.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let done = match Args::parse().command {
        Command::Serve(args) => run(serve::serve(args)),
        Command::Quantize(args) => run(unless_stopped(|stop| quantize::quantize(args, stop))),
        Command::Dequantize(args) => run(unless_stopped(|stop| dequantize::dequantize(args, stop))),
        Command::Estimate(args) => run(unless_stopped(|_| estimate::estimate(args))),
        Command::Inspect(args) => run(unless_stopped(|_| inspect::inspect(args))),
        Command::Measure(args) => run(unless_stopped(|_| measure::measure(args))),
        Command::Schemes(args) => run(unless_stopped(|_| schemes::schemes(args))),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "quarrel", &mut script);
            table::print(String::from_utf8_lossy(&script).trim_end())
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
    let runtime = runtime.map_err(|error| Failure::system(&error))?;
    let done = runtime.block_on(verb);
    // One that is silent is not waited for.
    runtime.shutdown_timeout(PATIENCE);
    done
}

/// Runs a verb until it is done, or until somebody wants it stopped. Stopped, it leaves nothing behind; if its file has its
/// name by then, it is too late for that, and the verb is finished.
async fn unless_stopped<V>(verb: impl FnOnce(Arc<Stop>) -> V) -> Result<(), Failure>
where
    V: Future<Output = Result<(), Failure>>,
{
    let stop = Arc::<Stop>::default();
    let mut verb = Box::pin(verb(Arc::clone(&stop)));
    let code = tokio::select! {
        done = &mut verb => return done,
        () = asked(unix::SignalKind::interrupt()) => failure::INTERRUPTED,
        () = asked(unix::SignalKind::terminate()) => failure::TERMINATED,
        () = asked(unix::SignalKind::hangup()) => failure::HUNG_UP,
    };
    if !stop.stop() {
        return verb.await;
    }
    drop(verb);
    // What a store has of a file by now can only be taken back while there is a runtime.
    stop.released().await;
    Err(Failure::stopped(code, stop.keeps()))
}

/// Ends when the signal comes; never if whoever started us has it ignored, as `nohup` does.
async fn asked(kind: unix::SignalKind) {
    // Before `signal`, which makes it one that is not.
    if is_ignored(kind) {
        return std::future::pending().await;
    }
    match unix::signal(kind) {
        Ok(mut signal) => drop(signal.recv().await),
        Err(_) => std::future::pending().await,
    }
}

/// Whether the process ignored a signal when it began (proc(5), `SigIgn`).
fn is_ignored(kind: unix::SignalKind) -> bool {
    static IGNORED: LazyLock<u64> = LazyLock::new(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
    });
    *IGNORED >> (kind.as_raw_value() - 1) & 1 == 1
}
