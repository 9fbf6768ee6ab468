//! The vmm's end of the control socket.

use std::{
    cell::RefCell,
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
pub(super) struct ControlSocket {
    socket: OwnedFd,
    /// The place for the next packet.
    buffer: RefCell<Vec<u8>>,
}

impl From<OwnedFd> for ControlSocket {
    fn from(socket: OwnedFd) -> Self {
        Self { socket, buffer: RefCell::new(vec![0; MAX_PACKET]) }
    }
}

impl ControlSocket {
    /// Takes the inherited descriptor; an error if the process was not started by a backend.
    pub(super) fn inherited() -> Result<Self, VmmError> {
        inherited::socket(SockType::SeqPacket).map(Self::from).ok_or(VmmError::NoControlSocket(inherited::FD))
    }

    /// Returns another descriptor of the socket, for [`send_now`].
    pub(super) fn try_clone_fd(&self) -> std::io::Result<OwnedFd> {
        self.socket.try_clone()
    }

    /// Waits for the next command and its descriptor; `None` when the backend is gone.
    pub(super) fn receive(&self) -> Result<Option<(Command, Option<OwnedFd>)>, VmmError> {
        Ok(channel::receive(&self.socket, &mut self.buffer.borrow_mut())?)
    }

    /// Sends an event. An error is ignored: [`Self::receive`] finds out that the backend is gone.
    pub(super) fn send(&self, event: &Event) {
        // May block while the backend is busy: nothing but this thread waits for it, least of all a vCPU.
        send(&self.socket, event, MsgFlags::empty());
    }
}

/// Sends an event from any thread, unless the backend is so busy that the sender would have to wait.
pub(super) fn send_now(socket: &OwnedFd, event: &Event) {
    send(socket, event, MsgFlags::MSG_DONTWAIT);
}

fn send(socket: &OwnedFd, event: &Event, flags: MsgFlags) {
    if let Ok(packet) = serde_json::to_vec(event) {
        let flags = MsgFlags::MSG_NOSIGNAL | flags;
        let _ = nix::sys::socket::sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&packet)], &[], flags, None);
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
