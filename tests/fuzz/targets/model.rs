//! A model's folder: index, configuration and two files of tensors, and all that is looked at before a job begins.
//!
//! The input is a byte that chooses the scheme, and up to four parts. An empty part is a file that is missing.

#![forbid(unsafe_code)]
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarrel_checkpoint::checkpoint_recipe;
use quarrel_fuzz::{Folder, estimate, open_dense_job, open_job, open_model};
use quarrel_proto::v1::{Quantize, Rule, quantize::How};

const SCHEMES: [(&str, Option<u32>); 7] = [
    ("W4A16", None),
    ("NVFP4A16", None),
    ("FP8_BLOCK", None),
    ("int8/tensor", None),
    ("int4-asym/g32", Some(2)),
    ("MXFP6A16", None),
    ("int3;solver=mse", None),
];

fuzz_target!(|input: &[u8]| {
    let Some((first, rest)) = input.split_first() else { return };
    let (scheme, channel_dims) = SCHEMES[usize::from(*first) % SCHEMES.len()];
    let folder = Folder::default();
    folder.put_model(rest);
    let (from, to) = (folder.path(""), folder.path("to"));
    if let Err(error) = open_model(&from) {
        assert!(error.to_string().contains("quarrel-fuzz"), "no file is named: {error}");
        return;
    }
    let rule = Rule { scheme: scheme.to_owned(), channel_dims, ..Default::default() };
    // As for a file, with one pattern: those of a model take longer to compile than all the rest.
    let recipe = checkpoint_recipe(rule, Vec::new(), false);
    let command = Quantize { how: Some(How::Recipe(recipe)), ..Default::default() };
    if let Ok(estimate) = estimate(&from, &command) {
        let (least, most) = estimate.destination_bytes;
        assert!(least <= most);
    }
    // What is wrong is said by an error; what it says is the tests' business.
    let _ = open_job(&from, &to, command).map(drop);
    let _ = open_dense_job(&from, &folder.path("dense")).map(drop);
});
