//! What the backend on the host and the agent in the guest say to each other.
//!
//! The agent connects *out* to the host, so that readiness is pushed and nobody polls: an `AF_VSOCK` stream
//! to CID 2, port [`AGENT_PORT`]. On it each side sends one JSON object a line, at most [`MAX_LINE`] bytes.
//! The agent speaks first ([`GuestMessage::Hello`]); the backend answers with [`HostMessage::Configure`].
//! The guest is not trusted: the backend reads with [`LineReader`], which bounds what a peer can make it hold.

mod line;
mod message;
mod ports;

pub use line::{LineError, LineReader, encode};
pub use message::{
    Configuration, Failure, GuestMessage, Hello, HostMessage, Network, Network6, PortMapping, ShutdownMode, Stage,
    Transport,
};
pub use ports::{MAX_PORT_PACKET, PORTS_SOCKET, PortAnswer};

/// vsock port on the *host* (CID 2) that the agent connects to.
pub const AGENT_PORT: u32 = 1025;

/// vsock port in the *guest* on which the gate serves the Docker API.
pub const DOCKER_PORT: u32 = 1024;

/// Version of this protocol; both sides must agree exactly.
pub const PROTOCOL_VERSION: u32 = 3;

/// Longest accepted line in bytes, terminator included.
pub const MAX_LINE: usize = 64 * 1024;
