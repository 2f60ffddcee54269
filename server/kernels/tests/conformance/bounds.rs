//! Nothing is read or written outside its buffer: each of them ends, and then begins, at a page that cannot be touched, and
//! a kernel that does ends the process.

#![cfg(unix)]

use quarrel_kernels::{Decoded, Dtype, convert, first_non_finite};

use crate::{
    asked,
    channel::{Case, Places, channel},
    data::{ARITHS, FORMATS, GROUPS, numbers, store},
    place::Place,
};

const ENDS: [Place; 2] = [Place::BeforeGuard, Place::AfterGuard];

#[test]
fn quantizing_and_back_stays_within_its_buffers() {
    for (len, dtype) in asked::lengths().flat_map(|len| Dtype::ALL.map(|dtype| (len, dtype))) {
        let bytes = store(dtype, &numbers(len, 1));
        for (turn, format) in FORMATS.into_iter().enumerate() {
            let case = Case { format, arith: ARITHS[len % 2], dtype, group: GROUPS[(len + turn) % 7] };
            let own = channel(asked::scalar(), &case, &bytes, None, Places::OWN);
            for (level, end) in asked::levels().iter().flat_map(|level| ENDS.map(|end| (level, end))) {
                let outcome = channel(*level, &case, &bytes, None, Places::all(end));
                outcome.assert_same(&own, || format!("{len} elements, {level:?}, {case:?}, {end:?}"));
            }
        }
    }
}

#[test]
fn converting_and_searching_stay_within_their_buffers() {
    for (len, dtype) in asked::lengths().flat_map(|len| Dtype::ALL.map(|dtype| (len, dtype))) {
        let bytes = store(dtype, &numbers(len, 1));
        for end in ENDS {
            let input = end.holding(&bytes, 0);
            assert_eq!(first_non_finite(dtype, &input), None);
            for decoded in [Decoded::F32, Decoded::Bf16, Decoded::F16] {
                for level in asked::levels() {
                    let mut out = end.room(len * decoded.bytes(), 0xaa);
                    convert(*level, dtype, &input, decoded, &mut out);
                    assert!(len == 0 || !out.iter().all(|byte| *byte == 0xaa));
                }
            }
        }
    }
}
