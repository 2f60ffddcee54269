//! The client against a server in this process: what comes back, in what order, and what happens when things break.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::VecDeque,
    io,
    num::NonZeroUsize,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use quarrel_client::{
    Client, CodedLayer, Dtype, Error, Kind, Layer, Outcome, QuantizedLayer,
    proto::{Reason, v1},
    scheme, whole,
};
use quarrel_flight::{Config, Dial, local, run};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    sync::oneshot,
};

/// A server in this process. Dropped, it stops.
struct Server {
    dial: Dial,
    _stop: oneshot::Sender<()>,
}

fn server(change: impl FnOnce(&mut Config)) -> Server {
    let mut config = Config::from_environment().unwrap();
    change(&mut config);
    let (bound, dial) = local();
    let (stop, stopped) = oneshot::channel();
    tokio::spawn(run(bound, config, async move { drop(stopped.await) }));
    Server { dial, _stop: stop }
}

async fn client(server: &Server) -> Client {
    let dial = server.dial.clone();
    Client::over(move || {
        let dial = dial.clone();
        async move { dial.connect().await }
    })
    .await
    .unwrap()
}

/// Numbers that are no two layers' and no two channels' alike.
fn weights(seed: u64, elements: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    std::iter::repeat_with(next).take(elements).flat_map(f32::to_le_bytes).collect()
}

fn layer(name: &str, seed: u64, shape: [u64; 2]) -> Layer {
    Layer::new(name, Dtype::F32, shape, weights(seed, (shape[0] * shape[1]) as usize))
}

/// Small ones, one of several runs, one of no elements, one of one dimension.
fn model() -> Vec<Layer> {
    vec![
        layer("a", 1, [3, 128]),
        layer("b", 2, [1500, 1024]),
        Layer::new("empty", Dtype::F32, [0, 128], Vec::new()),
        Layer::new("norm", Dtype::F32, [128], weights(3, 128)),
        layer("c", 4, [64, 256]),
        layer("d", 5, [2100, 512]),
    ]
}

async fn quantized(client: &Client, command: v1::Quantize, layers: Vec<Layer>) -> Result<Vec<QuantizedLayer>, Error> {
    whole(client.quantize(command, layers)).try_collect().await
}

/// Everything that must not depend on the way, by name.
fn bits(mut layers: Vec<QuantizedLayer>) -> Vec<(String, Outcome, Option<quarrel_client::Metrics>)> {
    layers.sort_by(|a, b| a.name().cmp(b.name()));
    layers.into_iter().map(|layer| (layer.name().to_owned(), layer.outcome.clone(), layer.metrics)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_layer_comes_back_in_order() {
    let server = server(|_| {});
    let layers = quantized(&client(&server).await, scheme("W4A16"), model()).await.unwrap();
    let names = Vec::from_iter(layers.iter().map(QuantizedLayer::name));
    assert_eq!(names, ["a", "b", "empty", "norm", "c", "d"]);
    for layer in &layers {
        match (&layer.outcome, layer.name()) {
            (Outcome::Kept { reason, .. }, "empty") => assert_eq!(reason, "empty"),
            (Outcome::Kept { reason, .. }, "norm") => assert_eq!(reason, "rank_1"),
            (Outcome::Quantized(codes), _) => {
                let elements = layer.layer.shape().iter().product::<u64>() as usize;
                assert_eq!((codes.data.len(), codes.scales.len()), (elements / 2, elements / 128));
                assert_eq!((codes.scheme.as_str(), codes.bit_width, &codes.zero_points), ("W4A16", 4, &None));
                let metrics = layer.metrics.unwrap();
                assert_eq!(metrics.elements, elements as u64);
                assert!(metrics.sqnr_db.unwrap() > 15.0);
            }
            (outcome, name) => panic!("{name}: {outcome:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_streams_give_the_same_bits() {
    let server = server(|_| {});
    let one = client(&server).await;
    let four = one.clone().streams(NonZeroUsize::new(4).unwrap());
    let mut alone = one.quantize(scheme("W4A16_ASYM"), model());
    let mut runs = Vec::new();
    while let Some(run) = alone.try_next().await.unwrap() {
        runs.push(run);
    }
    assert!(alone.effective_command().unwrap().contains("W4A16_ASYM"));
    assert_eq!(alone.summaries().iter().map(|summary| summary.layers_quantized).sum::<u64>(), 4);
    let parts = runs.iter().filter(|run| run.layer.name() == "b");
    assert!(parts.count() > 1, "the large layer came in one run");
    let together = whole(futures::stream::iter(runs.into_iter().map(Ok)).boxed()).try_collect().await.unwrap();
    assert_eq!(bits(quantized(&four, scheme("W4A16_ASYM"), model()).await.unwrap()), bits(together));
}

#[tokio::test(flavor = "multi_thread")]
async fn codes_come_back_as_the_values_that_they_stand_for() {
    let server = server(|_| {});
    let client = client(&server).await;
    for name in ["int8", "W4A16_ASYM", "fp8/tensor", "FP8_BLOCK", "Q8_0"] {
        let sent = vec![layer("b", 2, [1500, 1024]), layer("a", 1, [3, 128])];
        let coded = quantized(&client, scheme(name), sent.clone()).await.unwrap();
        let coded = coded.into_iter().map(|layer| {
            let Outcome::Quantized(codes) = layer.outcome else { panic!("{name}: not quantized") };
            let (shape, data) = (layer.layer.shape().to_vec(), codes.data.clone());
            let span = match name {
                "fp8/tensor" => shape[0],
                "FP8_BLOCK" => 128,
                _ => 1,
            };
            let channels = (shape[0], data.len() as u64 / shape[0]);
            let read = move |range: std::ops::Range<u64>| Ok(data.slice(range.start as usize..range.end as usize));
            let (scales, points) = (codes.scales, codes.zero_points);
            let span = span.try_into().unwrap();
            CodedLayer::new(layer.layer.name(), Dtype::F32, shape, codes.scheme, channels, span, scales, points, read)
        });
        let runs: Vec<_> =
            client.dequantize(v1::Dequantize::default(), coded.collect::<Vec<_>>()).try_collect().await.unwrap();
        for layer in sent {
            let decoded = Vec::from_iter(runs.iter().filter(|run| &*run.name == layer.name()));
            assert!(decoded.last().unwrap().is_last);
            let decoded = Vec::from_iter(decoded.iter().flat_map(|run| floats(&run.data)));
            let original = floats(&Vec::from_iter(weights(if layer.name() == "a" { 1 } else { 2 }, decoded.len())));
            assert_eq!(decoded.len(), original.len());
            let error = decoded.iter().zip(&original).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error < 0.08, "{name} {}: {error}", layer.name());
            assert!(error > 0.0, "{name} {}: exact", layer.name());
        }
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_servers_error_is_typed_and_names_the_layer() {
    let server = server(|_| {});
    let client = client(&server).await;
    let mut numbers = weights(1, 256);
    numbers[40..44].copy_from_slice(&f32::NAN.to_le_bytes());
    let layers = vec![layer("good", 1, [3, 128]), Layer::new("mlp.up", Dtype::F32, [2, 128], numbers)];
    let mut runs = client.quantize(scheme("int8"), layers.clone());
    assert_eq!(runs.try_next().await.unwrap().unwrap().layer.name(), "good");
    let error = runs.try_next().await.unwrap_err();
    assert_eq!((error.reason(), error.layer(), error.kind()), (Some(Reason::NonFinite), Some("mlp.up"), Kind::Caller));
    assert!(error.to_string().contains("10"), "it names the index: {error}");
    assert!(runs.try_next().await.unwrap().is_none(), "nothing comes after an error");

    let go_on = v1::Quantize { on_error: Some("continue".into()), ..scheme("int8") };
    let passed = quantized(&client, go_on, layers).await.unwrap();
    assert!(matches!(&passed[1].outcome, Outcome::Failed { reason, .. } if reason == "non_finite"), "{passed:?}");

    let unknown = quantized(&client, scheme("W5A17"), model()).await.unwrap_err();
    assert_eq!((unknown.reason(), unknown.advice()), (Some(Reason::SchemeUnknown), Reason::SchemeUnknown.advice()));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_sent_is_an_error_before_it_is() {
    let server = server(|_| {});
    let client = client(&server).await;
    let short = Layer::new("short", Dtype::F32, [2, 128], vec![0; 1020]);
    let error = quantized(&client, scheme("int8"), vec![short]).await.unwrap_err();
    assert_eq!(error.layer(), Some("short"));
    assert!(error.to_string().contains("1020 bytes") && error.to_string().contains("expected 1024"), "{error}");

    let unreadable = Layer::lazy("gone", Dtype::F32, [2, 128], |_| Err(io::ErrorKind::NotFound.into()));
    let error = quantized(&client, scheme("int8"), vec![layer("a", 1, [3, 128]), unreadable]).await.unwrap_err();
    assert!(matches!(&error, Error::Source { layer, .. } if layer == "gone"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_said_with_the_systems_word() {
    let error = Client::connect("127.0.0.1:1").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    assert!(error.to_string().contains("refused"), "{error}");
    assert!(matches!(Client::connect("http://localhost").await.unwrap_err(), Error::Address { .. }));
}

/// A connection that breaks after so many bytes were sent over it.
struct Breaking {
    inner: UnixStream,
    left: usize,
}

impl AsyncRead for Breaking {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, buffer)
    }
}

impl AsyncWrite for Breaking {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let some = bytes.len().min(self.left);
        if some == 0 && !bytes.is_empty() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let written = std::task::ready!(Pin::new(&mut self.inner).poll_write(context, &bytes[..some]))?;
        self.left -= written;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

/// A client whose connections break after the bytes that `lives` says, one after the other; then they live on.
async fn breaking(server: &Server, lives: &[usize]) -> (Client, Arc<AtomicUsize>) {
    let (dial, dialled) = (server.dial.clone(), Arc::new(AtomicUsize::new(0)));
    let (lives, count) = (Arc::new(Mutex::new(VecDeque::from(lives.to_vec()))), Arc::clone(&dialled));
    let client = Client::over(move || {
        // The first connection is `connect`'s own question.
        let first = count.fetch_add(1, Ordering::Relaxed) == 0;
        let left = if first { usize::MAX } else { lives.lock().unwrap().pop_front().unwrap_or(usize::MAX) };
        let dial = dial.clone();
        async move { Ok(Breaking { inner: dial.connect().await?, left }) }
    });
    (client.await.unwrap(), dialled)
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_whose_stream_broke_are_sent_again_and_come_whole() {
    let server = server(|_| {});
    let undisturbed = bits(quantized(&client(&server).await, scheme("W4A16"), model()).await.unwrap());
    let (client, dialled) = breaking(&server, &[3_000_000, 5_000_000, 4_500_000]).await;
    assert_eq!(bits(quantized(&client, scheme("W4A16"), model()).await.unwrap()), undisturbed);
    assert_eq!(dialled.load(Ordering::Relaxed), 5, "one to connect, three that broke, one that lived");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_again_and_again_is_given_up() {
    let server = server(|_| {});
    let (client, dialled) = breaking(&server, &[1000; 20]).await;
    let error = quantized(&client.retries(2), scheme("W4A16"), model()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unavailable);
    assert_eq!(dialled.load(Ordering::Relaxed), 4, "one to connect, one and two retries");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_callers_mistake_is_not_tried_again() {
    let server = server(|_| {});
    let (client, dialled) = breaking(&server, &[]).await;
    quantized(&client, scheme("nonsense"), model()).await.unwrap_err();
    assert_eq!(dialled.load(Ordering::Relaxed), 2);
}

/// 64 layers of two runs, 2 MiB each, that are counted when they are read.
fn many(read: &Arc<AtomicU64>) -> Vec<Layer> {
    let bytes = Bytes::from(weights(7, 1 << 20));
    let lazy = |index: usize| {
        let (bytes, read) = (bytes.clone(), Arc::clone(read));
        Layer::lazy(format!("layer.{index}"), Dtype::F32, [1024, 1024], move |range| {
            read.fetch_add(1, Ordering::Relaxed);
            Ok(bytes.slice(range.start as usize..range.end as usize))
        })
    };
    (0..64).map(lazy).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_pauses_meets_neither_an_error_nor_much_memory() {
    // Patience of a second: a client that does not read is cut off, and so is one of which nothing is heard.
    let server = server(|config| {
        config.memory_bytes_max = 32 << 20;
        config.message_bytes_max = 16 << 20;
        config.stall_seconds = 1;
        config.idle_seconds = 1;
    });
    let read = Arc::new(AtomicU64::new(0));
    let mut runs = client(&server).await.quantize(scheme("int8"), many(&read));
    runs.try_next().await.unwrap().unwrap();
    // The patience of the server, three times.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let ahead = read.load(Ordering::Relaxed);
    assert!(ahead < 80, "{ahead} runs of 2 MiB were read while one was taken");
    let mut rest = 0;
    while runs.try_next().await.unwrap().is_some() {
        rest += 1;
    }
    assert_eq!((rest, read.load(Ordering::Relaxed)), (127, 128));
}

#[tokio::test(flavor = "multi_thread")]
async fn dropped_answers_leave_no_stream_behind() {
    // A stream that nobody has ended would keep its place until it is idle.
    let server = server(|config| config.streams_max = 2);
    let client = client(&server).await;
    for _ in 0..10 {
        let read = Arc::new(AtomicU64::new(0));
        let mut patience = 500;
        loop {
            let mut runs = client.quantize(scheme("int8"), many(&read));
            match runs.try_next().await {
                Ok(first) => break drop(first.unwrap()),
                Err(error) => assert_eq!(error.reason(), Some(Reason::StreamsExceeded)),
            }
            patience -= 1;
            assert!(patience > 0, "its place is taken though it is gone");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_the_answers_stops_the_work() {
    let server = server(|_| {});
    let read = Arc::new(AtomicU64::new(0));
    let client = client(&server).await;
    let mut runs = client.quantize(scheme("int8"), many(&read));
    runs.try_next().await.unwrap().unwrap();
    drop(runs);
    // The layers are dropped with the streams: their count of owners falls to ours.
    let gone = async {
        while Arc::strong_count(&read) > 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), gone).await.unwrap();
    assert!(read.load(Ordering::Relaxed) < 128);
}

#[tokio::test(flavor = "multi_thread")]
async fn schemes_and_limits_can_be_asked_for() {
    let server = server(|config| config.layers_max = 77);
    let client = client(&server).await;
    assert!(client.schemes().await.unwrap().schemes.iter().any(|scheme| scheme.name == "W4A16"));
    let info = client.server_info().await.unwrap();
    assert!(info.limits.iter().any(|limit| limit.name == "layers_max" && limit.value == 77));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_panics_is_an_error_and_no_early_end() {
    let server = server(|_| {});
    let client = client(&server).await;
    let layers =
        vec![layer("a", 1, [3, 128]), Layer::lazy("b", Dtype::F32, [2, 128], |_| panic!("a reader's own fault"))];
    assert_eq!(quantized(&client, scheme("int8"), layers).await.unwrap_err(), Error::Panicked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_must_not_be_asked_after_its_end_gives_all_that_it_has() {
    let server = server(|_| {});
    let client = client(&server).await.streams(NonZeroUsize::new(4).unwrap());
    // `unfold` panics if it is polled again after its end.
    let source = futures::stream::unfold(0, |at| async move {
        (at < 16).then(|| (Ok(layer(&format!("layer.{at}"), at, [64, 256])), at + 1))
    });
    let layers: Vec<_> = whole(client.quantize_stream(scheme("int8"), source)).try_collect().await.unwrap();
    assert_eq!(layers.len(), 16);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_servers_limits_are_kept_without_being_asked() {
    let server = server(|config| {
        config.message_bytes_max = 1 << 20;
        config.batch_rows_max = 3;
        config.streams_max = 2;
    });
    let client = client(&server).await.streams(NonZeroUsize::new(8).unwrap());
    let small = (0..50).map(|at| layer(&format!("small.{at}"), at, [1, 16]));
    let layers = small.chain([layer("large", 99, [512, 4096])]).collect();
    assert_eq!(quantized(&client, scheme("int8"), layers).await.unwrap().len(), 51);
    let wide = Layer::new("wide", Dtype::F32, [1, 1 << 19], vec![0; 1 << 21]);
    let error = quantized(&client, scheme("int8"), vec![wide]).await.unwrap_err();
    assert_eq!((error.reason(), error.layer()), (Some(Reason::ChannelTooLarge), Some("wide")));
    assert!(error.to_string().contains("1048576"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn fused_experts_are_cut_between_their_own_channels() {
    let server = server(|config| config.message_bytes_max = 1 << 20);
    let client = client(&server).await;
    let recipe = r#"{"quantize": {"recipe": {"rules": [{"targets": ["*"], "scheme": "int8", "channel_dims": 2}]}}}"#;
    let command = quarrel_client::proto::command::parse(recipe.as_bytes()).unwrap();
    let Some(v1::command::Verb::Quantize(command)) = command.verb else { panic!() };
    // An expert has 2 MiB, one of its channels 4 KiB.
    let experts = Layer::new("experts", Dtype::F32, [2, 512, 1024], weights(5, 2 * 512 * 1024));
    let [layer] = quantized(&client, command, vec![experts]).await.unwrap().try_into().unwrap();
    let Outcome::Quantized(codes) = layer.outcome else { panic!() };
    assert_eq!((codes.data.len(), codes.scales.len()), (2 * 512 * 1024, 2 * 512));
}
