//! Messages between the backend on the host and the agent in the guest, and between programs of the guest.
//!
//! # The agent connection
//!
//! An `AF_VSOCK` stream. The agent connects to CID 2 (the host), port [`AGENT_PORT`], so that readiness is pushed and
//! nothing polls. It connects from port [`AGENT_SOURCE_PORT`]: the host accepts connections from reserved ports only,
//! which need `CAP_NET_BIND_SERVICE` in the guest's first user namespace, so that an isolated container cannot pose as
//! the agent.
//!
//! Each side sends one JSON object a line ([`encode`]), at most [`MAX_LINE`] bytes. In order:
//!
//! 1. The agent sends [`GuestMessage::Hello`] with its [`PROTOCOL_VERSION`]; the backend refuses any other version than
//!    its own.
//! 2. The backend answers with [`HostMessage::Certificates`], none or several, perhaps [`HostMessage::TimeZone`], and
//!    [`HostMessage::Configure`]. The agent also accepts [`HostMessage::Shutdown`] in their place.
//! 3. Both send whatever happens: stages ([`GuestMessage::Reached`]), failures, published ports, diagnostics, the
//!    host's time.
//! 4. [`HostMessage::Shutdown`], [`GuestMessage::Goodbye`], end of the connection.
//!
//! # The host's sockets
//!
//! For each connection of a container to a socket of the host the agent sends [`GuestMessage::ConnectSocket`]. The
//! backend connects to the socket and has the vsock device connect that stream to the guest's port of the socket
//! ([`FIRST_HOST_SOCKET_PORT`]), or answers [`HostMessage::SocketRefused`]. Connections to one socket are alike, so the
//! agent gives the streams to the containers in the order in which those connected.
//!
//! The guest is not trusted. Every line has a maximum length, so that a peer cannot make the reader hold more
//! ([`LineReader`], and its asynchronous counterpart in the backend); the backend also shortens and cleans each text
//! that it shows. The guest trusts the backend.
//!
//! A change that the other side would misread needs a new [`PROTOCOL_VERSION`]; a new field that has a default
//! (`#[serde(default)]`) does not.
//!
//! # In the guest
//!
//! Programs of the guest use [`PORTS_SOCKET`] (port processes and init), [`GRANTS_SOCKET`] (runtime and gate),
//! [`RUNTIME_SOCKET`] (runtime and init), and the environment variables below (init to the gate). They are part of one
//! image, so they need no version.

pub mod daemon_options;
pub mod gate;
mod line;
mod message;
mod ports;
mod sockets;

pub use line::{LineError, LineReader, encode};
pub use message::{
    Configuration, Description, Failure, GuestMessage, GuestThread, Hello, HostMessage, HostSocket, Network, Network6,
    PortMapping, Share, ShutdownMode, Stage, TimeZone, Transport,
};
pub use ports::{MAX_PORT_PACKET, PORTS_SOCKET, PortAnswer};
pub use sockets::{
    CRUN_STATE, ENGINE_SOCKET, GRANTED, GRANTS_SOCKET, MAX_GRANT, RUNTIME_SOCKET, RUNTIME_TREES, SOCKETS_DIRECTORY,
    SocketCommands, SocketExceptions, container_socket, is_container_id,
};

/// vsock port of the *host* (CID 2) to which the agent connects.
pub const AGENT_PORT: u32 = 1025;

/// vsock port of the guest from which the agent connects; reserved (below 1024).
pub const AGENT_SOURCE_PORT: u32 = 1022;

/// vsock port of the *guest* on which the gate serves the Docker API; reserved (below 1024), so that an isolated
/// container cannot take the gate's place while it restarts.
pub const DOCKER_PORT: u32 = 1023;

/// Version of this protocol; both sides must agree exactly.
pub const PROTOCOL_VERSION: u32 = 9;

/// Longest line in bytes, line feed included.
pub const MAX_LINE: usize = 64 * 1024;

/// Maximum of all certificates together, in bytes of PEM.
pub const MAX_CERTIFICATES: usize = 2 << 20;

/// Maximum of a time zone's rules in bytes; those of the tz database have less than 4000.
pub const MAX_TIME_ZONE: usize = 8 << 10;

/// Maximum number of shares.
pub const MAX_SHARES: usize = 64;

/// Maximum number of sockets of the host that containers may mount.
pub const MAX_HOST_SOCKETS: usize = 64;

/// Maximum number of connections to sockets of the host at once, of all containers together.
pub const MAX_HOST_CONNECTIONS: usize = 128;

/// vsock port of the *guest* on which it takes the connections to the first of the host's sockets; those of the others
/// follow. Reserved (below 1024), so that an isolated container cannot take them in the agent's place.
pub const FIRST_HOST_SOCKET_PORT: u32 = 512;

/// Tag of the virtio-fs device that has the shares (virtio 1.3, 5.11.4). A share is in its file system under the path
/// that it has on the host.
pub const SHARES_TAG: &str = "bulkhead";

/// Environment variable in which init lists the sockets that the gate has stored with it (`FDSTORE=1` of sd_notify(3)),
/// as `NAME=DESCRIPTOR` with commas between.
pub const KEPT_SOCKETS: &str = "BULKHEAD_KEPT_SOCKETS";
