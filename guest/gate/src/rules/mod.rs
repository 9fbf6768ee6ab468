//! The rules for API requests. They decide by the text of a request and make no requests themselves.
//!
//! With isolation on a request passes only if it is known, and what passes is written again: the path in one spelling,
//! the parameters, headers and keys of the body that dockerd knows, with what the judges left of them.
//!
//! - `api` is the table of routes, with the shapes of their bodies, their parameters and their judges;
//! - `judges` decide about bodies and parameters, by the lists of `bulkhead_policy`;
//! - `commands` decides by the commands of the docker command line that a request belongs to;
//! - `source_places` finds the sources of mounts in a body, which are paths of the host;
//! - `headers` chooses the headers that dockerd reads;
//! - `paths` recognises the sockets of the engine, `socket_request` asks for the one that can be allowed;
//! - `image_pattern` reads the list of images, `image_name` completes names;
//! - `environment` adds variables to new containers, with isolation or without;
//! - `target` and `go_json` read paths and keys as dockerd does.

pub mod api;
mod command_use;
mod commands;
pub(crate) mod environment;
mod go_json;
pub(crate) mod headers;
mod image_name;
mod image_pattern;
pub(crate) mod judges;
mod paths;
mod refusal;
mod socket_request;
pub(crate) mod source_places;
mod target;

pub use commands::{RequestInfo, permits, pulled_image};
pub use image_name::normalise as normalise_image;
pub(crate) use image_name::normalise_with_tag;
pub use image_pattern::ImagePattern;
pub use paths::reaches_engine_socket;
pub use refusal::Refusal;
pub use socket_request::SocketRequest;
pub use target::{Target, canonical, encode, segments};

/// Enhanced Container Isolation (ECI).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// These rules are enforced.
    On,
    /// Requests pass unchecked, except `docker load` and checkpoints.
    Off,
}

impl From<bool> for Isolation {
    fn from(on: bool) -> Self {
        if on { Self::On } else { Self::Off }
    }
}
