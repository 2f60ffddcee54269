//! DoExchange and DoPut over gRPC without the copies that tonic's codec makes: [`receive`] and [`send`]. Every other call is tonic's.

mod receive;
mod send;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use arrow_flight::flight_service_server::FlightServiceServer;
use bytes::Bytes;
use futures::{
    Stream,
    future::{BoxFuture, FutureExt, ready},
};
use quarrel_pool::Share;
use tonic::{
    Status,
    body::Body,
    codegen::http::{Request, Response, header::CONTENT_TYPE},
    metadata::GRPC_CONTENT_TYPE,
    server::NamedService,
};

pub(crate) use receive::ENVELOPE_BYTES;

use quarrel_wire::{DO_EXCHANGE, DO_PUT};

use crate::{exchange, put, replies::Messages, service::Service, shared::Shared, stack::Peer, status::Fault};

/// The service as tonic's server takes it.
#[derive(Debug, Clone)]
pub(crate) struct Front {
    shared: Arc<Shared>,
    stock: FlightServiceServer<Service>,
}

impl Front {
    pub(crate) fn new(shared: Arc<Shared>, stock: FlightServiceServer<Service>) -> Front {
        Front { shared, stock }
    }
}

impl NamedService for Front {
    const NAME: &'static str = <FlightServiceServer<Service> as NamedService>::NAME;
}

impl tower::Service<Request<Body>> for Front {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        tower::Service::<Request<Body>>::poll_ready(&mut self.stock, context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // What is compressed is refused, and tonic knows how.
        let is_plain = request.headers().get("grpc-encoding").is_none_or(|encoding| encoding == "identity");
        match request.uri().path() {
            DO_EXCHANGE if is_plain => ready(Ok(do_exchange(&self.shared, request))).boxed(),
            DO_PUT if is_plain => ready(Ok(do_put(&self.shared, request))).boxed(),
            _ => self.stock.call(request),
        }
    }
}

fn do_exchange(shared: &Arc<Shared>, request: Request<Body>) -> Response<Body> {
    let (frames, share, peer) = opened(shared, request);
    let patience = Duration::from_secs(shared.config.header_seconds);
    let responses = exchange::open::<Messages, _>(Arc::clone(shared), frames, share, peer, patience);
    respond(responses.map(send::messages))
}

fn do_put(shared: &Arc<Shared>, request: Request<Body>) -> Response<Body> {
    let (frames, share, peer) = opened(shared, request);
    respond(put::open(shared, frames, share, peer))
}

/// A request's frames, the share of the budget that they take room of, and whose it is.
fn opened(shared: &Arc<Shared>, request: Request<Body>) -> (receive::Frames, Arc<Share>, Peer) {
    let peer = Peer::of(request.extensions(), &shared.config);
    let share = Arc::new(shared.budget.share());
    let limits = receive::Limits {
        share: Arc::clone(&share),
        shelf: shared.shelf.clone(),
        message_bytes_max: shared.config.message_bytes_max,
        stall_seconds: shared.config.stall_seconds,
    };
    (receive::Frames::new(request.into_body(), limits), share, peer)
}

fn respond<S>(messages: Result<S, Fault>) -> Response<Body>
where
    S: Stream<Item = Result<VecDeque<Bytes>, Fault>> + Send + Unpin + 'static,
{
    match messages {
        Ok(messages) => {
            let mut response = Response::new(Body::new(send::Reply::new(messages)));
            response.headers_mut().insert(CONTENT_TYPE, GRPC_CONTENT_TYPE);
            response
        }
        Err(fault) => Status::from(fault).into_http(),
    }
}
