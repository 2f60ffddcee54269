//! Sockets and the layers between them and the service: from the listener up, with the reason at each layer.

use std::{
    io,
    os::unix::fs::FileTypeExt,
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use arrow_flight::flight_service_server::FlightServiceServer;
use futures::{Stream, stream};
use http_body_util::Limited;
use quarrel_pool::Pool;
use quarrel_proto::command::COMMAND_BYTES_MAX;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tonic::{
    body::Body,
    codegen::http,
    transport::{Server, server::Connected},
};
use tower::util::MapRequestLayer;

use quarrel_wire::{DO_EXCHANGE, DO_PUT};

use crate::{
    config::{Config, Listen},
    service::Service,
    shared::Shared,
    wire::{ENVELOPE_BYTES, Front},
};

/// What a client may send ahead of us: four messages of the usual 1 MiB, for several streams on one connection. With two a client
/// waits now and then (5 % less); larger windows are no faster, and they are memory that no permit covers.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// Three streams whose client does not read, and what they have sent ahead lies here, leave room for a fourth on their connection.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Of 16 KiB to 1 MiB, frames of 256 KiB and more were the fastest: fewer headers, fewer and longer reads.
const FRAME_BYTES: u32 = 256 << 10;
/// A descriptor with the largest command, and its envelope.
const CALL_BYTES_MAX: usize = COMMAND_BYTES_MAX + (64 << 10);
/// Health checks and actions, beside as many streams as there may be.
const CALLS_BESIDE_STREAMS: u32 = 8;
/// Between the end of draining and the end of the process, for errors to leave.
const FAREWELL: Duration = Duration::from_secs(1);
/// A dead peer is noticed within twice this.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// A socket that listens.
#[derive(Debug)]
pub struct Bound {
    socket: Socket,
    /// What a client connects to: `grpc://HOST:PORT` or `grpc+unix://PATH`.
    pub address: String,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
    Local(mpsc::Receiver<UnixStream>),
}

/// Connects to a server in the same process.
#[derive(Debug, Clone)]
pub struct Dial(mpsc::Sender<UnixStream>);

impl Dial {
    /// The client's end of a new connection.
    ///
    /// # Errors
    /// `ConnectionRefused` once the server has stopped; the system's, if it gives no sockets.
    pub async fn connect(&self) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.0.send(theirs).await.map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
        Ok(ours)
    }
}

/// A server for its own process alone: its connections are socket pairs, so that there is nothing to find from outside and
/// no file to leave behind.
pub fn local() -> (Bound, Dial) {
    let (sender, receiver) = mpsc::channel(1);
    (Bound { socket: Socket::Local(receiver), address: "this process".to_owned() }, Dial(sender))
}

/// Binds. A stale Unix socket, one that nobody listens at, is replaced.
///
/// # Errors
/// The system's, for an address that cannot be had.
pub async fn bind(listen: &Listen) -> io::Result<Bound> {
    match listen {
        Listen::Tcp(address) => {
            let listener = TcpListener::bind(address).await?;
            let address = format!("grpc://{}", listener.local_addr()?);
            Ok(Bound { socket: Socket::Tcp(listener), address })
        }
        Listen::Unix(path) => {
            let is_socket = std::fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket());
            if is_socket && UnixStream::connect(path).await.is_err() {
                std::fs::remove_file(path)?;
            }
            let listener = UnixListener::bind(path)?;
            let address = format!("grpc+unix://{}", path.display());
            Ok(Bound { socket: Socket::Unix(listener, path.clone()), address })
        }
    }
}

/// Serves until `shutdown`; then running streams have `drain_seconds` to end.
///
/// # Errors
/// If the limits contradict each other, or the system gives no threads.
pub async fn run(
    bound: Bound,
    config: Config,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    config.check()?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Pool::new(config.threads.map_or(cores, usize::from))?;
    let drain = Duration::from_secs(config.drain_seconds);
    let shared = Arc::new(Shared::new(config, pool)?);
    tracing::info!(address = bound.address, level = shared.level.name(), threads = shared.pool.threads(), "listening");

    let path = match &bound.socket {
        Socket::Unix(_, path) => Some(path.clone()),
        Socket::Tcp(_) | Socket::Local(_) => None,
    };
    let (health, health_service) = tonic_health::server::health_reporter();
    let service = FlightServiceServer::new(Service { shared: Arc::clone(&shared) })
        // A larger message is an error with its reason; within it, memory is the permits' business.
        .max_decoding_message_size(shared.config.message_bytes_max + ENVELOPE_BYTES)
        .max_encoding_message_size(usize::MAX);
    let service = Front::new(Arc::clone(&shared), service);
    health.set_serving::<FlightServiceServer<Service>>().await;

    let draining = shared.draining.clone();
    let streams_max = u32::try_from(shared.config.streams_max).unwrap_or(u32::MAX);
    let server = Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        // Calls that wait for their bodies hold memory before any permit: few of them, small, and not for long. A stream's
        // response begins at once, so no stream is timed out here.
        .max_concurrent_streams(Some(streams_max.saturating_add(CALLS_BESIDE_STREAMS)))
        .timeout(Duration::from_secs(shared.config.idle_seconds))
        .layer(MapRequestLayer::new(limit_call))
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .add_service(health_service)
        .add_service(service)
        .serve_with_incoming_shutdown(
            accept(bound.socket, Arc::clone(&shared), draining.clone()),
            draining.cancelled_owned(),
        );
    tokio::pin!(server);

    tokio::select! {
        ended = &mut server => return Ok(ended?),
        () = shutdown => {}
    }
    tracing::info!(seconds = drain.as_secs(), "stopping: running streams may end");
    health.set_not_serving::<FlightServiceServer<Service>>().await;
    health.set_service_status("", tonic_health::ServingStatus::NotServing).await;
    shared.draining.cancel();
    // Nobody new finds a server that is stopping.
    if let Some(path) = path {
        let _ = std::fs::remove_file(path);
    }
    let ended = async { tokio::join!(&mut server, shared.jobs.idle(shared.config.jobs_max)) };
    tokio::pin!(ended);
    if timeout(drain, &mut ended).await.is_err() {
        // tonic itself would wait for ever.
        tracing::info!("stopping: what still runs is ended; jobs go on when they are submitted again");
        shared.stopped.cancel();
        shared.jobs.stop();
        let _ = timeout(FAREWELL, &mut ended).await;
    }
    tracing::info!("stopped");
    Ok(())
}

/// Bounds the body of a call that is no stream.
fn limit_call(request: http::Request<Body>) -> http::Request<Body> {
    match request.uri().path() {
        DO_EXCHANGE | DO_PUT => request,
        _ => request.map(|body| Body::new(Limited::new(body, CALL_BYTES_MAX))),
    }
}

/// Connections, at most so many at once, until `draining`.
///
/// A task of its own owns the socket and drops it then: a socket that is open but not accepted from would let new clients
/// wait where they could go elsewhere.
fn accept(
    mut socket: Socket,
    shared: Arc<Shared>,
    draining: CancellationToken,
) -> impl Stream<Item = io::Result<Connection>> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let most = shared.config.connections_max;
        let places = Arc::new(Semaphore::new(most));
        loop {
            let accepted = tokio::select! {
                accepted = socket.accept() => accepted,
                () = draining.cancelled() => break,
            };
            match (accepted, Arc::clone(&places).try_acquire_owned()) {
                (Ok(io), Ok(place)) => {
                    let connection = Connection::new(io, place, &shared.config);
                    if sender.send(Ok(connection)).await.is_err() {
                        break;
                    }
                }
                (Ok(_), Err(_)) => tracing::warn!(connections_max = most, "a connection is refused"),
                (Err(error), _) => {
                    // Out of files, or a peer that left in the handshake: the listener itself is sound.
                    tracing::warn!(%error, "a connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
    });
    stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) })
}

impl Socket {
    async fn accept(&mut self) -> io::Result<Box<dyn Io>> {
        match self {
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // serve_with_incoming ignores tonic's own setting.
                stream.set_nodelay(true)?;
                Ok(Box::new(stream))
            }
            Socket::Unix(listener, _) => Ok(Box::new(listener.accept().await?.0)),
            Socket::Local(dialled) => match dialled.recv().await {
                Some(stream) => Ok(Box::new(stream)),
                // Nobody will dial any more; what is open goes on.
                None => std::future::pending().await,
            },
        }
    }
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connection that can be closed from within, and that holds its place among `connections_max`.
struct Connection {
    io: Box<dyn Io>,
    peer: Peer,
    killed: Option<Pin<Box<tokio_util::sync::WaitForCancellationFutureOwned>>>,
    /// Whether a byte has come.
    greeted: Arc<AtomicBool>,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    fn new(io: Box<dyn Io>, place: OwnedSemaphorePermit, config: &Config) -> Connection {
        let (peer, greeted) = (Peer::new(config), Arc::new(AtomicBool::new(false)));
        let (late, spoken) = (peer.kill.clone(), Arc::clone(&greeted));
        // HTTP/2's keepalive begins after its greeting.
        let patience = Duration::from_secs(config.header_seconds);
        tokio::spawn(async move {
            tokio::time::sleep(patience).await;
            if !spoken.load(Ordering::Relaxed) {
                late.cancel();
            }
        });
        Connection { io, peer, killed: None, greeted, _place: place }
    }
}

/// What a request knows of its connection.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    /// Closes it.
    pub(crate) kill: CancellationToken,
    /// Places for streams on it.
    pub(crate) streams: Arc<Semaphore>,
}

impl Peer {
    fn new(config: &Config) -> Peer {
        Peer { kill: CancellationToken::new(), streams: Arc::new(Semaphore::new(config.connection_streams_max)) }
    }

    /// A request's; every connection of ours has one.
    pub(crate) fn of(extensions: &http::Extensions, config: &Config) -> Peer {
        extensions.get::<Peer>().cloned().unwrap_or_else(|| Peer::new(config))
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl Connection {
    fn check(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        let kill = self.peer.kill.clone();
        let killed = self.killed.get_or_insert_with(|| Box::pin(kill.cancelled_owned()));
        match killed.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionAborted.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(context)?;
        let polled = Pin::new(&mut self.io).poll_read(context, buffer);
        if polled.is_ready() {
            self.greeted.store(true, Ordering::Relaxed);
        }
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
