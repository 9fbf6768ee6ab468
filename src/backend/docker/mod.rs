//! What makes a VM a Docker backend on the host: its socket and its docker context.

pub mod context;
pub mod socket;
