//! Stubs as anybody would make them: from .proto files alone, with the stock generator.

#![forbid(unsafe_code)]

use std::{error::Error, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let arrow = here.join("proto");
    let quarrel = here.ancestors().nth(2).ok_or("expected this crate two folders below the root")?.join("proto");
    let files =
        [arrow.join("Flight.proto"), quarrel.join("quarrel/v1/command.proto"), quarrel.join("quarrel/v1/report.proto")];
    println!("cargo::rerun-if-changed=build.rs");
    for file in &files {
        println!("cargo::rerun-if-changed={}", file.display());
    }
    // protox parses what protoc would, which nobody needs to install then.
    let descriptors = protox::compile(files, [arrow, quarrel])?;
    tonic_prost_build::configure().build_server(false).build_transport(false).compile_fds(descriptors)?;
    Ok(())
}
