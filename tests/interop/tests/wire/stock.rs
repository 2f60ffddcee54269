//! arrow-flight's own client, encoder and decoder, with nothing of anybody's in between.

use std::sync::Arc;

use arrow_array::{DictionaryArray, RecordBatch, types::Int32Type};
use arrow_flight::{
    Action, FlightClient, FlightDescriptor,
    decode::DecodedPayload,
    encode::{DictionaryHandling, FlightDataEncoder, FlightDataEncoderBuilder},
    error::FlightError,
};
use futures::{TryStreamExt, stream};
use serde_json::Value;
use tonic::Code;

use crate::{
    answers::{expect_decoded, expect_int8, expect_schemes, expect_server_info},
    layers::{Layer, batch, batch_with_names},
    server::Server,
};

const INT8: &str = r#"{"quantize": {"scheme": "int8"}}"#;
const DEQUANTIZE: &str = r#"{"dequantize": {}}"#;

/// Small ones, and one of 4 MiB: as f32 it is larger than any message that the client takes.
fn model() -> [Layer; 4] {
    [
        Layer::new("model.up", [16, 64]),
        Layer::new("model.down", [3, 1000]),
        Layer::new("model.large", [1024, 1024]),
        Layer::new("head", [40, 256]),
    ]
}

#[tokio::test]
async fn every_answer_is_read_to_the_end() {
    let server = Server::start();
    let layers = model();
    let batches = vec![batch(&layers[..2]), batch(&layers[2..3]), batch(&layers[3..])];
    let answers = exchange(&server, INT8, FlightDataEncoderBuilder::new(), batches).await.unwrap();
    expect_int8(&answers, &layers);
}

#[tokio::test]
async fn answers_go_back_as_they_came() {
    let server = Server::start();
    let layers = model();
    let answers = exchange(&server, INT8, FlightDataEncoderBuilder::new(), vec![batch(&layers)]).await.unwrap();
    let decoded = exchange(&server, DEQUANTIZE, FlightDataEncoderBuilder::new(), answers).await.unwrap();
    expect_decoded(&decoded, &layers);
}

#[tokio::test]
async fn names_may_be_dictionaries() {
    let server = Server::start();
    let layers = model();
    for handling in [DictionaryHandling::Hydrate, DictionaryHandling::Resend] {
        let batches = [&layers[..2], &layers[2..]].map(|layers| {
            let names: DictionaryArray<Int32Type> = layers.iter().map(|layer| layer.name).collect();
            batch_with_names(layers, Arc::new(names))
        });
        let encoder = FlightDataEncoderBuilder::new().with_dictionary_handling(handling);
        let answers = exchange(&server, INT8, encoder, batches.to_vec()).await.unwrap();
        expect_int8(&answers, &layers);
    }
}

#[tokio::test]
async fn the_summary_is_within_the_decoders_reach() {
    let server = Server::start();
    let layers = [Layer::new("model.up", [16, 64]), Layer::new("model.down", [3, 1000])];
    let request = request(INT8, FlightDataEncoderBuilder::new(), vec![batch(&layers)]);
    let mut client = client(&server).await;
    let decoder = client.do_exchange(request).await.unwrap().into_inner();
    let decoded: Vec<_> = decoder.try_collect().await.unwrap();
    let last = decoded.last().unwrap();
    assert!(matches!(&last.payload, DecodedPayload::RecordBatch(batch) if batch.num_rows() == 0), "{last:?}");
    let summary: Value = serde_json::from_slice(&last.inner.app_metadata).unwrap();
    assert_eq!(summary["rows"], 2, "{summary}");
    assert_eq!(summary["layers_quantized"], 2, "{summary}");
}

#[tokio::test]
async fn an_error_is_a_status_with_its_reason() {
    let server = Server::start();
    let mut layer = Layer::new("model.up", [16, 64]);
    layer.values[100] = f32::INFINITY;
    let error = exchange(&server, INT8, FlightDataEncoderBuilder::new(), vec![batch(&[layer])]).await.unwrap_err();
    let FlightError::Tonic(status) = error else { panic!("{error:?}: expected a status") };
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(status.message().starts_with("[non_finite] layer `model.up`: "), "{status:?}");
}

#[tokio::test]
async fn schema_and_actions_are_told() {
    let server = Server::start();
    let mut client = client(&server).await;
    let schema = client.get_schema(FlightDescriptor::new_cmd(INT8)).await.unwrap();
    let layers = [Layer::new("model.up", [16, 64])];
    let answers = exchange(&server, INT8, FlightDataEncoderBuilder::new(), vec![batch(&layers)]).await.unwrap();
    assert_eq!(schema, *answers[0].schema());

    let actions: Vec<_> = client.list_actions().await.unwrap().try_collect().await.unwrap();
    for action in actions {
        let results = async { client.do_action(Action::new(&action.r#type, "")).await?.try_collect::<Vec<_>>().await };
        let results = match (action.r#type.as_str(), results.await) {
            // No job runs, and a body is missed.
            ("job.list", Ok(results)) if results.is_empty() => continue,
            ("job.submit" | "job.status" | "job.cancel", Err(FlightError::Tonic(status))) => {
                assert!(status.message().starts_with("[command_missing] "), "{status:?}");
                continue;
            }
            (_, results) => results.unwrap(),
        };
        let [body] = &results[..] else { panic!("{}: {} results, expected 1", action.r#type, results.len()) };
        let body: Value = serde_json::from_slice(body).unwrap();
        match action.r#type.as_str() {
            "server.info" => expect_server_info(&body),
            "schemes.list" => expect_schemes(&body),
            other => panic!("`{other}`: not an action of the contract"),
        }
    }
}

/// Everything that the stock reader hands out.
async fn exchange(
    server: &Server,
    command: &'static str,
    encoder: FlightDataEncoderBuilder,
    batches: Vec<RecordBatch>,
) -> Result<Vec<RecordBatch>, FlightError> {
    let mut client = client(server).await;
    let answers = client.do_exchange(request(command, encoder, batches)).await?;
    answers.try_collect().await
}

fn request(command: &'static str, encoder: FlightDataEncoderBuilder, batches: Vec<RecordBatch>) -> FlightDataEncoder {
    let descriptor = FlightDescriptor::new_cmd(command);
    encoder.with_flight_descriptor(Some(descriptor)).build(stream::iter(batches.into_iter().map(Ok)))
}

async fn client(server: &Server) -> FlightClient {
    FlightClient::new(server.connect().await)
}
