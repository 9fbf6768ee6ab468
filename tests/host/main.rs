//! The real program, as far as it goes without a VM: profiles, locks, sockets, bad input, the docker context.

// A helper of a test that cannot go on shall panic, as the test itself does.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod backend;
mod context;
mod home;
mod policy;
mod settings;
mod start;
