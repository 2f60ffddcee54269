//! Where the work is done: on a server elsewhere, or on one in this process. Either way it is the same server.

use quarrel_client::Client;
use quarrel_flight::{Config, LogFormat, local, run, start_telemetry};
use tokio::{sync::oneshot, task::JoinHandle};

use crate::{
    args::{OutputArgs, PlaceArgs},
    failure::Failure,
};

/// A server to talk to.
pub(crate) struct Place {
    pub(crate) client: Client,
    ours: Option<Ours>,
}

/// The server in this process. It stops when this is dropped.
struct Ours {
    _stop: oneshot::Sender<()>,
    _task: JoinHandle<()>,
}

impl Place {
    pub(crate) async fn open(args: &PlaceArgs, output: OutputArgs) -> Result<Place, Failure> {
        if let Some(address) = &args.server {
            let client = Client::connect(address).await?;
            return Ok(Place {
                client: client.streams(args.streams.unwrap_or(std::num::NonZeroUsize::MIN)),
                ours: None,
            });
        }
        let wrong = |sentence: String| Failure::usage(sentence, "Check the variables QUARREL_* of the environment.");
        let mut config = Config::from_environment().map_err(wrong)?;
        config.threads = args.threads.or(config.threads);
        config.cpu_level = args.cpu_level.or(config.cpu_level);
        config.check().map_err(|error| wrong(error.to_string()))?;
        if output.verbose {
            start_telemetry("info", LogFormat::Text).map_err(wrong)?;
        }
        let (bound, dial) = local();
        let (stop, stopped) = oneshot::channel();
        let server = run(bound, config, async move { drop(stopped.await) });
        let task = tokio::spawn(async move { drop(server.await) });
        let client = Client::over(move || {
            let dial = dial.clone();
            async move { dial.connect().await }
        });
        Ok(Place { client: client.await?, ours: Some(Ours { _stop: stop, _task: task }) })
    }

    /// Whether the server is this process.
    pub(crate) fn is_here(&self) -> bool {
        self.ours.is_some()
    }
}
