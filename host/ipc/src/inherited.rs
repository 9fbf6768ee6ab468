//! The descriptor that each child of the backend inherits: its end of the control socket.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::socket::{SockType, getsockopt, sockopt},
};

/// The descriptor's number.
pub const FD: RawFd = 3;

/// Takes the descriptor, if it is an open socket of this type. Must be called once, before anything else opens files.
pub fn socket(kind: SockType) -> Option<OwnedFd> {
    // A program started by hand has no such descriptor; checked first, since an `OwnedFd` must be open.
    // SAFETY: fcntl with F_GETFD takes integers only.
    if unsafe { libc::fcntl(FD, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: the descriptor is open and, by the contract with the backend, owned by nothing else in this process.
    let fd = unsafe { OwnedFd::from_raw_fd(FD) };
    // The backend had to leave it open across exec. From here on no further process may inherit it: one that did would
    // keep the socket alive after this process, and the backend would not see its end.
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).ok()?;
    (getsockopt(&fd, sockopt::SockType) == Ok(kind)).then_some(fd)
}
