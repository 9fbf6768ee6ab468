//! The vmm's end of the control socket.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockType, recvmsg};

use super::{
    api::{Command, Event, MAX_PACKET},
    error::VmmError,
};
use crate::inherited;

/// The socket.
pub(super) struct Control(OwnedFd);

impl Control {
    /// Takes the inherited descriptor, if it is what the backend hands over.
    pub(super) fn inherited() -> Result<Self, VmmError> {
        inherited::socket(SockType::SeqPacket).map(Self).ok_or_else(|| {
            let fd = inherited::FD;
            VmmError::Control(format!(
                "descriptor {fd} is no SOCK_SEQPACKET socket; `bulkhead vmm` is started by the backend"
            ))
        })
    }

    /// The next command with the descriptor beside it; `None` when the backend is gone.
    pub(super) fn receive(&self) -> Result<Option<(Command, Option<OwnedFd>)>, VmmError> {
        let mut packet = vec![0; MAX_PACKET];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let (len, fd) = loop {
            let mut iov = [IoSliceMut::new(&mut packet)];
            match recvmsg::<()>(self.0.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
                Ok(message) => break (message.bytes, descriptor(message.cmsgs())),
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::ECONNRESET) => return Ok(None),
                Err(error) => return Err(VmmError::Control(error.to_string())),
            }
        };
        if len == 0 {
            return Ok(None);
        }
        let command = serde_json::from_slice(&packet[..len]).map_err(|error| VmmError::Control(error.to_string()))?;
        Ok(Some((command, fd)))
    }

    /// Sends an event; a backend that is gone is noticed by [`Self::receive`].
    pub(super) fn send(&self, event: &Event) {
        if let Ok(packet) = serde_json::to_vec(event) {
            let _ = nix::sys::socket::sendmsg::<()>(
                self.0.as_raw_fd(),
                &[IoSlice::new(&packet)],
                &[],
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn descriptor(messages: nix::Result<nix::sys::socket::CmsgIterator<'_>>) -> Option<OwnedFd> {
    let mut taken = None;
    for message in messages.ok()? {
        if let ControlMessageOwned::ScmRights(fds) = message {
            for fd in fds {
                // SAFETY: the kernel has just installed this descriptor for us; nobody else owns it. A surplus one
                // is closed by the assignment that replaces it.
                taken = Some(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    taken
}
