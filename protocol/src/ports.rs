//! Messages between the process of a published port and init, in the guest.
//!
//! A `SOCK_SEQPACKET` unix socket at [`PORTS_SOCKET`]. The process sends one packet with a [`crate::PortMapping`] in
//! JSON, and init answers with one [`PortAnswer`]. From then on the connection is the mapping: when it ends, so does
//! the mapping.

use serde::{Deserialize, Serialize};

/// Path of init's socket. Only root of the VM can enter its directory.
pub const PORTS_SOCKET: &str = "/run/bulkhead/ports.sock";

/// Longest packet in bytes.
pub const MAX_PORT_PACKET: usize = 4096;

/// The answer to a request for a published port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortAnswer {
    /// The reason for which the host does not listen, for the user who published the port; `None` when it listens.
    pub error: Option<String>,
}
