//! Messages from the backend to its child `bulkhead net`.
//!
//! The child inherits one end of a `SOCK_SEQPACKET` socket pair as file descriptor [`bulkhead_ipc::inherited::FD`].
//! Each packet is one JSON object of at most [`MAX_PACKET`] bytes, with at most one descriptor beside it. The first is
//! [`Command::Setup`] or [`Command::SetupTap`]. The child sends nothing back; it ends when the vmm's stream or this
//! socket closes.
//!
//! The backend opens the listening sockets of published ports: it outlives this process, so the ports stay open while a
//! new one starts, and a confined process needs no right to listen.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
};

use bulkhead_protocol::Transport;
use serde::{Deserialize, Serialize};

use bulkhead_ipc::channel::{self, PacketError};

/// Longest packet in bytes.
pub const MAX_PACKET: usize = 4096;

/// Settings of the network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// The guest's IPv4 network (`vpnkitCIDR`): its first address, and the length of its prefix in bits.
    pub subnet: (Ipv4Addr, u8),
    /// The guest's names for the host lead to services on the host's loopback.
    pub host_loopback: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self { subnet: (Ipv4Addr::new(192, 168, 65, 0), 24), host_loopback: true }
    }
}

/// A command of the backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Command {
    /// Serves the vhost-user frontend behind the unix stream beside this packet.
    Setup(Setup),
    /// Serves the vhost-user frontend behind the unix stream beside this packet, from a tap device.
    SetupTap,
    /// The tap device beside this packet; follows [`Command::SetupTap`].
    Tap,
    /// Publishes the socket beside this packet (TCP: listening, UDP: bound): its connections and datagrams go to the
    /// target in the guest.
    Listen {
        /// Number of the published socket, chosen by the backend.
        id: u64,
        /// The socket's protocol.
        transport: Transport,
        /// The container's address and port.
        target: SocketAddr,
    },
    /// Closes a published socket, and ends what came through it.
    Forget {
        /// Number of the published socket.
        id: u64,
    },
}

/// Receives the next command with the descriptor beside it; `None` when the backend is gone. Blocks until there is one.
pub fn receive(socket: &OwnedFd) -> Result<Option<(Command, Option<OwnedFd>)>, PacketError> {
    channel::receive(socket, &mut vec![0; MAX_PACKET])
}
