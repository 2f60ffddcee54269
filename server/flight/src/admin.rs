//! What the service says of itself: actions, and the schema that a command would return.

use arrow_flight::{
    Action, ActionType, FlightDescriptor, FlightInfo, IpcMessage, Result as ActionResult, SchemaAsIpc, SchemaResult,
};
use arrow_ipc::writer::IpcWriteOptions;
use arrow_schema::Schema;
use bytes::Bytes;
use quarrel_proto::{Reason, VERSION, json, metadata, v1};
use tonic::Status;

use crate::{
    command::{plan_of, reply_schema},
    shared::Shared,
    status::{Fault, unsupported},
};

/// The actions that [`act`] knows.
pub(crate) fn actions() -> impl Iterator<Item = ActionType> + Send + 'static {
    let action = |name: &str, text: &str| ActionType { r#type: name.to_owned(), description: text.to_owned() };
    [
        action(metadata::ACTION_SERVER_INFO, "version, contract, CPU level, threads, limits and verbs, as JSON"),
        action(metadata::ACTION_SCHEMES_LIST, "every scheme with its element type, granularity and packing, as JSON"),
    ]
    .into_iter()
}

/// Carries out an action. Bodies of requests must be empty: no action here has options.
pub(crate) fn act(shared: &Shared, action: &Action) -> Result<ActionResult, Status> {
    let body = match action.r#type.as_str() {
        metadata::ACTION_SERVER_INFO => json::server_info(&server_info(shared)),
        metadata::ACTION_SCHEMES_LIST => json::schemes(&quarrel_engine::listing()),
        other => {
            let other = quarrel_engine::shorten(other, 100);
            return Err(unsupported(&format!(
                "unknown action `{other}`: expected {} or {}",
                metadata::ACTION_SERVER_INFO,
                metadata::ACTION_SCHEMES_LIST
            )));
        }
    };
    if !action.body.is_empty() {
        return Err(Fault::new(Reason::OptionConflict, format!("action `{}` takes no body", action.r#type)).into());
    }
    Ok(ActionResult { body: Bytes::from(body) })
}

/// The schema of a command's answers.
pub(crate) async fn schema(shared: &Shared, descriptor: FlightDescriptor) -> Result<SchemaResult, Status> {
    let schema = answer_schema(shared, &descriptor).await?;
    SchemaResult::try_from(SchemaAsIpc::new(&schema, &IpcWriteOptions::default())).map_err(encoding)
}

/// The same as a flight without endpoints: layers go in and out of one DoExchange, and how many is not known.
pub(crate) async fn flight_info(shared: &Shared, descriptor: FlightDescriptor) -> Result<FlightInfo, Status> {
    let schema = answer_schema(shared, &descriptor).await?;
    let message = IpcMessage::try_from(SchemaAsIpc::new(&schema, &IpcWriteOptions::default())).map_err(encoding)?;
    Ok(FlightInfo {
        schema: message.0,
        flight_descriptor: Some(descriptor),
        endpoint: Vec::new(),
        total_records: -1,
        total_bytes: -1,
        ordered: true,
        app_metadata: Bytes::new(),
    })
}

async fn answer_schema(shared: &Shared, descriptor: &FlightDescriptor) -> Result<Schema, Fault> {
    let plan = plan_of(shared, descriptor.cmd.clone()).await?;
    Ok(reply_schema(&plan, shared.level))
}

fn encoding(error: arrow_schema::ArrowError) -> Status {
    Fault::new(Reason::Internal, error.to_string()).into()
}

fn server_info(shared: &Shared) -> v1::ServerInfo {
    let limits = shared.config.limits().map(|(name, value)| v1::Limit { name: name.to_owned(), value });
    v1::ServerInfo {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        contract: VERSION.to_owned(),
        cpu_level: shared.level.name().to_owned(),
        threads: shared.pool.threads() as u32,
        limits: limits.to_vec(),
        verbs: vec!["quantize".to_owned(), "dequantize".to_owned()],
    }
}
