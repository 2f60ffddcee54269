//! A request's bytes to frames, in one copy: each body lands in memory of its own, aligned as Arrow likes it, as its pieces
//! come from the connection.
//!
//! tonic joins a message's pieces first, in memory that grows, and Arrow would copy what is not aligned there. What is no body
//! goes to prost as it is, so that prost alone says what a message means. A message that is odd in any way goes to it as a whole, and may not be
//! large then.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use arrow_buffer::{Buffer, MutableBuffer};
use arrow_flight::FlightData;
use bytes::{Buf, Bytes};
use futures::{FutureExt, future::BoxFuture};
use http_body_util::BodyStream;
use prost::{
    Message as _,
    encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint},
};
use quarrel_pool::{Landing, Share, Stalled};
use quarrel_proto::{Reason, metadata};
use tonic::body::Body;

use super::shelf::Shelf;
use crate::{
    decode::FrameIn,
    status::{Broken, Fault, broken_off, message_too_large, of_transport},
};

/// The field of `FlightData` that is the body.
pub(super) const BODY_TAG: u32 = 1000;
/// A gRPC message's prefix: a flag, and its length.
pub(super) const PREFIX_BYTES: usize = 5;
/// A message's own overhead beyond the body: header, metadata, tags.
pub(crate) const ENVELOPE_BYTES: usize = 1 << 20;
/// What a message may have beside its body: room for a command that is too large to be told so. prost looks at it on an async thread.
const FIELDS_BYTES_MAX: usize = 4 << 20;
/// Messages of at most so many bytes wait for no room: there is one at most for each stream.
const SMALL_BYTES: usize = 64 << 10;
/// A field's key and length at most: as many as prost reads.
const KEY_BYTES_MAX: usize = 20;

/// The frames of a request.
pub(crate) struct Frames {
    body: BodyStream<Body>,
    /// What the connection gave and is not looked at yet.
    piece: Bytes,
    prefix: Vec<u8>,
    message: Option<Message>,
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

/// A message of which some has come.
struct Message {
    /// Bytes that are still to come.
    left: usize,
    /// All fields but the body.
    fields: Vec<u8>,
    /// How far they were looked through.
    seen: usize,
    /// The body, or what has come of it.
    body: MutableBuffer,
    /// Bytes of the body that are still to come.
    body_left: usize,
    /// Whether the rest is for prost, whatever is in it.
    is_odd: bool,
}

impl Frames {
    /// Of a request to DoExchange. A message whose body cannot but be longer is an error.
    pub(crate) fn new(body: Body, limits: Limits) -> Frames {
        Frames {
            body: BodyStream::new(body),
            piece: Bytes::new(),
            prefix: Vec::with_capacity(PREFIX_BYTES),
            message: None,
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
            if let Some(message) = &mut self.message {
                message.take(&mut self.piece, &self.limits.shelf);
                if message.fields.len() > FIELDS_BYTES_MAX {
                    return Err(broken_off("a message has more than 4 MiB beside its body"));
                }
                if message.left > 0 {
                    return Ok(None);
                }
                let message = self.message.take();
                let frame = message.map(|message| message.frame(&self.limits.shelf)).transpose()?;
                return Ok(frame.map(|frame| FrameIn { room: self.landing.take(), ..frame }));
            }
            let missing = (PREFIX_BYTES - self.prefix.len()).min(self.piece.len());
            self.prefix.extend_from_slice(&self.piece.split_to(missing));
            let [flag, a, b, c, d] = self.prefix[..] else { return Ok(None) };
            self.prefix.clear();
            let length = u32::from_be_bytes([a, b, c, d]) as usize;
            self.message = Some(Message::new(flag, length, self.limits.message_bytes_max)?);
            if length > SMALL_BYTES {
                self.landing = self.limits.share.try_land(length);
                if self.landing.is_none() {
                    self.waiting = Some(room(&self.limits, length).boxed());
                    return Ok(None);
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

impl Message {
    fn new(flag: u8, length: usize, most: usize) -> Result<Message, Fault> {
        match flag {
            0 => {}
            1 => return Err(broken_off("a message is compressed, which no header has said")),
            flag => return Err(broken_off(&format!("a message's compression flag is {flag}, expected 0"))),
        }
        if length > most + ENVELOPE_BYTES {
            return Err(message_too_large(most));
        }
        Ok(Message {
            left: length,
            fields: Vec::new(),
            seen: 0,
            body: MutableBuffer::new(0),
            body_left: 0,
            is_odd: false,
        })
    }

    /// Takes from a piece what belongs to the message.
    fn take(&mut self, piece: &mut Bytes, shelf: &Shelf) {
        while self.left > 0 && !piece.is_empty() {
            let taken = if self.body_left > 0 {
                let taken = self.body_left.min(piece.len());
                self.body.extend_from_slice(&piece[..taken]);
                self.body_left -= taken;
                taken
            } else if self.is_odd || self.seen > self.fields.len() {
                // Of a field that was seen, or of whatever it is.
                let known = if self.is_odd { self.left } else { self.seen - self.fields.len() };
                let taken = known.min(piece.len());
                self.fields.extend_from_slice(&piece[..taken]);
                taken
            } else {
                // A key may be cut anywhere: byte by byte, and there are few.
                self.fields.push(piece[0]);
                1
            };
            piece.advance(taken);
            self.left -= taken;
            if self.body_left == 0 && self.seen < self.fields.len() && !self.is_odd {
                self.look(shelf);
            }
        }
    }

    /// Looks at a field's key and length, if they are there.
    fn look(&mut self, shelf: &Shelf) {
        let mut rest = &self.fields[self.seen..];
        let before = rest.len();
        let field = match decode_key(&mut rest) {
            Ok((BODY_TAG, WireType::LengthDelimited)) => decode_varint(&mut rest).map(|length| (true, length)),
            Ok((_, WireType::LengthDelimited)) => decode_varint(&mut rest).map(|length| (false, length)),
            Ok((_, WireType::Varint)) => decode_varint(&mut rest).map(|_| (false, 0)),
            Ok((_, WireType::SixtyFourBit)) => Ok((false, 8)),
            Ok((_, WireType::ThirtyTwoBit)) => Ok((false, 4)),
            // Groups nest: prost's business.
            Ok((_, WireType::StartGroup | WireType::EndGroup)) => return self.leave_to_prost(),
            Err(error) => Err(error),
        };
        let Ok((is_body, length)) = field else {
            // Not all there yet; or nothing that ever will be.
            if before >= KEY_BYTES_MAX {
                self.leave_to_prost();
            }
            return;
        };
        let Some(length) = usize::try_from(length).ok().filter(|length| *length <= self.left) else {
            return self.leave_to_prost();
        };
        let key_end = self.seen + before - rest.len();
        if is_body {
            // Of several the last one counts.
            self.fields.truncate(self.seen);
            self.body = shelf.take(length);
            self.body_left = length;
        } else {
            self.seen = key_end + length;
        }
    }

    /// What has come is put together again.
    fn leave_to_prost(&mut self) {
        self.is_odd = true;
        if !self.body.is_empty() {
            let body = std::mem::replace(&mut self.body, MutableBuffer::new(0));
            let looked_at = self.fields.split_off(self.seen);
            encode_key(BODY_TAG, WireType::LengthDelimited, &mut self.fields);
            encode_varint(body.len() as u64, &mut self.fields);
            self.fields.extend_from_slice(&body);
            self.fields.extend_from_slice(&looked_at);
        }
    }

    fn frame(self, shelf: &Shelf) -> Result<FrameIn, Fault> {
        let data = FlightData::decode(Bytes::from(self.fields)).map_err(|error| broken_off(&error.to_string()))?;
        let body = if self.is_odd { Buffer::from(&data.data_body[..]) } else { shelf.lend(self.body) };
        Ok(FrameIn { body, ..FrameIn::from(data) })
    }
}

impl From<FlightData> for FrameIn {
    fn from(data: FlightData) -> FrameIn {
        FrameIn {
            command: data.flight_descriptor.map(|descriptor| descriptor.cmd),
            header: data.data_header,
            body: Buffer::from(data.data_body),
            is_last: metadata::is_end(&data.app_metadata),
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
                (self.waiting, self.landing, self.message) = (None, None, None);
                self.prefix.clear();
                self.piece.clear();
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
                    Ok(piece) => self.piece = piece,
                    Err(_trailers) => self.is_over = true,
                },
                Some(Err(status)) => {
                    self.is_over = true;
                    return Poll::Ready(Some(Err(of_transport(&status, self.limits.message_bytes_max))));
                }
                None => self.is_over = true,
            }
            if self.is_over && (self.message.is_some() || !self.prefix.is_empty()) {
                return self.broken(broken_off("it ends within a message"));
            }
        }
    }
}
