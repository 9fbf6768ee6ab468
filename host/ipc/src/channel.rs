//! Receives the packets that the backend sends to its children over a `SOCK_SEQPACKET` socket: one JSON object each,
//! with at most one descriptor beside it.

use std::{
    io::{self, IoSliceMut},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    sys::socket::{CmsgIterator, ControlMessageOwned, MsgFlags, recvmsg},
};
use serde::de::DeserializeOwned;

/// An error in receiving a packet.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The socket failed.
    #[error("cannot receive a packet")]
    Socket(#[source] io::Error),
    /// The packet is longer than the receiver accepts.
    #[error("packet is longer than {0} bytes")]
    TooLong(usize),
    /// The packet is not JSON, or not a command of this receiver.
    #[error("invalid packet: unknown command")]
    Syntax(#[from] serde_json::Error),
}

/// Waits for the next packet, at most as long as `buffer`, and returns it with its descriptor; `None` when the other
/// end is closed. A receiver keeps its buffer: clearing a new one for each packet costs more than the packet.
pub fn receive<T: DeserializeOwned>(
    socket: &OwnedFd,
    buffer: &mut [u8],
) -> Result<Option<(T, Option<OwnedFd>)>, PacketError> {
    // Room for one descriptor. The kernel closes those that do not fit (unix(7), SCM_RIGHTS).
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let (len, truncated, descriptor) = loop {
        let mut parts = [IoSliceMut::new(buffer)];
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Ok(message) => {
                // SOCK_SEQPACKET keeps the borders of packets: the rest of one that is too long is lost.
                let truncated = message.flags.contains(MsgFlags::MSG_TRUNC);
                break (message.bytes, truncated, descriptor(message.cmsgs()));
            }
            Err(Errno::EINTR) => {}
            // The other end was closed while packets from here still waited there.
            Err(Errno::ECONNRESET) => return Ok(None),
            Err(errno) => return Err(PacketError::Socket(errno.into())),
        }
    };
    match len {
        // Checked first, so that the error names the cause and not the syntax where the packet was cut.
        _ if truncated => Err(PacketError::TooLong(buffer.len())),
        0 => Ok(None),
        len => Ok(Some((serde_json::from_slice(&buffer[..len])?, descriptor))),
    }
}

fn descriptor(messages: nix::Result<CmsgIterator<'_>>) -> Option<OwnedFd> {
    let mut taken = None;
    for message in messages.ok()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            for number in numbers {
                // SAFETY: the kernel has just installed this descriptor for this process; nothing else owns it. A
                // surplus one is closed by the assignment that replaces it.
                taken = Some(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
    }
    taken
}
