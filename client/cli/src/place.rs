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
    _task: JoinHandle<Result<(), String>>,
}

/// What the server in this process must have room for. Its limits protect a server from its clients; here there is one,
/// and a layer that the file has is one that it may have.
#[derive(Debug, Default)]
pub(crate) struct Room {
    layer_bytes: usize,
    channel_bytes: usize,
    memory_bytes_max: Option<usize>,
}

impl Room {
    /// For layers of so many bytes and of these shapes, one after the other, whole if their scheme wants that.
    pub(crate) fn for_weights<'a>(layers: impl Iterator<Item = (u64, &'a [u64])>) -> Room {
        let sizes = layers.map(|(bytes, shape)| (bytes, bytes.checked_div(shape.first().copied().unwrap_or(1))));
        let most = |most: (u64, u64), of: (u64, Option<u64>)| (most.0.max(of.0), most.1.max(of.1.unwrap_or(0)));
        let (layer, channel) = sizes.fold((0, 0), most);
        Room { layer_bytes: layer as usize, channel_bytes: channel as usize, memory_bytes_max: None }
    }

    /// For codes, which never wait for their layer.
    pub(crate) fn for_codes() -> Room {
        Room { memory_bytes_max: Some(256 << 20), ..Room::default() }
    }

    fn make(&self, config: &mut Config) {
        if let Some(bytes) = self.memory_bytes_max {
            config.memory_bytes_max = config.memory_bytes_max.min(bytes.max(2 * config.message_bytes_max));
        }
        // Beside its weights a layer holds its codes and sums; a stream may hold half of all.
        config.message_bytes_max = config.message_bytes_max.max(self.channel_bytes.saturating_add(1 << 20));
        config.layer_bytes_max = config.layer_bytes_max.max(self.layer_bytes.saturating_mul(3));
        let half = config.message_bytes_max.max(self.layer_bytes.saturating_mul(3));
        config.memory_bytes_max = config.memory_bytes_max.max(half.saturating_mul(2));
    }
}

impl Place {
    pub(crate) async fn open(args: &PlaceArgs, output: OutputArgs, room: Room) -> Result<Place, Failure> {
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
            Ok(client) => Ok(Place { client, ours: Some(Ours { _stop: stop, _task: task }) }),
            // The server's own word, if that is why.
            Err(error) if task.is_finished() => match task.await {
                Ok(Err(why)) => Err(wrong(format!("the server in this process does not start: {why}"))),
                _ => Err(error.into()),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// Whether the server is this process.
    pub(crate) fn is_here(&self) -> bool {
        self.ours.is_some()
    }
}
