//! What the process of a published port and init say to each other in the guest.
//!
//! A `SOCK_SEQPACKET` unix socket at [`PORTS_SOCKET`]. The process sends one packet with a [`crate::PortMapping`], init
//! answers with one [`PortAnswer`]. From then on the connection is the mapping: when it ends, so does the mapping.

use serde::{Deserialize, Serialize};

/// Where init listens; only the guest's own root enters the folder.
pub const PORTS_SOCKET: &str = "/run/bulkhead/ports.sock";

/// Longest packet in bytes.
pub const MAX_PORT_PACKET: usize = 4096;

/// Whether the host listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortAnswer {
    /// Why not, for the person who published the port.
    pub error: Option<String>,
}
