//! Where the work is done: on a server elsewhere, or on one in this process. Either way it is the same server.

use quarrel_client::Client;
use quarrel_flight::{Config, LogFormat, local, run, start_telemetry};
use tokio::{sync::oneshot, task::JoinHandle};

use crate::{
    args::{OutputArgs, PlaceArgs},
    failure::Failure,
};

pub(crate) const CHECK_ENVIRONMENT: &str = "Check the variables QUARREL_* of the environment.";

/// What the environment and the command line say of this process.
pub(crate) fn environment(args: &PlaceArgs) -> Result<Config, Failure> {
    let wrong = |sentence: String| Failure::usage(sentence, CHECK_ENVIRONMENT);
    let mut config = Config::from_environment().map_err(wrong)?;
    config.threads = args.threads.or(config.threads);
    config.cpu_level = args.cpu_level.or(config.cpu_level);
    config.check().map_err(|error| wrong(error.to_string()))?;
    Ok(config)
}

/// A server to talk to.
pub(crate) struct Place {
    pub(crate) client: Client,
    /// Runs as long as the place is there.
    _ours: Option<Ours>,
}

/// The server in this process. It stops when this is dropped.
struct Ours {
    _stop: oneshot::Sender<()>,
    _task: JoinHandle<Result<(), String>>,
}

/// What the server in this process must have room for. Its limits protect a server from its clients; here there is one,
/// and a layer that the file has is one that it may have.
#[derive(Debug, Default)]
pub(crate) struct Room {
    memory_bytes_max: Option<usize>,
}

impl Room {
    /// For codes, which never wait for their layer.
    pub(crate) fn for_codes() -> Room {
        Room { memory_bytes_max: Some(256 << 20) }
    }

    fn make(&self, config: &mut Config) {
        if let Some(bytes) = self.memory_bytes_max {
            config.memory_bytes_max = config.memory_bytes_max.min(bytes.max(2 * config.message_bytes_max));
        }
    }
}

impl Place {
    pub(crate) async fn open(args: &PlaceArgs, output: OutputArgs, room: Room) -> Result<Place, Failure> {
        if let Some(address) = &args.server {
            let client = Client::connect(address).await?;
            return Ok(Place {
                client: client.streams(args.streams.unwrap_or(std::num::NonZeroUsize::MIN)),
                _ours: None,
            });
        }
        let wrong = |sentence: String| Failure::usage(sentence, CHECK_ENVIRONMENT);
        let mut config = environment(args)?;
        room.make(&mut config);
        config.check().map_err(|error| wrong(error.to_string()))?;
        if output.verbose {
            start_telemetry("info", LogFormat::Text).map_err(wrong)?;
        }
        let (bound, dial) = local();
        let (stop, stopped) = oneshot::channel();
        let server = run(bound, config, async move { drop(stopped.await) });
        let task = tokio::spawn(async move { server.await.map_err(|error| error.to_string()) });
        let client = Client::over(move || {
            let dial = dial.clone();
            async move { dial.connect().await }
        });
        match client.await {
            Ok(client) => Ok(Place { client, _ours: Some(Ours { _stop: stop, _task: task }) }),
            // The server's own word, if that is why.
            Err(error) if task.is_finished() => match task.await {
                Ok(Err(why)) => Err(wrong(format!("the server in this process does not start: {why}"))),
                _ => Err(error.into()),
            },
            Err(error) => Err(error.into()),
        }
    }
}
