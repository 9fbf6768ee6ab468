//! Listening sockets that outlive the gate, because whoever started it keeps them (`FDSTORE` of sd_notify(3)).
//!
//! A socket that a container has mounted is the one with which it was made: another at the same path is not it.

use std::os::fd::{BorrowedFd, OwnedFd};

use bulkhead_guest_common::notify;

/// The sockets that an earlier gate left, by name. To be called once, before anything else opens descriptors.
pub fn inherited() -> Vec<(String, OwnedFd)> {
    notify::inherited(bulkhead_protocol::KEPT_SOCKETS)
}

/// Has a socket kept under a name; without anybody who keeps it, it ends with the gate.
pub(crate) fn keep(name: &str, fd: BorrowedFd<'_>) {
    if let Err(error) = notify::store(name, fd) {
        eprintln!("the socket {name} will not outlive the gate: {error}");
    }
}

/// Has it kept no more.
pub(crate) fn release(name: &str) {
    if let Err(error) = notify::remove(name) {
        eprintln!("the socket {name} is kept on: {error}");
    }
}
