//! The rules for API requests. They decide by the text of a request and make no requests themselves.
//!
//! Three kinds of requests can bring a path of the guest into a container: the creation of a container, of a volume
//! with options of the `local` driver, and of a swarm service. Their JSON is read as dockerd reads it (Go's
//! `encoding/json`): keys in any case, and every one of several equal keys.
//!
//! - `inspection` finds the requests whose bodies count, `bodies` checks them, `paths` recognises the engine's sockets;
//! - `judges` decide about canonical bodies and queries, with the rules of `bulkhead_policy`;
//! - `commands` maps routes to commands of the docker command line, for the list of commands;
//! - `image_pattern` reads the list of images, `image_name` completes names;
//! - `environment` adds variables to new containers, with isolation or without;
//! - `target` and `go_json` read paths and JSON as dockerd does.

mod bodies;
mod commands;
pub(crate) mod environment;
mod go_json;
mod image_name;
mod image_pattern;
mod inspection;
#[cfg_attr(not(test), expect(dead_code, reason = "the table of routes calls the judges"))]
mod judges;
mod paths;
mod refusal;
mod target;

pub use bodies::SocketRequest;
pub use commands::{RequestInfo, permits, pulled_image};
pub use image_name::normalise as normalise_image;
pub(crate) use image_name::normalise_with_tag;
pub use image_pattern::ImagePattern;
pub use inspection::{Inspection, Isolation, Verified, is_container_create};
pub use paths::reaches_engine_socket;
pub use refusal::Refusal;
pub use target::{canonical, encode, segments};
