//! DoExchange over a connection: frames to a request's bytes, a response's bytes to batches. Large buffers are not copied on the way out, and
//! once on the way in.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, ready},
};

use arrow_flight::{FlightData, decode::FlightDataDecoder, error::FlightError};
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use http_body::{Body, Frame};
use http_body_util::BodyStream;
use quarrel_shelf::Shelf;
use quarrel_wire::{DO_EXCHANGE, FrameOut, Messages, Received, Step, TooLong, pieces};
use tokio::sync::mpsc;
use tonic::{
    body,
    codegen::http::{
        HeaderValue, Method, Request, StatusCode, Uri,
        header::{CONTENT_TYPE, TE},
    },
    metadata::GRPC_CONTENT_TYPE,
    transport::Channel,
};
use tower::ServiceExt;

use crate::error::{Error, of_headers, of_http};

/// No answer is larger: what a server can be told to accept.
const ANSWER_BYTES_MAX: usize = 2 << 30;

/// Why a request has no end. The stream is reset then: it must not look like one that is complete.
#[derive(Debug, thiserror::Error)]
enum Unsent {
    #[error(transparent)]
    TooLong(#[from] TooLong),
    #[error("the stream was cancelled")]
    Cancelled,
}

/// What comes next in a request. A sender that is gone has not said that it ends.
#[derive(Debug)]
pub(crate) enum Next {
    Message(FrameOut),
    End,
}

/// The body of a request.
struct Frames {
    next: mpsc::Receiver<Next>,
    /// Of the frame that goes out.
    pieces: VecDeque<Bytes>,
    is_over: bool,
}

impl Body for Frames {
    type Data = Bytes;
    type Error = Unsent;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Unsent>>> {
        loop {
            if let Some(piece) = self.pieces.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            if self.is_over {
                return Poll::Ready(None);
            }
            match ready!(self.next.poll_recv(context)) {
                Some(Next::Message(frame)) => self.pieces = pieces(frame)?,
                Some(Next::End) => self.is_over = true,
                None => return Poll::Ready(Some(Err(Unsent::Cancelled))),
            }
        }
    }
}

/// Opens a stream.
///
/// # Errors
/// What the connection or the server says at once.
pub(crate) async fn open(channel: Channel, next: mpsc::Receiver<Next>) -> Result<FlightDataDecoder, Error> {
    let frames = Frames { next, pieces: VecDeque::new(), is_over: false };
    let mut request = Request::new(body::Body::new(frames));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static(DO_EXCHANGE);
    request.headers_mut().insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
    request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
    let response = channel.oneshot(request).await?;
    if response.status() != StatusCode::OK {
        return Err(of_http(response.status()));
    }
    of_headers(response.headers())?;
    Ok(FlightDataDecoder::new(messages(response.into_body())))
}

/// The messages of a response.
fn messages(body: body::Body) -> impl Stream<Item = Result<FlightData, FlightError>> + Send {
    let messages = Messages::new(ANSWER_BYTES_MAX, Shelf::default());
    stream::try_unfold((BodyStream::new(body), messages), |(mut body, mut messages)| async move {
        loop {
            match messages.step().map_err(|error| FlightError::DecodeError(error.to_string()))? {
                Step::Begins(_) => continue,
                Step::Whole(Received { data, body: buffer }) => {
                    let data = FlightData { data_body: Bytes::from_owner(buffer), ..data };
                    return Ok(Some((data, (body, messages))));
                }
                Step::Nothing => {}
            }
            let Some(frame) = body.next().await.transpose()? else { return Ok(None) };
            match frame.into_data() {
                Ok(piece) => messages.feed(piece),
                Err(frame) => {
                    frame.trailers_ref().map_or(Ok(()), of_headers)?;
                    return Ok(None);
                }
            }
        }
    })
}

/// What the decoder of answers says.
pub(crate) fn error(error: FlightError) -> Error {
    match error {
        FlightError::Tonic(status) => (*status).into(),
        other => Error::Answer { detail: other.to_string() },
    }
}
