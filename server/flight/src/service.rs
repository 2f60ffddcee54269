//! The RPCs of Arrow Flight, a line or two each, but for DoExchange and DoPut, which are `wire`'s.

use std::{pin::Pin, sync::Arc};

use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightInfo, HandshakeRequest, HandshakeResponse,
    PollInfo, PutResult, Result as ActionResult, SchemaResult, Ticket, flight_service_server::FlightService,
};
use futures::{Stream, stream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    admin, get,
    shared::Shared,
    stack::Peer,
    status::{Fault, unsupported},
};

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) shared: Arc<Shared>,
}

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl FlightService for Service {
    type DoExchangeStream = Replies<FlightData>;
    type DoGetStream = Replies<FlightData>;
    type DoPutStream = Replies<PutResult>;
    type DoActionStream = Replies<ActionResult>;
    type HandshakeStream = Replies<HandshakeResponse>;
    type ListActionsStream = Replies<ActionType>;
    type ListFlightsStream = Replies<FlightInfo>;

    /// `wire` answers these. It leaves compressed ones to tonic, which refuses them before it comes here.
    async fn do_exchange(&self, _: Request<Streaming<FlightData>>) -> Result<Response<Self::DoExchangeStream>, Status> {
        Err(Fault::ours().into())
    }

    async fn get_schema(&self, request: Request<FlightDescriptor>) -> Result<Response<SchemaResult>, Status> {
        admin::schema(&self.shared, request.into_inner()).await.map(Response::new)
    }

    async fn get_flight_info(&self, request: Request<FlightDescriptor>) -> Result<Response<FlightInfo>, Status> {
        admin::flight_info(&self.shared, request.into_inner()).await.map(Response::new)
    }

    async fn list_actions(&self, _: Request<Empty>) -> Result<Response<Self::ListActionsStream>, Status> {
        Ok(Response::new(Box::pin(stream::iter(admin::actions().map(Ok)))))
    }

    async fn do_action(&self, request: Request<Action>) -> Result<Response<Self::DoActionStream>, Status> {
        let results = admin::act(&self.shared, request.into_inner()).await?;
        Ok(Response::new(Box::pin(stream::iter(results.into_iter().map(Ok)))))
    }

    async fn do_get(&self, request: Request<Ticket>) -> Result<Response<Self::DoGetStream>, Status> {
        let peer = Peer::of(request.extensions(), &self.shared.config);
        let answers = get::open(&self.shared, request.into_inner().ticket, peer).await?;
        Ok(Response::new(Box::pin(answers)))
    }

    /// Likewise.
    async fn do_put(&self, _: Request<Streaming<FlightData>>) -> Result<Response<Self::DoPutStream>, Status> {
        Err(Fault::ours().into())
    }

    async fn list_flights(&self, _: Request<Criteria>) -> Result<Response<Self::ListFlightsStream>, Status> {
        Err(unsupported("there are no stored flights to list: send layers with DoExchange"))
    }

    async fn poll_flight_info(&self, _: Request<FlightDescriptor>) -> Result<Response<PollInfo>, Status> {
        Err(unsupported("there are no queries to poll: GetFlightInfo answers at once"))
    }

    async fn handshake(
        &self,
        _: Request<Streaming<HandshakeRequest>>,
    ) -> Result<Response<Self::HandshakeStream>, Status> {
        Err(unsupported("no handshake is needed: call DoExchange"))
    }
}
