//! The wish of a container for the engine's socket.

/// A container that would have the engine's socket, and needs a grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketRequest {
    /// The image as the client named it.
    pub image: String,
    /// The container mounts the socket itself; otherwise it could get it from another container (`VolumesFrom`).
    pub explicit: bool,
}
