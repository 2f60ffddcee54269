//! A file of safetensors: opened, its quantized layers found, and what they are made of read.

#![forbid(unsafe_code)]
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarrel_checkpoint::{Source, modules};
use quarrel_fuzz::{Folder, open_source};

fuzz_target!(|input: &[u8]| {
    let folder = Folder::default();
    folder.put_tensors("x.safetensors", input);
    match open_source(&folder.path("x.safetensors")) {
        Ok(source) => read(&source),
        Err(error) => assert!(error.to_string().contains("x.safetensors"), "{error}"),
    }
});

fn read(source: &Source) {
    for tensor in source.tensors() {
        assert_eq!(source.tensor(&tensor.name), Some(tensor));
        let bytes = source.read_whole(tensor).expect("what the header says is there");
        assert_eq!(bytes.len() as u64, tensor.bytes());
    }
    let Ok(modules) = modules(source) else { return };
    for module in modules {
        let (channels, bytes) = module.channels();
        assert_eq!(channels * bytes, module.codes.bytes(), "{module:?}");
        assert!(module.span_channels() > 0);
        assert!(module.parts().all(|part| source.tensor(part).is_some()));
        let scales = module.scales(source).expect("they are there");
        let points = module.zero_points(source).expect("they are there");
        assert!(points.is_none_or(|points| points.len() == scales.len()), "{module:?}");
        module.global_scale(source).expect("it is there");
    }
}
