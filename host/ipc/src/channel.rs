//! Packets from the backend to its children: one JSON object each, with at most one descriptor beside it, over a
//! `SOCK_SEQPACKET` socket.

use std::{
    io::{self, IoSliceMut},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use nix::{
    errno::Errno,
    sys::socket::{CmsgIterator, ControlMessageOwned, MsgFlags, recvmsg},
};
use serde::de::DeserializeOwned;

/// Why a packet could not be received.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The socket failed.
    #[error("cannot receive a packet")]
    Socket(#[source] io::Error),
    /// It is too long.
    #[error("packet is longer than {0} bytes")]
    TooLong(usize),
    /// It is not the expected JSON.
    #[error("invalid packet: unknown command")]
    Syntax(#[from] serde_json::Error),
}

/// The next packet of at most `max_len` bytes with its descriptor; `None` when the other end is closed. Blocks until
/// there is one.
pub fn receive<T: DeserializeOwned>(
    socket: &OwnedFd,
    max_len: usize,
) -> Result<Option<(T, Option<OwnedFd>)>, PacketError> {
    let mut packet = vec![0; max_len];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let (len, truncated, descriptor) = loop {
        let mut parts = [IoSliceMut::new(&mut packet)];
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Ok(message) => {
                let truncated = message.flags.contains(MsgFlags::MSG_TRUNC);
                break (message.bytes, truncated, descriptor(message.cmsgs()));
            }
            Err(Errno::EINTR) => {}
            Err(Errno::ECONNRESET) => return Ok(None),
            Err(errno) => return Err(PacketError::Socket(errno.into())),
        }
    };
    match len {
        _ if truncated => Err(PacketError::TooLong(max_len)),
        0 => Ok(None),
        len => Ok(Some((serde_json::from_slice(&packet[..len])?, descriptor))),
    }
}

fn descriptor(messages: nix::Result<CmsgIterator<'_>>) -> Option<OwnedFd> {
    let mut taken = None;
    for message in messages.ok()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            for number in numbers {
                // SAFETY: the kernel has just installed this descriptor for us; nobody else owns it. A surplus one
                // is closed by the assignment that replaces it.
                taken = Some(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
    }
    taken
}
