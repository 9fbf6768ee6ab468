//! What a request may ask for while Enhanced Container Isolation is on.
//!
//! Three kinds of requests can bring a path of the guest into a container: creating a container, a volume with
//! options of the `local` driver, and a swarm service. Their JSON is read as the engine reads it (Go's
//! `encoding/json`): keys in any case, every one of several equal keys.

mod bodies;
mod commands;
pub(crate) mod environment;
mod go_json;
mod image_name;
mod image_pattern;
mod inspection;
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
