//! A client of generated stubs: tonic, prost and arrow-ipc, as anybody would write it who has the .proto files.

mod ipc;

use std::slice::from_ref;

use arrow_array::RecordBatch;
use arrow_ipc::convert::try_schema_from_ipc_buffer;
use arrow_schema::SchemaRef;
use futures::stream;
use prost::Message;
use serde_json::Value;
use tonic::{Code, Status, transport::Channel};

use crate::{
    answers::{column, expect_decoded, expect_int8, expect_schemes, expect_server_info},
    layers::{Layer, batch},
    server::Server,
};
use flight::{Action, Empty, FlightDescriptor, flight_descriptor::DescriptorType};
use v1::{Command, Dequantize, Measure, Quantize, Recipe, Rule, command::Verb, quantize::How};

#[allow(dead_code, missing_docs, clippy::all, reason = "generated; Arrow documents it")]
mod flight {
    tonic::include_proto!("arrow.flight.protocol");
}

#[allow(dead_code, missing_docs, clippy::all, reason = "generated; the .proto files document it")]
mod v1 {
    tonic::include_proto!("quarrel.v1");
}

type Client = flight::flight_service_client::FlightServiceClient<Channel>;

#[tokio::test]
async fn codes_and_scales_are_those_of_the_formula() {
    let server = Server::start();
    let layers = [Layer::new("model.up", [16, 64]), Layer::new("model.down", [3, 1000])];
    let reply = exchange(&server, int8(), &[batch(&layers)]).await.unwrap();
    expect_int8(&reply.batches, &layers);
}

#[tokio::test]
async fn dequantize_takes_the_answers_as_they_came() {
    let server = Server::start();
    let layers = [Layer::new("model.up", [16, 64]), Layer::new("model.down", [3, 1000])];
    let quantized = exchange(&server, int8(), &[batch(&layers)]).await.unwrap();
    let decoded = exchange(&server, dequantize(), &quantized.batches).await.unwrap();
    expect_decoded(&decoded.batches, &layers);
}

#[tokio::test]
async fn the_last_message_is_the_summary() {
    let server = Server::start();
    let layers = [Layer::new("model.up", [16, 64]), Layer::new("head", [2, 8])];
    let rule = Rule { targets: vec!["*".to_owned()], scheme: "int8".to_owned(), ..Rule::default() };
    let recipe = Recipe { rules: vec![rule], ignore: vec!["head".to_owned()] };
    let reply = exchange(&server, quantize(How::Recipe(recipe)), &[batch(&layers)]).await.unwrap();

    let (summary, progress) = reply.reports.split_last().unwrap();
    assert_eq!(reply.batches.last().unwrap().num_rows(), 0);
    let elements = 16 * 64;
    for (key, expected) in [
        ("rows", 2),
        ("layers_quantized", 1),
        ("layers_kept", 1),
        ("layers_failed", 0),
        ("elements", elements),
        ("bytes_in", (elements + 2 * 8) * 4),
        ("bytes_out", elements + 16 * 4),
    ] {
        assert_eq!(summary[key], expected, "{key}: {summary}");
    }
    // A scale of 32 bits for 64 columns.
    assert_eq!(summary["bits_per_weight"], 8.5, "{summary}");
    assert_eq!(summary["worst_layer"], "model.up", "{summary}");
    let last = progress.last().unwrap();
    assert_eq!(last["rows"], 2, "{last}");
    assert_eq!(last["layers"], 2, "{last}");
}

#[tokio::test]
async fn an_error_has_its_code_and_begins_with_its_reason() {
    let server = Server::start();
    let mut damaged = Layer::new("model.up", [16, 64]);
    damaged.values[100] = f32::NAN;
    let whole = Layer::new("model.up", [16, 64]);
    let measure = Command { verb: Some(Verb::Measure(Measure {})), ..Command::default() };
    for (command, layer, code, message) in [
        (quantize(How::Scheme("int9".to_owned())), &whole, Code::InvalidArgument, "[scheme_unknown] "),
        (Command::default(), &whole, Code::InvalidArgument, "[command_missing] "),
        (measure, &whole, Code::Unimplemented, "[verb_unsupported] "),
        (int8(), &damaged, Code::InvalidArgument, "[non_finite] layer `model.up`: "),
    ] {
        let status = exchange(&server, command, &[batch(from_ref(layer))]).await.map(|_| ()).unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().starts_with(message), "{status:?}: expected `{message}`");
    }
    // A ticket of layers that are nobody's but the caller's.
    let ticket = flight::Ticket { ticket: int8().encode_to_vec() };
    let status = client(&server).await.do_get(ticket).await.map(|_| ()).unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(status.message().starts_with("[verb_unsupported] "), "{status:?}");
}

#[tokio::test]
async fn what_the_server_knows_is_json() {
    let server = Server::start();
    let mut client = client(&server).await;
    let mut listed = client.list_actions(Empty {}).await.unwrap().into_inner();
    let mut actions = Vec::new();
    while let Some(action) = listed.message().await.unwrap() {
        actions.push(action.r#type);
    }
    let jobs = ["job.submit", "job.status", "job.cancel", "job.list"];
    assert_eq!(actions, [&["server.info", "schemes.list"], &jobs[..]].concat());
    expect_server_info(&act(&server, "server.info").await);
    expect_schemes(&act(&server, "schemes.list").await);
}

#[tokio::test]
async fn the_schema_is_told_before_the_exchange() {
    let server = Server::start();
    let layers = [Layer::new("model.up", [16, 64])];
    let reply = exchange(&server, int8(), &[batch(&layers)]).await.unwrap();

    let told = client(&server).await.get_schema(descriptor(&int8())).await.unwrap().into_inner();
    assert_eq!(try_schema_from_ipc_buffer(&told.schema).unwrap(), *reply.schema);
    let info = client(&server).await.get_flight_info(descriptor(&int8())).await.unwrap().into_inner();
    assert_eq!(try_schema_from_ipc_buffer(&info.schema).unwrap(), *reply.schema);
    assert_eq!((info.endpoint.len(), info.total_records, info.total_bytes), (0, -1, -1));

    assert_eq!(reply.schema.field(0).name(), "layer_name");
    let effective: Value = serde_json::from_str(reply.schema.metadata().get("quarrel.command").unwrap()).unwrap();
    assert_eq!(effective["quantize"]["scheme"], "int8", "{effective}");
    assert_eq!(effective["quantize"]["arith"], "f32", "{effective}");
}

#[tokio::test]
async fn a_command_means_the_same_in_json() {
    let server = Server::start();
    let layers = [Layer::new("model.up", [16, 64])];
    let protobuf = exchange(&server, int8(), &[batch(&layers)]).await.unwrap();
    let cmd = br#"{"quantize": {"scheme": "int8"}}"#.to_vec();
    let json = exchange_bytes(&server, cmd, &[batch(&layers)]).await.unwrap();
    assert_eq!(json.schema, protobuf.schema);
    for name in ["quantized_data", "scales", "metrics", "layer_metrics"] {
        assert_eq!(column(&json.batches[0], name), column(&protobuf.batches[0], name), "{name}");
    }
}

/// What came back.
struct Reply {
    schema: SchemaRef,
    batches: Vec<RecordBatch>,
    /// Of each batch.
    reports: Vec<Value>,
}

async fn exchange(server: &Server, command: Command, batches: &[RecordBatch]) -> Result<Reply, Status> {
    exchange_bytes(server, command.encode_to_vec(), batches).await
}

async fn exchange_bytes(server: &Server, cmd: Vec<u8>, batches: &[RecordBatch]) -> Result<Reply, Status> {
    let mut request = ipc::messages(batches);
    request[0].flight_descriptor = Some(describe(cmd));
    let mut client = client(server).await;
    let mut answers = client.do_exchange(stream::iter(request)).await?.into_inner();
    let mut messages = Vec::new();
    while let Some(message) = answers.message().await? {
        messages.push(message);
    }
    let (schema, batches) = ipc::batches(&messages);
    let reports = messages[1..].iter().map(|message| serde_json::from_slice(&message.app_metadata).unwrap()).collect();
    Ok(Reply { schema, batches, reports })
}

/// An action's one result.
async fn act(server: &Server, action: &str) -> Value {
    let action = Action { r#type: action.to_owned(), body: Vec::new() };
    let mut client = client(server).await;
    let mut results = client.do_action(action).await.unwrap().into_inner();
    let result = results.message().await.unwrap().unwrap();
    assert_eq!(results.message().await.unwrap(), None);
    serde_json::from_slice(&result.body).unwrap()
}

async fn client(server: &Server) -> Client {
    Client::new(server.connect().await)
}

fn int8() -> Command {
    quantize(How::Scheme("int8".to_owned()))
}

fn quantize(how: How) -> Command {
    let quantize = Quantize { how: Some(how), ..Quantize::default() };
    Command { verb: Some(Verb::Quantize(quantize)), ..Command::default() }
}

fn dequantize() -> Command {
    Command { verb: Some(Verb::Dequantize(Dequantize::default())), ..Command::default() }
}

fn descriptor(command: &Command) -> FlightDescriptor {
    describe(command.encode_to_vec())
}

fn describe(cmd: Vec<u8>) -> FlightDescriptor {
    FlightDescriptor { r#type: DescriptorType::Cmd.into(), cmd, ..FlightDescriptor::default() }
}
