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
mod paths;
mod target;

use bytes::Bytes;

pub use bodies::SocketRequest;
pub use commands::{RequestInfo, permits, pulled_image};
pub use image_name::normalise as normalise_image;
pub(crate) use image_name::normalise_with_tag;
pub use image_pattern::ImagePattern;
pub use paths::reaches_engine_socket;
pub use target::{canonical, encode, segments};

/// Whether Enhanced Container Isolation is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// The policy of this module is enforced.
    On,
    /// Everything passes.
    Off,
}

/// Why a request does not pass.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It would bring an engine socket into a container.
    #[error(
        "enhanced container isolation: docker socket mount denied for container with image \"{image}\"; image is not \
         in the allowed list; if you wish to allow it, configure the docker socket image list in the Docker Desktop \
         settings."
    )]
    SocketMount {
        /// The container's image, normalised and without tag.
        image: String,
    },
    /// It would make a volume of an engine socket.
    #[error(
        "enhanced container isolation: docker socket mount denied for volume \"{name}\"; a volume can't lead to an \
         engine socket"
    )]
    SocketVolume {
        /// The volume's name; empty when the engine would choose it.
        name: String,
    },
    /// The socket of the container that asks lets other commands pass.
    #[error(
        "enhanced container isolation: docker command \"{0}\" is blocked; if you wish to allow it, configure the docker \
         socket command list in the Docker Desktop settings."
    )]
    Command(String),
    /// `docker load`.
    #[error("docker load is blocked by the administrator (blockDockerLoad)")]
    Load,
    /// The body can't be read with certainty.
    #[error("the request's JSON is not valid: {0}")]
    Malformed(String),
}

impl Refusal {
    /// No socket for a container of this image.
    pub fn socket(image: &str) -> Self {
        let image = if image.is_empty() { String::new() } else { normalise_image(image) };
        Self::SocketMount { image }
    }
}

/// A request that may go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The body to pass on.
    pub body: Bytes,
    /// The container that would have the engine's socket.
    pub socket: Option<SocketRequest>,
}

/// A kind of request that is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inspection {
    /// `POST /containers/create`.
    Container,
    /// `POST /volumes/create`.
    Volume,
    /// `POST /services/create` and `/services/{id}/update`.
    Service,
}

/// Whether a request with this path creates a container.
pub fn is_container_create(segments: &[String]) -> bool {
    matches!(segments, [first, second] if first == "containers" && second == "create")
}

impl Inspection {
    /// What a request with this path, taken apart by [`segments`], is looked at for. The method does not matter: to
    /// look at too many is harmless.
    pub fn of(isolation: Isolation, segments: &[String]) -> Option<Self> {
        if isolation == Isolation::Off {
            return None;
        }
        match segments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            _ if is_container_create(segments) => Some(Self::Container),
            ["volumes", "create"] => Some(Self::Volume),
            ["services", "create"] | ["services", _, "update"] => Some(Self::Service),
            _ => None,
        }
    }

    /// What becomes of a request with this body.
    pub fn judge(self, body: Bytes) -> Result<Verified, Refusal> {
        if body.iter().all(u8::is_ascii_whitespace) {
            // Nothing to create; the engine says so better.
            return Ok(Verified { body, socket: None });
        }
        match self {
            Self::Container => {
                bodies::container(&body).map(|(text, socket)| Verified { body: Bytes::from(text), socket })
            }
            Self::Volume => bodies::volume(&body).map(|()| Verified { body, socket: None }),
            Self::Service => bodies::service(&body).map(|()| Verified { body, socket: None }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn create_is_recognised_in_every_spelling_that_reaches_the_same_handler() {
        for path in [
            "/containers/create",
            "/v1.45/containers/create",
            "/v1.24/containers/create",
            "/v99/containers/%63reate",
            "//containers///create/",
            "/containers/./x/../create",
            "/v1.45/%63%6fntainers/create",
        ] {
            assert_eq!(Inspection::of(Isolation::On, &segments(path)), Some(Inspection::Container), "{path}");
        }
    }

    #[test]
    fn other_requests_are_not_buffered() {
        for path in
            ["/_ping", "/v1.45/containers/json", "/build", "/containers/create/start", "/images/create", "*", ""]
        {
            assert_eq!(Inspection::of(Isolation::On, &segments(path)), None, "{path}");
        }
    }

    #[test]
    fn without_isolation_nothing_is_looked_at() {
        assert_eq!(Inspection::of(Isolation::Off, &segments("/containers/create")), None);
    }
}
