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

/// The inherited end of the socket pair.
pub(super) struct ControlSocket(OwnedFd);

impl ControlSocket {
    /// Takes the inherited descriptor; an error if the process was not started by a backend.
    pub(super) fn inherited() -> Result<Self, VmmError> {
        inherited::socket(SockType::SeqPacket).map(Self).ok_or(VmmError::NoControlSocket(inherited::FD))
    }

    /// Waits for the next command and its descriptor; `None` when the backend is gone.
    pub(super) fn receive(&self) -> Result<Option<(Command, Option<OwnedFd>)>, VmmError> {
        Ok(channel::receive(&self.0, MAX_PACKET)?)
    }

    /// Sends an event. An error is ignored: [`Self::receive`] finds out that the backend is gone.
    pub(super) fn send(&self, event: &Event) {
        if let Ok(packet) = serde_json::to_vec(event) {
            // May block while the backend is busy: nothing but this thread waits for it, least of all a vCPU.
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
