//! Bytes to messages, in one copy: each body lands in memory of its own, aligned as Arrow likes it, as its pieces
//! come from the connection.
//!
//! tonic joins a message's pieces first, in memory that grows, and Arrow would copy what is not aligned there. What is no body
//! goes to prost as it is, so that prost alone says what a message means. A message that is odd in any way goes to it as a whole, and may not be
//! large then.

use arrow_buffer::{Buffer, MutableBuffer};
use arrow_flight::FlightData;
use bytes::{Buf, Bytes};
use prost::{
    Message as _,
    encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint},
};
use quarrel_shelf::Shelf;

use crate::{BODY_TAG, PREFIX_BYTES};

/// What a message may have beside its body: room for a command that is too large to be told so. prost looks at it where it came.
pub const FIELDS_BYTES_MAX: usize = 4 << 20;
/// A field's key and length at most: as many as prost reads.
const KEY_BYTES_MAX: usize = 20;

/// The messages of one request or response.
#[derive(Debug)]
pub struct Messages {
    /// What came and is not looked at yet.
    piece: Bytes,
    prefix: Vec<u8>,
    message: Option<Message>,
    message_bytes_max: usize,
    shelf: Shelf,
}

/// What there is with the bytes that have come.
#[derive(Debug)]
pub enum Step {
    /// Nothing more.
    Nothing,
    /// A message begins, of so many bytes. None of it is taken before the next step.
    Begins(usize),
    /// A message is complete.
    Whole(Received),
}

/// A message.
#[derive(Debug)]
pub struct Received {
    /// All but its body.
    pub data: FlightData,
    /// Its body.
    pub body: Buffer,
}

/// Bytes that are no messages: what follows means nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// By its flag.
    #[error("a message is compressed, which no header has said")]
    Compressed,
    /// A flag that gRPC does not know.
    #[error("a message's compression flag is {0}, expected 0")]
    Flag(u8),
    /// More than it may be.
    #[error("a message has {bytes} bytes: expected at most {most}")]
    TooLarge {
        /// The message.
        bytes: usize,
        /// The limit.
        most: usize,
    },
    /// Over [`FIELDS_BYTES_MAX`].
    #[error("a message has more than 4 MiB beside its body")]
    Fields,
    /// No `FlightData`.
    #[error("{0}")]
    Prost(#[from] prost::DecodeError),
}

/// A message of which some has come.
#[derive(Debug)]
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

impl Messages {
    /// Messages of at most so many bytes, their bodies in memory of `shelf`.
    pub fn new(message_bytes_max: usize, shelf: Shelf) -> Messages {
        Messages {
            piece: Bytes::new(),
            prefix: Vec::with_capacity(PREFIX_BYTES),
            message: None,
            message_bytes_max,
            shelf,
        }
    }

    /// Takes the bytes that come next, after a step that found nothing.
    pub fn feed(&mut self, piece: Bytes) {
        self.piece = piece;
    }

    /// Drops what has come, and the memory that it took.
    pub fn clear(&mut self) {
        self.message = None;
        self.prefix.clear();
        self.piece.clear();
    }

    /// Whether the bytes so far end with a message.
    pub fn is_at_a_boundary(&self) -> bool {
        self.message.is_none() && self.prefix.is_empty() && self.piece.is_empty()
    }

    /// The next message, if it is complete with what has come.
    ///
    /// # Errors
    /// [`Malformed`]; nothing more is to be asked then.
    pub fn step(&mut self) -> Result<Step, Malformed> {
        if let Some(message) = &mut self.message {
            message.take(&mut self.piece, &self.shelf);
            if message.fields.len() > FIELDS_BYTES_MAX {
                return Err(Malformed::Fields);
            }
            if message.left > 0 {
                return Ok(Step::Nothing);
            }
            let message = self.message.take().map(|message| message.received(&self.shelf)).transpose()?;
            return Ok(message.map_or(Step::Nothing, Step::Whole));
        }
        let missing = (PREFIX_BYTES - self.prefix.len()).min(self.piece.len());
        self.prefix.extend_from_slice(&self.piece.split_to(missing));
        let [flag, a, b, c, d] = self.prefix[..] else { return Ok(Step::Nothing) };
        self.prefix.clear();
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        self.message = Some(Message::new(flag, length, self.message_bytes_max)?);
        Ok(Step::Begins(length))
    }
}

impl Message {
    fn new(flag: u8, length: usize, most: usize) -> Result<Message, Malformed> {
        match flag {
            0 if length <= most => {}
            0 => return Err(Malformed::TooLarge { bytes: length, most }),
            1 => return Err(Malformed::Compressed),
            flag => return Err(Malformed::Flag(flag)),
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
            self.body = shelf.empty(length);
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

    fn received(self, shelf: &Shelf) -> Result<Received, Malformed> {
        let mut data = FlightData::decode(Bytes::from(self.fields))?;
        let odd = std::mem::take(&mut data.data_body);
        let body = if self.is_odd { Buffer::from(&odd[..]) } else { shelf.lend(self.body) };
        Ok(Received { data, body })
    }
}
