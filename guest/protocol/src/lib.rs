//! What the backend on the host and the agent in the guest say to each other.
//!
//! The agent connects *out* to the host, so that readiness is pushed and nobody polls: an `AF_VSOCK` stream
//! to CID 2, port [`AGENT_PORT`]. On it each side sends one JSON object a line, at most [`MAX_LINE`] bytes.
//! It comes from port [`AGENT_SOURCE_PORT`]: the host takes connections from reserved ports only, which need
//! `CAP_NET_BIND_SERVICE` in the guest's first user namespace, so that no isolated container can be one.
//! The agent speaks first ([`GuestMessage::Hello`]); the backend answers with [`HostMessage::Configure`].
//! The guest is not trusted: the backend reads with [`LineReader`], which bounds what a peer can make it hold.

pub mod gate;
mod line;
mod message;
mod ports;
mod sockets;

pub use line::{LineError, LineReader, encode};
pub use message::{
    Configuration, Description, Failure, GuestMessage, GuestThread, Hello, HostMessage, Network, Network6, PortMapping,
    ShutdownMode, Stage, Transport,
};
pub use ports::{MAX_PORT_PACKET, PORTS_SOCKET, PortAnswer};
pub use sockets::{
    ENGINE_SOCKET, GRANTED, GRANTS_SOCKET, MAX_GRANT, SocketCommands, SocketExceptions, container_socket,
    is_container_id,
};

/// vsock port on the *host* (CID 2) that the agent connects to.
pub const AGENT_PORT: u32 = 1025;

/// vsock port in the guest that the agent connects from.
pub const AGENT_SOURCE_PORT: u32 = 1022;

/// vsock port in the *guest* on which the gate serves the Docker API; reserved, so that nobody in an isolated container
/// can take the gate's place while it is away.
pub const DOCKER_PORT: u32 = 1023;

/// Version of this protocol; both sides must agree exactly.
pub const PROTOCOL_VERSION: u32 = 6;

/// Longest accepted line in bytes, terminator included.
pub const MAX_LINE: usize = 64 * 1024;

/// Most bytes of certificates in PEM.
pub const MAX_CERTIFICATES: usize = 2 << 20;

/// Variable in which init tells the gate the sockets that it has kept for it: `NAME=DESCRIPTOR`, with commas between.
pub const KEPT_SOCKETS: &str = "BULKHEAD_KEPT_SOCKETS";
