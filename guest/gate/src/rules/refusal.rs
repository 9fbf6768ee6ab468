//! Reasons for which the gate refuses a request.

use super::image_name::normalise;

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
        let image = if image.is_empty() { String::new() } else { normalise(image) };
        Self::SocketMount { image }
    }
}
