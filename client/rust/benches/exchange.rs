//! The Rust client against a server: `exchange ADDRESS SCHEME`. Each line of standard input is a number of MiB to send, of layers
//! [4096, 4096] of f32; the answer is a line with the number of layers that came back. `make bench` runs it.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::io::{BufRead, stdin};

use bytes::Bytes;
use futures::TryStreamExt;
use quarrel_client::{Client, Dtype, Layer, Outcome, scheme};

const SIDE: u64 = 4096;
const LAYER_MIB: usize = (SIDE * SIDE * 4) as usize >> 20;

// One thread, as raw TCP's sender has: on two cores a second one only takes turns with the server's.
#[tokio::main(flavor = "current_thread")]
async fn main() {
    let said: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let [address, wanted] = &said[..] else { panic!("expected ADDRESS SCHEME, got {said:?}") };
    let client = Client::connect(address).await.unwrap();
    // As large as weights are, and the same in every run.
    let weights: Vec<u8> =
        (0..SIDE * SIDE).flat_map(|i| ((i * 2_654_435_761 % 65_521) as f32 * 1e-6 - 0.03).to_le_bytes()).collect();
    let weights = Bytes::from(weights);
    println!("listening {address}");
    for line in stdin().lock().lines() {
        let layers = line.unwrap().trim().parse::<usize>().unwrap() / LAYER_MIB;
        let source: Vec<Layer> = (0..layers)
            .map(|index| Layer::new(format!("layers.{index}.weight"), Dtype::F32, [SIDE, SIDE], weights.clone()))
            .collect();
        let mut runs = std::pin::pin!(client.quantize(scheme(wanted), source));
        let mut complete = 0;
        while let Some(run) = runs.try_next().await.unwrap() {
            assert!(matches!(run.outcome, Outcome::Quantized(_)), "{:?}", run.outcome);
            complete += usize::from(run.layer_metrics.is_some());
        }
        println!("{complete}");
    }
}
