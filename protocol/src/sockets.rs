//! The engine's socket in containers: who may have it, what may be asked through it, and how the runtime gets it.
//!
//! The runtime connects to [`GRANTS_SOCKET`], writes a container's full id and a line feed, and reads an answer up to
//! the end: [`GRANTED`], when the container's own socket is at [`container_socket`], or else why it has none.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The path under which containers ask for the engine's socket. In the VM it only marks the place: each container is
/// given a socket of its own instead.
pub const ENGINE_SOCKET: &str = "/run/docker.sock";

/// Where the gate answers the runtime; only the guest's own root enters the folder.
pub const GRANTS_SOCKET: &str = "/run/bulkhead/grants.sock";

/// Answer to a container that has a socket.
pub const GRANTED: &str = "granted";

/// Longest answer in bytes.
pub const MAX_GRANT: u64 = 4096;

/// Where a container's own socket is.
pub fn container_socket(id: &str) -> PathBuf {
    PathBuf::from("/run/bulkhead/containers").join(id)
}

/// Whether the text is a container's full id.
pub fn is_container_id(id: &str) -> bool {
    id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// Who may have the engine's socket; nobody by default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketExceptions {
    /// `name[:tag]`, `name@sha256:…`, `sha256:…` of a local image, or `*`.
    #[serde(default)]
    pub images: Vec<String>,
    /// Whether local images built from these may, too.
    #[serde(default)]
    pub derived: bool,
    /// What may be asked; anything without it.
    #[serde(default)]
    pub commands: Option<SocketCommands>,
}

/// Commands of the docker command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketCommands {
    /// Whether these are the only ones that pass, and not the ones that are refused.
    pub allow: bool,
    /// Names as in `docker --help`, and groups such as `image*`.
    pub commands: Vec<String>,
}
