//! A server's address, how many streams to it, and the calls.

use std::{fmt, io, num::NonZeroUsize, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use arrow_flight::{Action, flight_service_client::FlightServiceClient};
use futures::{FutureExt, StreamExt, TryStreamExt, stream};
use hyper_util::rt::TokioIo;
use quarrel_proto::{VERSION, json, metadata, v1};
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::{Channel, Endpoint};

use crate::{
    address::{Address, Dial, Io},
    dequantize::{CodedLayer, DecodedRun, Dequantize},
    error::Error,
    exchange::{Verb, exchange},
    feed::{Answers, Feed},
    layer::Layer,
    quantize::{Quantize, Run},
};

const CONNECT: Duration = Duration::from_secs(10);
/// A dead server is noticed within twice this.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// For a server that does not say when it takes a stream for idle.
const ALIVE_EVERY: Duration = Duration::from_secs(15);
/// What a server may send ahead of us.
const WINDOW_BYTES: u32 = 4 << 20;
/// HTTP/2's default, 16 KiB, has the server write and us read that much at a time.
const FRAME_BYTES: u32 = 256 << 10;
/// The first pause before layers are sent again; each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(200);

/// A Quarrel server, as seen from here. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    dial: Dial,
    streams: NonZeroUsize,
    retries: u32,
    info: Arc<v1::ServerInfo>,
    limits: Limits,
}

/// What a server's limits ask of its clients.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// How often a stream that has nothing to send says that it is alive.
    pub(crate) alive_every: Duration,
    /// Of one message, and so of one channel.
    pub(crate) message_bytes_max: u64,
    /// Of one batch.
    pub(crate) batch_rows_max: u64,
    /// At once, each on a connection of its own.
    streams_max: u64,
}

impl Limits {
    fn of(info: &v1::ServerInfo) -> Limits {
        let limit = |name: &str| info.limits.iter().find(|limit| limit.name == name).map(|limit| limit.value);
        Limits {
            alive_every: limit("idle_seconds").map_or(ALIVE_EVERY, |seconds| Duration::from_secs(seconds) / 4),
            message_bytes_max: limit("message_bytes_max").unwrap_or(u64::MAX),
            batch_rows_max: limit("batch_rows_max").unwrap_or(u64::MAX),
            streams_max: limit("streams_max").into_iter().chain(limit("connections_max")).min().unwrap_or(u64::MAX),
        }
    }

    /// As many streams as the server would take, if nobody else had any.
    fn streams(self, wanted: NonZeroUsize) -> u64 {
        (wanted.get() as u64).min(self.streams_max).max(1)
    }
}

impl Client {
    /// Connects to `grpc://HOST:PORT`, `HOST:PORT`, `grpc+unix://PATH` or `unix:PATH`, and asks the server who it is.
    ///
    /// # Errors
    /// [`Error::Address`]; [`Error::Unreachable`] if nobody answers within 10 seconds; [`Error::Stranger`] if it is no
    /// Quarrel server of this contract's major version.
    pub async fn connect(address: &str) -> Result<Client, Error> {
        let address: Address = address.parse()?;
        Client::with(address.dial()).await
    }

    /// The same over connections that `dial` makes: a server in this process, a tunnel.
    ///
    /// # Errors
    /// As [`connect`](Client::connect).
    pub async fn over<F, I>(dial: impl Fn() -> F + Send + Sync + 'static) -> Result<Client, Error>
    where
        F: Future<Output = io::Result<I>> + Send + 'static,
        I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let dial: Dial = Arc::new(move || {
            let dialled = dial();
            Box::pin(async move { Ok(Box::new(dialled.await?) as Box<dyn Io>) })
        });
        Client::with(dial).await
    }

    async fn with(dial: Dial) -> Result<Client, Error> {
        // Nothing is known of it before it has answered.
        let info = Arc::<v1::ServerInfo>::default();
        let limits = Limits::of(&info);
        let client = Client { dial, streams: NonZeroUsize::MIN, retries: 3, info, limits };
        let asked = tokio::time::timeout(CONNECT, client.server_info()).await;
        let info = match asked {
            Err(_) => Err(Error::Unreachable {
                detail: format!("the connection has no answer after {} s", CONNECT.as_secs()),
            }),
            Ok(Err(error @ Error::Unreachable { .. })) => Err(error),
            Ok(Err(error)) if error.reason().is_some() => Err(error),
            // A stranger's own words are about something else, or a web page.
            Ok(Err(_)) => {
                Err(Error::Stranger { detail: format!("it refuses the action `{}`", metadata::ACTION_SERVER_INFO) })
            }
            Ok(Ok(info)) => Ok(info),
        }?;
        let major = |version: &str| version.split('.').next().map(str::to_owned);
        if major(&info.contract) != major(VERSION) {
            let detail =
                format!("its contract is version `{}`: expected {VERSION} or another minor version", info.contract);
            return Err(Error::Stranger { detail });
        }
        Ok(Client { limits: Limits::of(&info), info: Arc::new(info), ..client })
    }

    /// Sends over so many streams at once, each on a connection of its own, as far as the server takes as many; 1 by default. Answers of different layers then
    /// come in any order. It helps where one connection's bytes, not the server's computing, take the time.
    pub fn streams(self, streams: NonZeroUsize) -> Client {
        Client { streams, ..self }
    }

    /// How often in a row a stream that broke, or whose server stopped, is tried again before its error is reported; 3 by
    /// default, after pauses of 0.2, 0.4, 0.8 .. seconds. Only what was not answered whole is sent again.
    pub fn retries(self, retries: u32) -> Client {
        Client { retries, ..self }
    }

    /// Quantizes layers. Must be called within a tokio runtime.
    ///
    /// Runs of a layer come in order and one after the other; layers in the order of `layers` where there is one stream. A
    /// run that begins a layer again (`channels.start == 0`) after others of it replaces them: its stream broke and it
    /// was sent anew. [`whole`](crate::whole) puts layers together.
    ///
    /// A layer of which no more than 2 MiB are in memory at a time, and an error by its reason:
    /// ```
    /// # let runtime = tokio::runtime::Runtime::new()?;
    /// # runtime.block_on(async {
    /// # let (bound, dial) = quarrel_flight::local();
    /// # let config = quarrel_flight::Config::from_environment().unwrap();
    /// # tokio::spawn(quarrel_flight::run(bound, config, std::future::pending()));
    /// # let client = Client::over(move || { let dial = dial.clone(); async move { dial.connect().await } }).await?;
    /// use futures::TryStreamExt;
    /// use quarrel_client::{Client, Dtype, Layer, proto::Reason, scheme};
    ///
    /// // 32 MiB, read range by range: here from nowhere, and with an infinity.
    /// let layer = Layer::lazy("mlp.up_proj", Dtype::F16, [4096, 4096], |range| {
    ///     let mut bytes = vec![0; (range.end - range.start) as usize];
    ///     if range.contains(&20_000_000) {
    ///         bytes[(20_000_000 - range.start) as usize..][..2].copy_from_slice(&0x7c00u16.to_le_bytes());
    ///     }
    ///     Ok(bytes.into())
    /// });
    /// let mut runs = client.quantize(scheme("int8"), [layer]);
    /// let error = loop {
    ///     match runs.try_next().await {
    ///         Ok(Some(run)) => println!("{}: channels {:?} of {}", run.layer.name(), run.channels, run.channels_total),
    ///         Ok(None) => panic!("infinity was quantized"),
    ///         Err(error) => break error,
    ///     }
    /// };
    /// assert_eq!((error.reason(), error.layer()), (Some(Reason::NonFinite), Some("mlp.up_proj")));
    /// eprintln!("{error}\n{}", error.advice());
    /// # Ok::<_, quarrel_client::Error>(())
    /// # })?;
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn quantize(
        &self,
        command: v1::Quantize,
        layers: impl IntoIterator<Item = Layer, IntoIter: Send + 'static>,
    ) -> Answers<Run> {
        self.start(Quantize::new(command), stream::iter(layers.into_iter().map(Ok)))
    }

    /// Quantizes layers that become known one by one.
    pub fn quantize_stream(
        &self,
        command: v1::Quantize,
        layers: impl stream::Stream<Item = Result<Layer, Error>> + Send + 'static,
    ) -> Answers<Run> {
        self.start(Quantize::new(command), layers)
    }

    /// Computes the values that codes stand for. Must be called within a tokio runtime.
    ///
    /// Runs of a layer come in order; a run that begins a layer again replaces what came before of it.
    /// ```
    /// # let runtime = tokio::runtime::Runtime::new()?;
    /// # runtime.block_on(async {
    /// # let (bound, dial) = quarrel_flight::local();
    /// # let config = quarrel_flight::Config::from_environment().unwrap();
    /// # tokio::spawn(quarrel_flight::run(bound, config, std::future::pending()));
    /// # let client = Client::over(move || { let dial = dial.clone(); async move { dial.connect().await } }).await?;
    /// use std::num::NonZeroU64;
    /// use futures::TryStreamExt;
    /// use quarrel_client::{Client, CodedLayer, Dtype, proto::v1};
    ///
    /// // Two channels of four int8 codes, a scale for each.
    /// let codes: Vec<u8> = [1i8, 2, 3, -128, 127, 0, -1, 5].map(|code| code as u8).to_vec();
    /// let read = move |range: std::ops::Range<u64>| Ok(codes[range.start as usize..range.end as usize].to_vec().into());
    /// let scales = vec![0.5, 2.0];
    /// let layer = CodedLayer::new("x", Dtype::F32, [2, 4], "int8", (2, 4), NonZeroU64::MIN, scales, None, read);
    /// let runs: Vec<_> = client.dequantize(v1::Dequantize::default(), [layer]).try_collect().await?;
    /// let values = runs[0].data.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    /// assert_eq!(Vec::from_iter(values), [0.5, 1.0, 1.5, -64.0, 254.0, 0.0, -2.0, 10.0]);
    /// # Ok::<_, quarrel_client::Error>(())
    /// # })?;
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub fn dequantize(
        &self,
        command: v1::Dequantize,
        layers: impl IntoIterator<Item = Result<CodedLayer, Error>, IntoIter: Send + 'static>,
    ) -> Answers<DecodedRun> {
        self.start(Dequantize::new(command), stream::iter(layers))
    }

    fn start<V: Verb>(
        &self,
        verb: V,
        layers: impl stream::Stream<Item = Result<V::Layer, Error>> + Send + 'static,
    ) -> Answers<V::Answer> {
        // Fused: several streams may ask again after the end.
        let (feed, mut answers) = Feed::new(layers.fuse().boxed());
        let (verb, feed) = (Arc::new(verb), Arc::new(feed));
        for _ in 0..self.limits.streams(self.streams) {
            let (client, verb, feed) = (self.clone(), Arc::clone(&verb), Arc::clone(&feed));
            let stream = tokio::spawn(async move {
                // A panic, of a layer's source say, must not read as a clean end.
                match AssertUnwindSafe(client.run(&verb, &feed)).catch_unwind().await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => feed.failed(error),
                    Err(_) => feed.failed(Error::Panicked),
                }
            });
            answers.stop_with_us(stream.abort_handle());
        }
        answers
    }

    /// One stream, begun again when its server goes away.
    async fn run<V: Verb>(&self, verb: &Arc<V>, feed: &Feed<V>) -> Result<(), Error> {
        let mut failures = 0;
        loop {
            let before = feed.answers();
            let error = match self.channel().await {
                Ok(channel) => match exchange(channel, verb, feed, self.limits).await {
                    Ok(()) => return Ok(()),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if feed.answers() > before {
                failures = 0;
            }
            if !error.is_unavailable() || failures == self.retries {
                return Err(error);
            }
            tokio::time::sleep(PAUSE * 2u32.saturating_pow(failures.min(10))).await;
            failures += 1;
        }
    }

    /// What the server said of itself when we connected: version, limits, CPU level.
    pub fn info(&self) -> &v1::ServerInfo {
        &self.info
    }

    /// The same, asked anew.
    ///
    /// # Errors
    /// [`Error::Unreachable`]; [`Error::Answer`] if it is no Quarrel server.
    pub async fn server_info(&self) -> Result<v1::ServerInfo, Error> {
        json::read_server_info(&self.act(metadata::ACTION_SERVER_INFO).await?)
            .map_err(|detail| Error::Answer { detail })
    }

    /// Every scheme that the server knows by name.
    ///
    /// # Errors
    /// As [`server_info`](Client::server_info).
    pub async fn schemes(&self) -> Result<v1::Schemes, Error> {
        json::read_schemes(&self.act(metadata::ACTION_SCHEMES_LIST).await?).map_err(|detail| Error::Answer { detail })
    }

    async fn act(&self, action: &str) -> Result<bytes::Bytes, Error> {
        let mut flight = FlightServiceClient::new(self.channel().await?);
        let mut results = flight.do_action(Action::new(action, "")).await?.into_inner();
        let result = results.try_next().await?;
        result.map(|result| result.body).ok_or_else(|| Error::Answer { detail: format!("`{action}` has no result") })
    }

    async fn channel(&self) -> Result<Channel, Error> {
        let dial = Arc::clone(&self.dial);
        // The connector has the address; HTTP/2 wants an authority all the same.
        let endpoint = Endpoint::from_static("http://localhost")
            .connect_timeout(CONNECT)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(2 * WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE);
        let connector = tower::service_fn(move |_| {
            let dialled = dial();
            async move { dialled.await.map(TokioIo::new) }
        });
        Ok(endpoint.connect_with_connector(connector).await?)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("streams", &self.streams).field("retries", &self.retries).finish_non_exhaustive()
    }
}
