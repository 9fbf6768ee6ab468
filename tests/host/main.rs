//! The real program, as far as it goes without a VM: profiles, locks, sockets, bad input, the docker context.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a test that fails")]

mod api;
mod backend;
mod context;
mod dashboard;
mod headless;
mod home;
mod policy;
mod profiles;
mod run;
mod service_manager;
mod settings;
mod share;
mod start;
mod support_bundle;
mod vsock;
