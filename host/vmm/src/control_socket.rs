//! The vmm's end of the control socket.

use std::{
    io::IoSlice,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::sys::socket::{MsgFlags, SockType};

use super::{
    api::{Command, Event, MAX_PACKET},
    error::VmmError,
};
use bulkhead_ipc::{channel, inherited};

/// The socket.
pub(super) struct ControlSocket(OwnedFd);

impl ControlSocket {
    /// Takes the inherited descriptor, if it is what the backend hands over.
    pub(super) fn inherited() -> Result<Self, VmmError> {
        inherited::socket(SockType::SeqPacket).map(Self).ok_or(VmmError::NoControlSocket(inherited::FD))
    }

    /// The next command with the descriptor beside it; `None` when the backend is gone.
    pub(super) fn receive(&self) -> Result<Option<(Command, Option<OwnedFd>)>, VmmError> {
        Ok(channel::receive(&self.0, MAX_PACKET)?)
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

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
