//! Listening sockets that outlive the gate, because init stores them (`FDSTORE` of sd_notify(3)).
//!
//! A container's bind mount refers to the inode of its socket. A new socket at the same path is another inode, so a
//! restarted gate has to continue with the very same socket, or the container never reaches the engine again.

use std::os::fd::{BorrowedFd, OwnedFd};

use bulkhead_guest_common::notify;

/// Takes the sockets that an earlier gate left, by name. Call it once, before anything else opens descriptors.
pub fn inherited() -> Vec<(String, OwnedFd)> {
    notify::inherited(bulkhead_protocol::KEPT_SOCKETS)
}

/// Stores a socket under a name, in place of an earlier one of that name.
pub(crate) fn store(name: &str, fd: BorrowedFd<'_>) {
    // Not fatal: the socket works for as long as this gate lives.
    if let Err(error) = notify::store(name, fd) {
        eprintln!("cannot store the socket {name}, so it ends with this gate: {error}");
    }
}

/// Removes a socket from the store.
pub(crate) fn remove(name: &str) {
    if let Err(error) = notify::remove(name) {
        eprintln!("cannot remove the socket {name} from the store: {error}");
    }
}
