//! A client of Quarrel: layers of weights in, quantized layers with measured quality out, over Arrow Flight.
//!
//! ```
//! # let runtime = tokio::runtime::Runtime::new()?;
//! # runtime.block_on(async {
//! # let (bound, dial) = quarrel_flight::local();
//! # let config = quarrel_flight::Config::from_environment().unwrap();
//! # tokio::spawn(quarrel_flight::run(bound, config, std::future::pending()));
//! # let connect = async |_address: &str| Client::over(move || { let dial = dial.clone(); async move { dial.connect().await } }).await;
//! use futures::TryStreamExt;
//! use quarrel_client::{Client, Dtype, Layer, Outcome, scheme, whole};
//!
//! let client = connect("grpc://127.0.0.1:8815").await?; // Client::connect
//! let weights: Vec<u8> = (0..256 * 128).flat_map(|i| ((i % 97) as f32 - 48.0).to_le_bytes()).collect();
//! let layers = [Layer::new("mlp.up_proj", Dtype::F32, [256, 128], weights)];
//!
//! let mut quantized = whole(client.quantize(scheme("W4A16"), layers));
//! while let Some(layer) = quantized.try_next().await? {
//!     let Outcome::Quantized(codes) = &layer.outcome else { continue };
//!     assert_eq!((codes.data.len(), codes.scales.len()), (256 * 128 / 2, 256));
//!     println!("{}: {:?} dB", layer.name(), layer.metrics.and_then(|metrics| metrics.sqnr_db));
//! }
//! # Ok::<_, quarrel_client::Error>(())
//! # })?;
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```
//!
//! **What it takes care of.** Layers are cut into runs of at most 2 MiB or one output channel and read only when their
//! turn comes, so a model of any size passes through little memory. Answers are taken from the network as they come,
//! and sending waits while too many of them are untaken: neither a slow consumer nor a slow source can bring a stream
//! to a standstill. When a server goes away, layers that were not answered whole are sent again, elsewhere or after its
//! restart. [`Client::streams`] sends over several connections at once.
//!
//! The contract on the wire is `proto/SPEC.md`; the crate `quarrel-proto`, re-exported as [`proto`], holds its words.

#![forbid(unsafe_code)]

mod address;
mod answered;
mod client;
mod columns;
mod cut;
mod dequantize;
mod error;
mod exchange;
mod feed;
mod layer;
mod quantize;
mod rows;
mod wire;

pub use client::Client;
pub use dequantize::{CodedLayer, DecodedRun};
pub use error::{Error, Kind, Refusal};
pub use feed::Answers;
pub use layer::{Dtype, DtypeError, Layer};
pub use quantize::{Codes, Metrics, Nested, Outcome, QuantizedLayer, Run, whole};
pub use quarrel_proto as proto;

use quarrel_proto::v1;

/// The command that quantizes every layer of rank 2 or more with one scheme.
pub fn scheme(scheme: impl Into<String>) -> v1::Quantize {
    v1::Quantize { how: Some(v1::quantize::How::Scheme(scheme.into())), ..Default::default() }
}
