//! The host's side of the Docker engine: `docker.sock` and the docker context.

pub mod context;
pub(super) mod socket;
