//! A scheme. Its canonical form parses back to itself.

#![forbid(unsafe_code)]
#![no_main]

use libfuzzer_sys::fuzz_target;
use quarrel_engine::Scheme;

fuzz_target!(|input: &[u8]| {
    let Ok(text) = str::from_utf8(input) else { return };
    let Ok(scheme) = text.parse::<Scheme>() else { return };
    let canonical = scheme.to_string();
    assert_eq!(canonical.parse(), Ok(scheme), "{text} is {canonical}");
});
