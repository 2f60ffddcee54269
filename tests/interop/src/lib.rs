//! Clients that use nothing of ours: `tests/wire` holds that the contract needs no library of this repository.

#![forbid(unsafe_code)]
