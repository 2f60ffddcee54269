//! A command, as protobuf or JSON, to a plan. What is effective means the same again.

#![forbid(unsafe_code)]
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarrel_engine::Plan;
use quarrel_proto::command::{COMMAND_BYTES_MAX, parse, to_json};

fuzz_target!(|input: &[u8]| {
    let Ok(command) = parse(input) else { return };
    let text = to_json(&command);
    // JSON may be longer than what it was made of.
    if text.len() <= COMMAND_BYTES_MAX {
        let again = parse(text.as_bytes()).expect("what is written is read");
        assert_eq!(to_json(&again), text);
    }
    let Ok(plan) = Plan::new(&command) else { return };
    let again = Plan::new(&plan.effective).expect("what is effective is a plan");
    assert_eq!(to_json(&again.effective), to_json(&plan.effective));
    for (name, shape) in [("m.0.mlp.up_proj.weight", &[64u64, 256][..]), ("m.experts", &[4, 32, 128]), ("m.norm", &[7])]
    {
        let kept = plan.keeps(name, shape, "bf16").is_some();
        let schemes = plan.schemes_of(name, shape, "bf16");
        assert!(!kept || schemes.is_ok_and(|schemes| schemes.is_empty()), "{name} is kept and quantized");
    }
});
