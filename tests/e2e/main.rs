//! End to end: the real program, a real VM, the real docker command.
//!
//! `scripts/test e2e` runs this suite where KVM runs Linux guests, or inside the emulated AMD-V machine, with
//! `--ignored --test-threads=1` and `BULKHEAD_TEST_IMAGES` naming the directory of `tests/images/build`. Most tests
//! share one engine; each asks for the state that it needs, and the order (by name, as libtest has it) only saves time.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a test that fails")]

mod api;
mod ci;
mod diagnose;
mod input;
mod isolation;
mod lifecycle;
mod shares;
mod shutdown;
mod sockets;
mod storm;
mod vsock;
