//! DoPut: layers of a client, to a checkpoint at a URI. It is a stream of `exchange` whose answers the server writes itself.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arrow_flight::PutResult;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{Stream, StreamExt, stream};
use prost::Message;
use quarrel_checkpoint::{Beside, CheckpointError, Filling, Gate, Put, Replace, Stop};
use quarrel_engine::Answer;
use quarrel_pool::Share;
use quarrel_proto::{
    Reason,
    command::{parse, to_json},
    json,
    metadata::End,
    v1::{self, command::Verb},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::spawn_blocking,
    time::{interval, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    exchange,
    frame::FrameIn,
    jobs::by,
    outbox::Responses,
    replies::{Answered, Answers},
    shared::Shared,
    sinks::Claim,
    stack::Peer,
    status::{Broken, Fault},
};

/// How often a stream is told that its answers are still being written.
const TELL: Duration = Duration::from_secs(1);

/// Starts a stream, and returns its response: progress, the newest when there is room for it, and at the end the summary of what
/// is sealed.
pub(crate) fn open<F>(
    shared: &Arc<Shared>,
    frames: F,
    share: Arc<Share>,
    peer: Peer,
) -> Result<impl Stream<Item = Result<VecDeque<Bytes>, Fault>> + Send + Unpin + 'static, Fault>
where
    F: Stream<Item = Result<FrameIn, Broken>> + Send + Unpin + 'static,
{
    let (opened, begins) = oneshot::channel();
    let end = Arc::new(Mutex::new(None));
    let stop = Arc::<Stop>::default();
    let frames = layers(Arc::clone(shared), frames, (opened, Arc::clone(&stop)), Arc::clone(&end));
    // Its first word waits for a store.
    let patience = Duration::from_secs(shared.config.stream_seconds);
    let answers = exchange::open::<Answers, _>(Arc::clone(shared), frames, share, peer, patience)?;
    let (sender, results) = mpsc::channel(1);
    let sealing = Sealing { shared: Arc::clone(shared), answers, end, results: sender, stop };
    tokio::spawn(sealing.run(begins));
    Ok(stream::unfold(results, |mut results| async { Some((results.recv().await?, results)) }).boxed())
}

/// What a stream writes to; a [`Put`] that nobody takes is taken back.
struct Opened {
    put: Put,
    claim: Claim,
}

/// A client's messages as a stream of DoExchange has them: the first without its sink, which is opened; the last said to be it.
fn layers<F>(
    shared: Arc<Shared>,
    mut frames: F,
    (opened, stop): (oneshot::Sender<Opened>, Arc<Stop>),
    end: Arc<Mutex<Option<End>>>,
) -> impl Stream<Item = Result<FrameIn, Broken>> + Send + Unpin + 'static
where
    F: Stream<Item = Result<FrameIn, Broken>> + Send + Unpin + 'static,
{
    let first = async move {
        let first = match begin(&shared, &mut frames, stop).await {
            Ok((first, put)) => {
                let _ = opened.send(put);
                Ok(first)
            }
            Err(broken) => Err(broken),
        };
        // Whatever it was, the rest is to be read: else its client would not see why.
        stream::iter([first]).chain(until_the_end(frames, end))
    };
    stream::once(first).flatten().boxed()
}

/// The first message, with the command that the stream is of.
async fn begin<F>(shared: &Arc<Shared>, frames: &mut F, stop: Arc<Stop>) -> Result<(FrameIn, Opened), Broken>
where
    F: Stream<Item = Result<FrameIn, Broken>> + Send + Unpin + 'static,
{
    let seconds = shared.config.header_seconds;
    let first = timeout(Duration::from_secs(seconds), frames.next()).await.map_err(|_| {
        let what = format!("no command came within {seconds} s (`header_seconds`)");
        Broken::Fault(Fault::new(Reason::HeaderTimeout, what))
    })?;
    let missing = || Broken::Fault(quarrel_proto::command::CommandError::Missing.into());
    let mut first = first.ok_or_else(missing)??;
    let command = first.command.take().ok_or_else(missing)?;
    let of = Arc::clone(shared);
    let opening = spawn_blocking(move || sink(&of, &command, &stop));
    let opened = opening.await.map_err(|_| Broken::Fault(Fault::ours()))?.map_err(Broken::Fault)?;
    first.command = Some(Bytes::from(to_json(&opened.put.command)));
    Ok((first, opened))
}

/// Opens what a command writes to.
fn sink(shared: &Shared, command: &[u8], stop: &Arc<Stop>) -> Result<Opened, Fault> {
    let command = parse(command)?;
    let unsupported = |what: &str| Fault::new(Reason::VerbUnsupported, what);
    let conflict = |what: &str| Fault::new(Reason::OptionConflict, what);
    if command.source.is_some() {
        return Err(unsupported("DoPut reads no `source`: submit a job with DoAction `job.submit`"));
    }
    let Some(uri) = &command.sink else {
        return Err(unsupported("DoPut writes to a `sink`, a URI: DoExchange returns the quantized layers"));
    };
    let Some(Verb::Quantize(quantize)) = command.verb else {
        return Err(unsupported("DoPut serves `quantize` alone: DoExchange returns what other verbs answer"));
    };
    if quantize.return_kept.is_some() {
        return Err(conflict("`return_kept` has no effect on a checkpoint: what is kept is stored"));
    }
    let (sink, claim) = shared.jobs.sink(uri, "a stream".to_owned())?;
    let put = Put::open(&sink, quantize, shared.config.shard_bytes_max, Replace::Never, stop)?;
    Ok(Opened { put, claim })
}

/// Messages up to the one that says the end, which it must.
fn until_the_end<F>(frames: F, end: Arc<Mutex<Option<End>>>) -> impl Stream<Item = Result<FrameIn, Broken>> + Send
where
    F: Stream<Item = Result<FrameIn, Broken>> + Send + Unpin + 'static,
{
    stream::unfold((frames, end, false), |(mut frames, end, is_over)| async move {
        if is_over {
            return None;
        }
        let Some(frame) = frames.next().await else {
            let what = "the layers end without the end that seals them: nothing is kept";
            return Some((Err(Broken::Fault(Fault::new(Reason::EndMissing, what))), (frames, end, true)));
        };
        let frame = frame.and_then(|frame| match End::of(&frame.metadata) {
            None => Ok(FrameIn { is_last: false, ..frame }),
            Some(Ok(said)) => {
                *end.lock().unwrap_or_else(PoisonError::into_inner) = Some(said);
                Ok(FrameIn { is_last: true, ..frame })
            }
            Some(Err(why)) => {
                let what = format!("the end is `{{\"end\": {{\"layers\": N}}}}`, with or without a `config`: {why}");
                Err(Broken::Fault(Fault::new(Reason::EndInvalid, what)))
            }
        });
        Some((frame, (frames, end, false)))
    })
}

/// The other half: answers to files.
struct Sealing {
    shared: Arc<Shared>,
    answers: Responses<Answered>,
    end: Arc<Mutex<Option<End>>>,
    results: mpsc::Sender<Result<VecDeque<Bytes>, Fault>>,
    stop: Arc<Stop>,
}

impl Sealing {
    async fn run(mut self, begins: oneshot::Receiver<Opened>) {
        let gone = CancellationToken::new();
        let (results, stopped, stop) = (self.results.clone(), self.shared.stopped.clone(), Arc::clone(&self.stop));
        let nobody_waits = async {
            tokio::select! { () = results.closed() => {}, () = stopped.cancelled() => {} }
        };
        let ended = {
            let sealed = async {
                match begins.await {
                    Ok(Opened { put, claim }) => self.write(put, claim, &gone).await,
                    // Whoever does not send it has said why to the stream.
                    Err(_) => self.refused().await,
                }
            };
            tokio::pin!(sealed);
            tokio::select! {
                ended = &mut sealed => ended,
                () = nobody_waits => {
                    stop.stop();
                    gone.cancel();
                    sealed.await
                }
            }
        };
        let last = match ended {
            Ok(summary) => Ok(message(json::summary(&summary))),
            Err(_) if stopped.is_cancelled() => {
                let what = "the server has stopped before the stream was done: try again";
                Err(Fault::new(Reason::Stopping, what))
            }
            Err(fault) => Err(fault),
        };
        let is_refused = last.is_err();
        let _ = results.send(last).await;
        if is_refused {
            // What still comes is read: else the client would not see why.
            let rest = async { while self.answers.next().await.is_some() {} };
            tokio::select! { () = rest => {}, () = results.closed() => {} }
        }
    }

    /// Why nothing was opened.
    async fn refused(&mut self) -> Result<v1::Summary, Fault> {
        while let Some(answer) = self.answers.next().await {
            answer?;
        }
        Err(Fault::ours())
    }

    /// Writes what comes, and seals it; or takes back all of it.
    async fn write(&mut self, put: Put, claim: Claim, gone: &CancellationToken) -> Result<v1::Summary, Fault> {
        let mut filling = Filling::new(put, Arc::clone(&self.stop));
        let sealed = self.seal(&mut filling, gone).await;
        if sealed.is_err() {
            self.stop.stop();
            drop(filling);
            self.stop.released().await;
        }
        drop(claim);
        sealed
    }

    async fn seal(&mut self, filling: &mut Filling, gone: &CancellationToken) -> Result<v1::Summary, Fault> {
        let mut summary = loop {
            let answer = tokio::select! {
                answer = self.answers.next() => answer,
                () = gone.cancelled() => return Err(CheckpointError::stopped().into()),
            };
            match answer.ok_or_else(Fault::ours)?? {
                Answered::Rows(Answer { batch, progress }) => {
                    self.telling(filling.take(batch)).await?;
                    // Whoever does not read them need not.
                    let _ = self.results.try_send(Ok(message(json::progress(&progress))));
                }
                Answered::Summary(summary) => break summary,
            }
        };
        let end = self.end.lock().unwrap_or_else(PoisonError::into_inner).take().ok_or_else(Fault::ours)?;
        self.telling(filling.end(Some(end.layers), Gate::default())).await?;
        let sealed = filling.finish("a stream".to_owned(), Beside::of(end.config), by(&self.shared));
        let report = self.telling(sealed).await?;
        summary.total_seconds = report.seconds;
        summary.bytes_out = report.totals.destination_bytes;
        tracing::info!(sink = report.destination, seconds = report.seconds, "sealed");
        Ok(*summary)
    }

    /// Waits for a step, however slow a store is: that is no standstill of the stream.
    async fn telling<T>(&self, step: impl Future<Output = T>) -> T {
        tokio::pin!(step);
        let mut tell = interval(TELL);
        loop {
            tokio::select! {
                done = &mut step => return done,
                _ = tell.tick() => self.answers.still_takes(),
            }
        }
    }
}

/// A message of the response.
fn message(text: String) -> VecDeque<Bytes> {
    let result = PutResult { app_metadata: text.into() };
    let mut bytes = BytesMut::with_capacity(5 + result.encoded_len());
    bytes.put_u8(0);
    bytes.put_u32(result.encoded_len() as u32);
    bytes.extend_from_slice(&result.encode_to_vec());
    VecDeque::from([bytes.freeze()])
}
