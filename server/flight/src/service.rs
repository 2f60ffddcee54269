//! The RPCs of Arrow Flight, a line or two each. `FlightData` appears here and nowhere further in.

use std::{pin::Pin, sync::Arc};

use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightInfo, HandshakeRequest, HandshakeResponse,
    PollInfo, PutResult, Result as ActionResult, SchemaResult, Ticket, flight_service_server::FlightService,
};
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    admin,
    decode::FrameIn,
    encode::FrameOut,
    exchange,
    shared::Shared,
    stack::Peer,
    status::{of_transport, unsupported},
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

    async fn do_exchange(
        &self,
        request: Request<Streaming<FlightData>>,
    ) -> Result<Response<Self::DoExchangeStream>, Status> {
        // Comes here only if `wire` leaves it to us: tonic has refused a compressed request before.
        let peer = Peer::of(request.extensions(), &self.shared.config);
        let bytes_max = self.shared.config.message_bytes_max;
        let frames = request
            .into_inner()
            .map(move |data| data.map(FrameIn::from).map_err(|status| of_transport(&status, bytes_max)));
        let share = Arc::new(self.shared.budget.share());
        let responses = exchange::open(Arc::clone(&self.shared), Box::pin(frames), share, peer)?;
        Ok(Response::new(Box::pin(responses.map(|frame| frame.map(frame_out).map_err(Status::from)))))
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
        let result = admin::act(&self.shared, &request.into_inner())?;
        Ok(Response::new(Box::pin(stream::iter([Ok(result)]))))
    }

    async fn do_get(&self, _: Request<Ticket>) -> Result<Response<Self::DoGetStream>, Status> {
        Err(unsupported(
            "DoGet pulls stored checkpoints, which this version does not read: send layers with DoExchange",
        ))
    }

    async fn do_put(&self, _: Request<Streaming<FlightData>>) -> Result<Response<Self::DoPutStream>, Status> {
        Err(unsupported(
            "DoPut writes checkpoints, which this version does not: DoExchange returns the quantized layers",
        ))
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

pub(crate) fn frame_out(frame: FrameOut) -> FlightData {
    let body = Bytes::from(frame.joined_body());
    FlightData { flight_descriptor: None, data_header: frame.header, app_metadata: frame.metadata, data_body: body }
}
