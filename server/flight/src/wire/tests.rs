//! Our framing beside tonic's and prost's: the same frames from the same bytes, and the same bytes from the same frames.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::{convert::Infallible, sync::Arc, time::Duration};

use arrow_buffer::Buffer;
use arrow_flight::{FlightData, FlightDescriptor};
use bytes::Bytes;
use futures::{FutureExt, StreamExt, stream};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use proptest::{collection::vec, prelude::*};
use prost::{
    Message as _,
    encoding::{WireType, encode_key, encode_varint},
};
use quarrel_pool::Budget;
use quarrel_proto::Reason;
use quarrel_shelf::Shelf;
use quarrel_wire::{FrameOut, Received};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::{
    Streaming,
    body::Body,
    codec::{Codec, EncodeBody, SingleMessageCompressionOverride},
    codegen::http::HeaderMap,
};
use tonic_prost::ProstCodec;

use super::{
    receive::{ENVELOPE_BYTES, Frames, Limits},
    send::{Reply, messages},
};
use crate::{
    frame::FrameIn,
    outbox::outbox,
    status::{Broken, Fault, of_transport},
};

const BYTES_MAX: usize = 1_000;

/// What a request was: its frames, and why it ended.
type Request = (Vec<Seen>, Option<Reason>);
/// A frame's command, header and body, and whether it is the last.
type Seen = (Option<Bytes>, Bytes, Buffer, bool);

fn body(bytes: &[u8], cuts: &[usize]) -> Body {
    let mut pieces = Vec::new();
    let mut rest = Bytes::copy_from_slice(bytes);
    for cut in cuts {
        pieces.push(rest.split_to((*cut).min(rest.len())));
    }
    pieces.push(rest);
    Body::new(StreamBody::new(stream::iter(pieces.into_iter().map(|piece| Ok::<_, Infallible>(Frame::data(piece))))))
}

/// Nothing here waits for anything.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().unwrap()
}

/// Up to the first error: tonic would say it for ever.
fn all(frames: impl futures::Stream<Item = Result<FrameIn, Broken>>) -> Request {
    let mut frames = std::pin::pin!(frames);
    let mut seen = Vec::new();
    while let Some(frame) = block_on(frames.next()) {
        match frame {
            Ok(FrameIn { command, header, body, is_last, .. }) => seen.push((command, header, body, is_last)),
            Err(Broken::Fault(fault)) => return (seen, Some(fault.reason)),
            Err(Broken::Gone) => unreachable!("there is no connection to break"),
        }
    }
    (seen, None)
}

fn ours(body: Body) -> Request {
    let share = Arc::new(Budget::new(8 * ENVELOPE_BYTES, ENVELOPE_BYTES, 1).share());
    all(Frames::new(body, Limits { share, shelf: Shelf::default(), message_bytes_max: BYTES_MAX, stall_seconds: 1 }))
}

fn stock(body: Body) -> Request {
    let decoder = ProstCodec::<FlightData, FlightData>::default().decoder();
    all(Streaming::new_request(decoder, body, None, Some(BYTES_MAX + ENVELOPE_BYTES))
        .map(|data| data.map(whole).map_err(|status| of_transport(&status, BYTES_MAX))))
}

fn whole(mut data: FlightData) -> FrameIn {
    let body = Buffer::from(std::mem::take(&mut data.data_body));
    Received { data, body }.into()
}

fn key(tag: u32, wire: WireType) -> Vec<u8> {
    let mut key = Vec::new();
    encode_key(tag, wire, &mut key);
    key
}

fn delimited(tag: u32, value: &[u8]) -> Vec<u8> {
    let mut field = key(tag, WireType::LengthDelimited);
    encode_varint(value.len() as u64, &mut field);
    field.extend_from_slice(value);
    field
}

/// Of a command; none, of a message that opens nothing.
fn descriptor(command: Vec<u8>) -> Bytes {
    match command.is_empty() {
        true => Bytes::new(),
        false => FlightDescriptor::new_cmd(command).encode_to_vec().into(),
    }
}

/// A field: mostly one of `FlightData`, now and then one that is not, or is none at all.
fn field() -> impl Strategy<Value = Vec<u8>> {
    let bytes = || vec(any::<u8>(), 0..40);
    let tag = prop_oneof![Just(1), Just(2), Just(3), Just(1000), 1..2000u32];
    let nested = (bytes(), bytes()).prop_map(|(kept, body)| {
        let group = [delimited(2, &kept), delimited(1000, &body)].concat();
        [key(7, WireType::StartGroup), group, key(7, WireType::EndGroup)].concat()
    });
    let descriptor = bytes().prop_map(|command| delimited(1, &descriptor(command)));
    prop_oneof![
        8 => (prop_oneof![Just(2), Just(3)], bytes()).prop_map(|(tag, value)| delimited(tag, &value)),
        8 => bytes().prop_map(|value| delimited(1000, &value)),
        4 => descriptor,
        1 => Just(delimited(3, br#"{"end": {}}"#)),
        1 => (tag.clone(), bytes()).prop_map(|(tag, value)| delimited(tag, &value)),
        1 => (tag.clone(), any::<u64>()).prop_map(|(tag, value)| {
            let mut field = key(tag, WireType::Varint);
            encode_varint(value, &mut field);
            field
        }),
        1 => (tag.clone(), any::<[u8; 8]>()).prop_map(|(tag, value)| [&key(tag, WireType::SixtyFourBit)[..], &value].concat()),
        1 => (tag.clone(), any::<[u8; 4]>()).prop_map(|(tag, value)| [&key(tag, WireType::ThirtyTwoBit)[..], &value].concat()),
        1 => nested,
        1 => (tag, any::<u64>()).prop_map(|(tag, length)| {
            let mut field = key(tag, WireType::LengthDelimited);
            encode_varint(length, &mut field);
            field
        }),
        1 => bytes(),
        1 => Just(std::vec![0xff; 12]),
    ]
}

/// A gRPC message, whose prefix may lie.
fn message() -> impl Strategy<Value = Vec<u8>> {
    let lie = prop_oneof![60 => Just(None), 1 => (0..2 * ENVELOPE_BYTES as u32).prop_map(Some), 1 => any::<u32>().prop_map(Some)];
    let flag = prop_oneof![60 => Just(0), 1 => any::<u8>()];
    (vec(field(), 0..8), lie, flag).prop_map(|(fields, lie, flag)| {
        let message = fields.concat();
        let length = lie.unwrap_or(message.len() as u32).to_be_bytes();
        [&[flag][..], &length, &message].concat()
    })
}

/// The end of a stream within the prefix of a message is none to tonic, once the prefix is whole.
fn ends_behind_a_prefix(bytes: &[u8]) -> bool {
    let mut at = 0;
    while let Some([_, length @ ..]) = bytes.get(at..).and_then(|rest| rest.first_chunk::<5>()) {
        let length = u32::from_be_bytes(*length) as usize;
        if length > 0 && at + 5 == bytes.len() {
            return true;
        }
        at = at.saturating_add(5 + length);
    }
    false
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(4_000) })]

    #[test]
    fn the_same_frames_from_the_same_bytes(
        messages in vec(message(), 0..6),
        lost in prop_oneof![6 => Just(0), 1 => 0..60usize],
        cuts in vec(prop_oneof![0..4usize, 0..200usize], 0..20),
    ) {
        let mut bytes = messages.concat();
        bytes.truncate(bytes.len().saturating_sub(lost));
        let (frames, ended) = ours(body(&bytes, &cuts));
        let (expected, expected_end) = stock(body(&bytes, &cuts));
        prop_assert_eq!(&frames, &expected);
        if ends_behind_a_prefix(&bytes) && expected_end.is_none() {
            prop_assert_eq!(ended, Some(Reason::FrameInvalid));
        } else {
            prop_assert_eq!(ended, expected_end);
        }
        for (_, _, body, _) in &frames {
            prop_assert_eq!(body.as_ptr().align_offset(64), 0, "where Arrow wants it");
        }
    }

    #[test]
    fn the_same_bytes_from_the_same_frames(
        frames in vec((vec(any::<u8>(), 0..20), vec(any::<u8>(), 0..300), vec(any::<u8>(), 0..50), vec(buffer(), 0..6)), 0..5),
        is_fault in any::<bool>(),
    ) {
        let frames: Vec<FrameOut> = frames
            .into_iter()
            .map(|(command, header, metadata, body)| FrameOut {
                descriptor: descriptor(command),
                header: header.into(),
                metadata: metadata.into(),
                body,
            })
            .collect();
        let fault = is_fault.then(|| Fault::new(Reason::NonFinite, "layer `ü`: NaN"));

        let (sender, responses) = outbox(CancellationToken::new());
        sender.push(frames.clone(), None);
        sender.end(fault.clone().map_or(Ok(()), Err));
        let got = block_on(written(Body::new(Reply::new(messages(responses)))));

        let data = frames.into_iter().map(|frame| Ok(frame_out(frame))).chain(fault.map(|fault| Err(fault.into())));
        let encoder = ProstCodec::<FlightData, FlightData>::default().encoder();
        let one = SingleMessageCompressionOverride::default();
        let expected = EncodeBody::new_server(encoder, stream::iter(data), None, one, Some(usize::MAX));
        prop_assert_eq!(got, block_on(written(Body::new(expected))));
    }
}

/// A buffer that is copied, or one that is handed on.
fn buffer() -> impl Strategy<Value = Buffer> {
    prop_oneof![0..40usize, 4_000..9_000usize]
        .prop_map(|length| Buffer::from_vec((0..length).map(|at| (at % 251) as u8).collect::<Vec<u8>>()))
}

fn frame_out(frame: FrameOut) -> FlightData {
    let body: Vec<u8> = frame.body.iter().flat_map(|buffer| buffer.as_slice()).copied().collect();
    let flight_descriptor = (!frame.descriptor.is_empty()).then(|| FlightDescriptor::decode(frame.descriptor).unwrap());
    FlightData { flight_descriptor, data_header: frame.header, app_metadata: frame.metadata, data_body: body.into() }
}

async fn written(body: Body) -> (Bytes, Option<HeaderMap>) {
    let collected = body.collect().await.unwrap();
    let trailers = collected.trailers().cloned();
    (collected.to_bytes(), trailers)
}

#[test]
fn a_large_body_is_handed_on_where_it_lies() {
    let buffer = Buffer::from_vec(vec![7u8; 1 << 20]);
    let (sender, responses) = outbox(CancellationToken::new());
    sender.push(
        vec![FrameOut { header: Bytes::from_static(b"h"), body: vec![buffer.clone()], ..Default::default() }],
        None,
    );
    sender.end(Ok(()));
    let frames: Vec<Bytes> =
        block_on(Body::new(Reply::new(messages(responses))).into_data_stream().map(|piece| piece.unwrap()).collect());
    assert!(frames.iter().any(|piece| piece.as_ptr() == buffer.as_ptr() && piece.len() == buffer.len()));
}

/// What is behind an error means nothing; but a client that still writes must be let write, or it would not see why.
#[test]
fn behind_an_error_the_rest_is_read_once_it_is_given_up_and_holds_nothing() {
    let budget = Budget::new(8 * ENVELOPE_BYTES, ENVELOPE_BYTES, 1);
    let share = Arc::new(budget.share());
    let all = 2 * ENVELOPE_BYTES;
    let limits =
        Limits { share: Arc::clone(&share), shelf: Shelf::default(), message_bytes_max: all, stall_seconds: 1 };
    // A message that takes all room, and is none.
    let mut bytes = [&[0][..], &(all as u32).to_be_bytes()].concat();
    bytes.resize(bytes.len() + all, 0xff);
    bytes.extend_from_slice(&[9; 1_000]);
    let mut frames = Frames::new(body(&bytes, &[5, all]), limits);
    assert!(matches!(block_on(frames.next()), Some(Err(Broken::Fault(_)))));
    assert!(block_on(frames.next()).is_none());
    assert!(budget.share().try_land(all).is_none());
    share.give_up();
    assert!(block_on(frames.next()).is_none());
    assert!(budget.share().try_land(all).is_some());
}

#[test]
fn a_small_message_waits_for_nobody() {
    let budget = Budget::new(64 * ENVELOPE_BYTES, ENVELOPE_BYTES, 4);
    let slow = budget.share();
    let held = slow.try_land(8 * ENVELOPE_BYTES).unwrap();
    let limits = |share| Limits { share, shelf: Shelf::default(), message_bytes_max: 3_000_000, stall_seconds: 1 };
    let message = |bytes: usize| {
        let message = delimited(1000, &vec![7; bytes]);
        [&[0][..], &(message.len() as u32).to_be_bytes(), &message].concat()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        for (bytes, is_taken) in [(1_900_000, true), (2_100_000, false)] {
            let mut frames = Frames::new(body(&message(bytes), &[1_000]), limits(Arc::new(budget.share())));
            let taken = timeout(Duration::from_millis(20), frames.next()).await;
            assert_eq!(taken.is_ok_and(|frame| frame.unwrap().unwrap().body.len() == bytes), is_taken);
        }
    });
    drop(held);
}
