//! The engine's socket in containers: the images that may have it, the allowed commands, and the runtime's way to it.
//!
//! The runtime connects to the unix stream socket [`GRANTS_SOCKET`], writes a container's full id and a line feed, and
//! reads the answer up to the end of the stream. [`GRANTED`] means that the container's own socket is at
//! [`container_socket`]; anything else is the reason why it has none.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The path under which containers ask for the engine's socket. In the VM it is an empty file: each container that may
/// have the socket gets one of its own instead.
pub const ENGINE_SOCKET: &str = "/run/docker.sock";

/// Path of the gate's socket for the runtime. Only root of the VM can enter its directory.
pub const GRANTS_SOCKET: &str = "/run/bulkhead/sockets/grants.sock";

/// Directory of [`GRANTS_SOCKET`] and of the containers' sockets ([`container_socket`]).
pub const SOCKETS_DIRECTORY: &str = "/run/bulkhead/sockets";

/// Path of init's socket for the runtime in the engine's jail; outside of it nothing is there.
///
/// A process that executes the runtime's file gets one packet of one byte, with a mount for each of [`RUNTIME_TREES`];
/// for any other the connection is closed.
pub const RUNTIME_SOCKET: &str = "/run/bulkhead/runtime.sock";

/// The directory of crun's state, by which it knows its containers, their cgroups and their hooks.
pub const CRUN_STATE: &str = "/run/crun";

/// The directories that the runtime gets from init, in this order.
pub const RUNTIME_TREES: [&str; 5] = ["/run/sysbox-runc", CRUN_STATE, SOCKETS_DIRECTORY, "/proc", "/sys"];

/// The answer for a container that has a socket.
pub const GRANTED: &str = "granted";

/// Longest answer in bytes.
pub const MAX_GRANT: u64 = 4096;

/// Returns the path of a container's own socket. `id` must be a container's id ([`is_container_id`]).
pub fn container_socket(id: &str) -> PathBuf {
    PathBuf::from(SOCKETS_DIRECTORY).join("containers").join(id)
}

/// Returns whether the text is a container's full id: 64 lower-case hexadecimal digits, so that it is safe in a path.
pub fn is_container_id(id: &str) -> bool {
    // No upper case: a file system would take two spellings of one id for two containers.
    id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// The images whose containers may have the engine's socket; none by default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketExceptions {
    /// Images: `name[:tag]`, `name@sha256:…`, `sha256:…` of a local image, or `*` for all.
    #[serde(default)]
    pub images: Vec<String>,
    /// Local images that were built from these images may have it as well.
    #[serde(default)]
    pub derived: bool,
    /// Restricts the commands through the socket; `None` allows every command.
    #[serde(default)]
    pub commands: Option<SocketCommands>,
}

/// A list of docker commands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketCommands {
    /// True when only these commands are allowed, false when these are refused and all others are allowed.
    pub allow: bool,
    /// Names as in `docker --help`, or groups such as `image*`.
    pub commands: Vec<String>,
}
