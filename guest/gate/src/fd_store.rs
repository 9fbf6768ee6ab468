//! Listening sockets that outlive the gate, because whoever started it keeps them (`FDSTORE` of sd_notify(3)).
//!
//! A socket that a container has mounted is the one with which it was made: another at the same path is not it.

use std::{
    io,
    mem::size_of,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::net::UnixDatagram,
    },
};

/// The sockets that an earlier gate left, by name. To be called once, before anything else opens descriptors.
pub fn inherited() -> Vec<(String, OwnedFd)> {
    let kept = std::env::var(bulkhead_protocol::KEPT_SOCKETS).unwrap_or_default();
    let owned = |pair: &str| {
        let (name, fd) = pair.split_once('=')?;
        let fd: i32 = fd.parse().ok().filter(|fd| *fd > 2)?;
        // SAFETY: fcntl(2) with F_SETFD takes no pointers; it fails for what is no open descriptor.
        let open = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == 0;
        // SAFETY: it is open, and was handed down for this process alone, which asks once.
        open.then(|| (name.to_owned(), unsafe { OwnedFd::from_raw_fd(fd) }))
    };
    kept.split(',').filter_map(owned).collect()
}

fn notify(text: &str, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let socket = UnixDatagram::unbound()?;
    socket.connect(path)?;
    let mut part = libc::iovec { iov_base: text.as_ptr().cast_mut().cast(), iov_len: text.len() };
    // Aligned as a control message has to be, and large enough for one with a descriptor.
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

/// Has a socket kept under a name; without anybody who keeps it, it ends with the gate.
pub(crate) fn keep(name: &str, fd: BorrowedFd<'_>) {
    if let Err(error) = notify(&format!("FDSTORE=1\nFDNAME={name}"), Some(fd)) {
        eprintln!("the socket {name} will not outlive the gate: {error}");
    }
}

/// Has it kept no more.
pub(crate) fn release(name: &str) {
    if let Err(error) = notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None) {
        eprintln!("the socket {name} is kept on: {error}");
    }
}
