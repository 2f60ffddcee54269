//! A request's bytes to frames, and room for each message before it is read.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::{FutureExt, future::BoxFuture};
use http_body_util::BodyStream;
use quarrel_pool::{Landing, Share, Stalled};
use quarrel_proto::{Reason, metadata};
use quarrel_shelf::Shelf;
use quarrel_wire::{Messages, Received, Step};
use tonic::body::Body;

use crate::{
    frame::FrameIn,
    status::{Broken, Fault, broken_off, of_malformed},
};

/// A message's own overhead beyond the body: header, metadata, tags.
pub(crate) const ENVELOPE_BYTES: usize = 1 << 20;

/// The frames of a request.
pub(crate) struct Frames {
    body: BodyStream<Body>,
    messages: Messages,
    /// The room of the message that comes, or the wait for it.
    landing: Option<Landing>,
    waiting: Option<BoxFuture<'static, Result<Landing, Fault>>>,
    limits: Limits,
    /// Whether something was no message: what follows means nothing.
    is_broken: bool,
    /// Whether nothing more comes.
    is_over: bool,
}

/// What a request may take.
pub(crate) struct Limits {
    pub(crate) share: Arc<Share>,
    pub(crate) shelf: Shelf,
    pub(crate) message_bytes_max: usize,
    /// How long a message waits for room.
    pub(crate) stall_seconds: u64,
}

impl Frames {
    /// Of a request to DoExchange. A message whose body cannot but be longer is an error.
    pub(crate) fn new(body: Body, limits: Limits) -> Frames {
        Frames {
            body: BodyStream::new(body),
            messages: Messages::new(limits.message_bytes_max + ENVELOPE_BYTES, limits.shelf.clone()),
            landing: None,
            waiting: None,
            limits,
            is_broken: false,
            is_over: false,
        }
    }

    /// The next frame, if it is complete with what has come.
    fn next(&mut self) -> Result<Option<FrameIn>, Fault> {
        loop {
            let step = self.messages.step().map_err(|why| of_malformed(&why, self.limits.message_bytes_max))?;
            match step {
                Step::Nothing => return Ok(None),
                Step::Whole(message) => return Ok(Some(FrameIn { room: self.landing.take(), ..message.into() })),
                Step::Begins(bytes) if self.limits.share.lands_small(bytes) => {}
                Step::Begins(bytes) => {
                    self.landing = self.limits.share.try_land(bytes);
                    if self.landing.is_none() {
                        self.waiting = Some(room(&self.limits, bytes).boxed());
                        return Ok(None);
                    }
                }
            }
        }
    }
}

/// Waits for room for a message, and reads nothing meanwhile.
fn room(limits: &Limits, bytes: usize) -> impl Future<Output = Result<Landing, Fault>> + use<> {
    let (share, seconds) = (Arc::clone(&limits.share), limits.stall_seconds);
    async move {
        let what = || {
            format!("no room in `memory_bytes_max` for a message for {seconds} s (`stall_seconds`): try again later")
        };
        let stall = Duration::from_secs(seconds);
        share.land(bytes, stall).await.map_err(|Stalled| Fault::new(Reason::Busy, what()))
    }
}

impl From<Received> for FrameIn {
    fn from(Received { data, body }: Received) -> FrameIn {
        FrameIn {
            command: data.flight_descriptor.map(|descriptor| descriptor.cmd),
            header: data.data_header,
            body,
            is_last: metadata::is_end(&data.app_metadata),
            metadata: data.app_metadata,
            room: None,
        }
    }
}

impl Frames {
    fn broken(&mut self, fault: Fault) -> Poll<Option<Result<FrameIn, Broken>>> {
        self.is_broken = true;
        Poll::Ready(Some(Err(Broken::Fault(fault))))
    }
}

impl futures::Stream for Frames {
    type Item = Result<FrameIn, Broken>;

    /// After an error there is nothing more; once the share is given up, the rest is read to its end, and nothing of it is kept.
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if self.limits.share.is_given_up() {
                (self.waiting, self.landing) = (None, None);
                self.messages.clear();
            } else if self.is_broken {
                return Poll::Ready(None);
            }
            if self.is_over {
                return Poll::Ready(None);
            }
            if let Some(waiting) = &mut self.waiting {
                let room = ready!(waiting.poll_unpin(context));
                self.waiting = None;
                match room {
                    Ok(room) => self.landing = Some(room),
                    Err(fault) => return self.broken(fault),
                }
            }
            match self.next() {
                Ok(None) if self.waiting.is_some() => continue,
                Ok(None) => {}
                Ok(Some(frame)) => return Poll::Ready(Some(Ok(frame))),
                Err(fault) => return self.broken(fault),
            }
            match ready!(Pin::new(&mut self.body).poll_next(context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(piece) => self.messages.feed(piece),
                    Err(_trailers) => self.is_over = true,
                },
                // A reset, with whatever code, or a connection that is closed: nobody can be told.
                Some(Err(_reset)) => {
                    self.is_over = true;
                    return Poll::Ready(Some(Err(Broken::Gone)));
                }
                None => self.is_over = true,
            }
            if self.is_over && !self.messages.is_at_a_boundary() {
                return self.broken(broken_off("it ends within a message"));
            }
        }
    }
}
