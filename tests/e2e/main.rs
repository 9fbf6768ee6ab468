//! End to end: the real program, a real VM, the real docker command.
//!
//! `scripts/test` runs this suite where KVM runs Linux guests, or inside the emulated AMD-V machine, with
//! `--ignored --test-threads=1` and `BULKHEAD_TEST_IMAGES` naming the folder of `tests/images/build`. Most tests share
//! one engine; each asks for the state it needs, and the order (by name, as the test harness has it) only saves time.

// A helper of a test that cannot go on shall panic, as the test itself does.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod api;
mod examine;
mod input;
mod isolation;
mod lifecycle;
mod shutdown;
mod sockets;
