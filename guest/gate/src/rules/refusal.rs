//! Reasons for which the gate refuses a request.

use super::image_name::normalise;

/// The reason for which a request does not pass. The text is the one that docker shows; scripts look for Docker's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// An engine socket would get into a container; Docker's own text.
    #[error(
        "enhanced container isolation: docker socket mount denied for container with image \"{image}\"; image is not \
         in the allowed list; if you wish to allow it, configure the docker socket image list in the Docker Desktop \
         settings."
    )]
    SocketMount {
        /// The container's image, normalised and without tag.
        image: String,
    },
    /// A volume would lead to an engine socket.
    #[error(
        "enhanced container isolation: docker socket mount denied for volume \"{name}\"; a volume can't lead to an \
         engine socket"
    )]
    SocketVolume {
        /// The volume's name; empty if dockerd would choose it.
        name: String,
    },
    /// The list of commands does not allow this path and query from a container's socket; Docker's own text.
    #[error(
        "enhanced container isolation: docker command \"{0}\" is blocked; if you wish to allow it, configure the docker \
         socket command list in the Docker Desktop settings."
    )]
    Command(String),
    /// `docker load` is blocked.
    #[error("docker load is blocked by the administrator (blockDockerLoad)")]
    Load,
    /// The body is not JSON that can be read in exactly one way.
    #[error("invalid JSON in the request: {0}")]
    Malformed(String),
}

impl Refusal {
    /// Refuses the socket to a container of this image, named as the client named it.
    pub fn socket(image: &str) -> Self {
        let image = if image.is_empty() { String::new() } else { normalise(image) };
        Self::SocketMount { image }
    }
}
