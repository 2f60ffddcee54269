//! `quarrel serve`.

use std::io::{Read, Write};

use quarrel_flight::{bind, run, start_telemetry};
use tokio::signal::unix::{SignalKind, signal};

use crate::{args::ServeArgs, failure::Failure};

pub(crate) async fn serve(args: Box<ServeArgs>) -> Result<(), Failure> {
    let ServeArgs { config, stop_with_stdin, log, log_format } = *args;
    let wrong = |sentence: String| Failure::usage(sentence, "See `quarrel serve --help`.");
    start_telemetry(&log, log_format).map_err(wrong)?;
    config.check().map_err(|error| wrong(error.to_string()))?;
    config.check_prefixes().map_err(|error| wrong(error.to_string()))?;
    // Before anybody knows the address, so that no signal is missed.
    let stop = stop(stop_with_stdin).map_err(|error| Failure::system(&error))?;
    let bound = bind(&config.listen).await;
    let bound = bound.map_err(|error| Failure::listen(&config.listen, &error))?;
    let mut out = std::io::stdout();
    writeln!(out, "listening {}", bound.address).and_then(|()| out.flush()).map_err(|error| Failure::system(&error))?;
    run(bound, config, stop).await.map_err(|error| Failure::ours(error.to_string()))
}

/// Ends when the process is asked to stop.
fn stop(with_stdin: bool) -> std::io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            () = end_of_stdin(), if with_stdin => {}
        }
    })
}

/// Ends with standard input. A thread of its own waits: a runtime's would be waited for at the end of the process.
async fn end_of_stdin() {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut ignored = [0; 64];
        while stdin.read(&mut ignored).is_ok_and(|read| read > 0) {}
        let _ = sender.send(());
    });
    let _ = receiver.await;
}
