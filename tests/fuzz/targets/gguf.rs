//! A GGUF file: opened, its layers found and decoded, and a job to another one opened.

#![forbid(unsafe_code)]
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarrel_checkpoint::modules;
use quarrel_fuzz::{Folder, open_dense_job, open_job, open_source};
use quarrel_proto::v1::{Quantize, quantize::How};

const SCHEMES: [&str; 4] = ["Q4_K_M", "Q8_0", "F16", "MXFP4_MOE"];

fuzz_target!(|input: &[u8]| {
    let folder = Folder::default();
    folder.clear();
    folder.put("x.gguf", &[b"GGUF", input.strip_prefix(b"GGUF").unwrap_or(input)].concat());
    let path = folder.path("x.gguf");
    let source = match open_source(&path) {
        Ok(source) => source,
        Err(error) => {
            assert!(error.to_string().contains("x.gguf"), "{error}");
            return;
        }
    };
    for tensor in source.tensors() {
        assert_eq!(source.tensor(&tensor.name), Some(tensor));
        let bytes = source.read_whole(tensor).expect("what the head says is there");
        assert_eq!(bytes.len() as u64, tensor.bytes());
    }
    for module in modules(&source).unwrap_or_default() {
        let (channels, bytes) = module.channels();
        assert_eq!(channels * bytes, module.codes.bytes(), "{module:?}");
        assert!(module.scales(&source).expect("there are none").is_empty());
    }
    for scheme in SCHEMES {
        let command = Quantize { how: Some(How::Scheme(scheme.to_owned())), ..Default::default() };
        let _ = open_job(&path, &folder.path("to.gguf"), command).map(drop);
    }
    let _ = open_dense_job(&path, &folder.path("dense.safetensors")).map(drop);
});
