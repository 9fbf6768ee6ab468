//! What the backend and its child `bulkhead net` say to each other.
//!
//! The child inherits one end of a `SOCK_SEQPACKET` socket pair as file descriptor [`bulkhead_ipc::inherited::FD`]. Each packet
//! is one JSON object, at most [`MAX_PACKET`] bytes, with at most one descriptor beside it. The first is
//! [`Command::Setup`] or [`Command::SetupTap`]. The child answers nothing; it ends when the vmm's stream or this socket closes.
//!
//! The backend opens the sockets that listen, because it outlives this process and because a confined process need not
//! be able to.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
};

use bulkhead_protocol::Transport;
use serde::{Deserialize, Serialize};

use bulkhead_ipc::channel::{self, PacketError};

/// Longest packet in bytes.
pub const MAX_PACKET: usize = 4096;

/// The network as its settings make it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// The guest's IPv4 network (`vpnkitCIDR`): its first address, and the length of its prefix in bits.
    pub subnet: (Ipv4Addr, u8),
    /// Whether the guest's names for the host lead to the host's loopback services.
    pub host_loopback: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self { subnet: (Ipv4Addr::new(192, 168, 65, 0), 24), host_loopback: true }
    }
}

/// Backend to network process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Command {
    /// Serve the vhost-user frontend behind the unix stream beside this packet.
    Setup(Setup),
    /// Serve the vhost-user frontend behind the unix stream beside this packet, from a tap device.
    SetupTap,
    /// The tap device beside this packet; follows [`Command::SetupTap`].
    Tap,
    /// The socket beside this packet (TCP: listening, UDP: bound) is published: what arrives goes to the target in the
    /// guest.
    Listen {
        /// Names it in [`Command::Forget`].
        id: u64,
        /// The socket's protocol.
        transport: Transport,
        /// The container's address and port.
        target: SocketAddr,
    },
    /// The published socket is gone, and what came through it ends.
    Forget {
        /// Which.
        id: u64,
    },
}

/// The next command with the descriptor beside it; `None` when the backend is gone. Blocks until there is one.
pub fn receive(socket: &OwnedFd) -> Result<Option<(Command, Option<OwnedFd>)>, PacketError> {
    channel::receive(socket, MAX_PACKET)
}
