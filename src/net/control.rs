//! What the backend and its child `bulkhead net` say to each other.
//!
//! The child inherits one end of a `SOCK_SEQPACKET` socket pair as file descriptor [`crate::inherited::FD`]. Each packet
//! is one JSON object, at most [`MAX_PACKET`] bytes, with at most one descriptor beside it. The first is
//! [`Command::Setup`] or [`Command::SetupTap`]. The child answers nothing; it ends when the vmm's stream or this socket closes.
//!
//! The backend opens the sockets that listen, because it outlives this process and because a confined process need not
//! be able to.

use std::{
    io::{self, IoSliceMut},
    net::{Ipv4Addr, SocketAddr},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use bulkhead_protocol::Transport;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use serde::{Deserialize, Serialize};

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

/// Why a packet could not be received.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The socket failed.
    #[error("a packet cannot be received")]
    Socket(#[source] io::Error),
    /// It is too long.
    #[error("a packet has more than {MAX_PACKET} bytes")]
    TooLong,
    /// It is not the expected JSON.
    #[error("a packet is no command")]
    Syntax(#[from] serde_json::Error),
}

/// The next packet with its descriptor; `None` when the other end is closed. Blocks until there is one.
pub(crate) fn receive(socket: &OwnedFd) -> Result<Option<(Command, Option<OwnedFd>)>, ControlError> {
    let mut buffer = [0; MAX_PACKET];
    let mut control = nix::cmsg_space!([libc::c_int; 1]);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)
        .map_err(|errno| ControlError::Socket(errno.into()))?;
    let mut descriptor = None;
    for one in message.cmsgs().into_iter().flatten() {
        if let ControlMessageOwned::ScmRights(numbers) = one {
            for number in numbers {
                // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
                descriptor = Some(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
    }
    let (len, cut) = (message.bytes, message.flags.contains(MsgFlags::MSG_TRUNC));
    match len {
        _ if cut => Err(ControlError::TooLong),
        0 => Ok(None),
        len => Ok(Some((serde_json::from_slice(&buffer[..len])?, descriptor))),
    }
}
