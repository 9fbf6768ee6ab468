//! The one descriptor that the backend hands to each of its children.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::socket::{SockType, getsockopt, sockopt},
};

/// The number under which a child finds it.
pub const FD: RawFd = 3;

/// Takes the descriptor, if it is an open socket of this type. To be called once, first of all.
pub fn socket(kind: SockType) -> Option<OwnedFd> {
    // SAFETY: fcntl with F_GETFD takes integers only.
    if unsafe { libc::fcntl(FD, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: the descriptor is open and, by the contract with the backend, ours alone.
    let fd = unsafe { OwnedFd::from_raw_fd(FD) };
    // Our own children, if there ever are any, must not hold it open.
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).ok()?;
    (getsockopt(&fd, sockopt::SockType) == Ok(kind)).then_some(fd)
}
