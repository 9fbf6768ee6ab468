//! Listening sockets that outlive the gate, because init stores them (`FDSTORE` of sd_notify(3)).
//!
//! A container's bind mount refers to the inode of its socket. A new socket at the same path is another inode, so a
//! restarted gate has to continue with the very same socket, or the container never reaches the engine again.

use std::{
    io,
    mem::size_of,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::net::UnixDatagram,
    },
};

/// Takes the sockets that an earlier gate left, by name. Call it once, before anything else opens descriptors.
pub fn inherited() -> Vec<(String, OwnedFd)> {
    let kept = std::env::var(bulkhead_protocol::KEPT_SOCKETS).unwrap_or_default();
    let owned = |pair: &str| {
        let (name, fd) = pair.split_once('=')?;
        // Standard streams have owners already.
        let fd: i32 = fd.parse().ok().filter(|fd| *fd > 2)?;
        // Set again here, because init had to clear it for the exec: programs that the gate starts get no sockets.
        // SAFETY: fcntl(2) with F_SETFD takes no pointers; it fails for a number that is not an open descriptor.
        let open = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == 0;
        // SAFETY: it is open, and init handed it down for this process alone, which takes it once.
        open.then(|| (name.to_owned(), unsafe { OwnedFd::from_raw_fd(fd) }))
    };
    kept.split(',').filter_map(owned).collect()
}

/// Sends a datagram of sd_notify(3), with at most one descriptor.
fn notify(text: &str, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    // Without an init (in tests) nothing is stored.
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let socket = UnixDatagram::unbound()?;
    socket.connect(path)?;
    let mut part = libc::iovec { iov_base: text.as_ptr().cast_mut().cast(), iov_len: text.len() };
    // Aligned for a cmsghdr, and large enough for one with a descriptor (24 bytes on x86-64).
    let mut control = [0_u64; 4];
    // SAFETY: all-zero bytes are a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if let Some(fd) = fd {
        let length = size_of::<libc::c_int>() as libc::c_uint;
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: a computation without memory access.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(length) } as usize;
        // SAFETY: the message's control buffer has room for one header and one descriptor, and outlives the calls.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(length) as usize;
            libc::CMSG_DATA(header).cast::<libc::c_int>().write_unaligned(fd.as_raw_fd());
        }
    }
    // SAFETY: the message and all that it points to outlive the call.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Stores a socket under a name, in place of an earlier one of that name.
pub(crate) fn store(name: &str, fd: BorrowedFd<'_>) {
    // Not fatal: the socket works for as long as this gate lives.
    if let Err(error) = notify(&format!("FDSTORE=1\nFDNAME={name}"), Some(fd)) {
        eprintln!("cannot store the socket {name}, so it ends with this gate: {error}");
    }
}

/// Removes a socket from the store.
pub(crate) fn remove(name: &str) {
    if let Err(error) = notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None) {
        eprintln!("cannot remove the socket {name} from the store: {error}");
    }
}
