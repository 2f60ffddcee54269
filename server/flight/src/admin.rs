//! What the service says of itself: actions, and the schema that a command would return.

use std::sync::Arc;

use arrow_flight::{
    Action, ActionType, FlightDescriptor, FlightEndpoint, FlightInfo, IpcMessage, Result as ActionResult, SchemaAsIpc,
    SchemaResult, Ticket,
};
use arrow_ipc::writer::IpcWriteOptions;
use bytes::Bytes;
use quarrel_engine::Output;
use quarrel_proto::{Reason, VERSION, command, json, metadata, v1};
use tonic::Status;

use crate::{
    command::plan_of_any,
    shared::Shared,
    status::{Fault, unsupported},
};

/// The actions that [`act`] knows.
pub(crate) fn actions() -> impl Iterator<Item = ActionType> + Send + 'static {
    let action = |name: &str, text: &str| ActionType { r#type: name.to_owned(), description: text.to_owned() };
    [
        action(metadata::ACTION_SERVER_INFO, "version, contract, CPU level, threads, limits and verbs, as JSON"),
        action(metadata::ACTION_SCHEMES_LIST, "every scheme with its element type, granularity and packing, as JSON"),
        action(metadata::ACTION_JOB_SUBMIT, "a checkpoint from one URI to another: takes a JobRequest, answers a Job"),
        action(metadata::ACTION_JOB_STATUS, "how far a job is: takes a JobName, answers a Job"),
        action(metadata::ACTION_JOB_CANCEL, "stops a job: takes a JobName, answers a Job"),
        action(metadata::ACTION_JOB_LIST, "a Job for each that this server knows, the newest first"),
    ]
    .into_iter()
}

/// Carries out an action: the bodies of its results.
pub(crate) async fn act(shared: &Arc<Shared>, action: Action) -> Result<Vec<ActionResult>, Status> {
    let shared = Arc::clone(shared);
    // Stores and disks may be looked at, and bodies read: on a thread that may block.
    let acted = tokio::task::spawn_blocking(move || results(&shared, &action)).await;
    let results = acted.map_err(|_| Status::from(Fault::ours()))??;
    Ok(results.into_iter().map(|body| ActionResult { body: Bytes::from(body) }).collect())
}

fn results(shared: &Arc<Shared>, action: &Action) -> Result<Vec<String>, Status> {
    let (name, body) = (action.r#type.as_str(), &action.body);
    let empty = || match body.is_empty() {
        true => Ok(()),
        false => Err(Fault::new(Reason::OptionConflict, format!("action `{name}` takes no body"))),
    };
    let named = || Ok::<_, Fault>(command::parse_job_name(body)?.job);
    let jobs = &shared.jobs;
    Ok(match name {
        metadata::ACTION_SERVER_INFO => empty().map(|()| vec![json::server_info(&server_info(shared))])?,
        metadata::ACTION_SCHEMES_LIST => empty().map(|()| vec![json::schemes(&quarrel_engine::listing())])?,
        metadata::ACTION_JOB_LIST => empty().map(|()| jobs.list().iter().map(json::job).collect())?,
        metadata::ACTION_JOB_SUBMIT => {
            let request = command::parse_job_request(body).map_err(Fault::from)?;
            vec![json::job(&jobs.submit(shared, request)?)]
        }
        metadata::ACTION_JOB_STATUS => vec![json::job(&jobs.status(&named()?)?)],
        metadata::ACTION_JOB_CANCEL => vec![json::job(&jobs.cancel(&named()?)?)],
        other => {
            let other = quarrel_engine::shorten(other, 100);
            let known = Vec::from_iter(actions().map(|action| action.r#type)).join(", ");
            return Err(unsupported(&format!("unknown action `{other}`: expected one of {known}")));
        }
    })
}

/// The schema of a command's answers.
pub(crate) async fn schema(shared: &Shared, descriptor: FlightDescriptor) -> Result<SchemaResult, Status> {
    let (plan, _) = plan_of_any(shared, descriptor.cmd).await?;
    let schema = Output::reply_schema(&plan, shared.level.name());
    SchemaResult::try_from(SchemaAsIpc::new(&schema, &IpcWriteOptions::default())).map_err(encoding)
}

/// The same as a flight. One of the caller's layers has no endpoints: they go in and out of one DoExchange, and how many is not known. That of a stored
/// checkpoint has one, here, whose ticket is the command.
pub(crate) async fn flight_info(shared: &Shared, descriptor: FlightDescriptor) -> Result<FlightInfo, Status> {
    let (plan, is_stored) = plan_of_any(shared, descriptor.cmd.clone()).await?;
    let schema = Output::reply_schema(&plan, shared.level.name());
    let message = IpcMessage::try_from(SchemaAsIpc::new(&schema, &IpcWriteOptions::default())).map_err(encoding)?;
    let ticket = Ticket { ticket: descriptor.cmd.clone() };
    let endpoint = is_stored.then(|| FlightEndpoint { ticket: Some(ticket), ..FlightEndpoint::default() });
    Ok(FlightInfo {
        schema: message.0,
        flight_descriptor: Some(descriptor),
        endpoint: endpoint.into_iter().collect(),
        total_records: -1,
        total_bytes: -1,
        ordered: true,
        app_metadata: Bytes::new(),
    })
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
        allow_read: shared.config.allow_read.clone(),
        allow_write: shared.config.allow_write.clone(),
    }
}
