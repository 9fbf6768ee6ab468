//! Messages with descriptors, and the system calls of the jail that have no safe wrapper.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use super::MAX_PACKET;
use bulkhead_guest_common::mount;
use nix::{
    cmsg_space,
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
};

/// Maximum of descriptors in a message.
const MAX_DESCRIPTORS: usize = 4;

/// A message and the descriptors that came with it; no bytes mean that the other end is closed.
#[derive(Debug)]
pub(super) struct Packet {
    pub(super) bytes: Vec<u8>,
    pub(super) descriptors: Vec<OwnedFd>,
}

/// Sends one message.
pub(super) fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[RawFd]) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(descriptors)];
    let rights = if descriptors.is_empty() { &[] } else { &rights[..] };
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Waits for one message.
pub(super) fn receive(socket: BorrowedFd<'_>) -> io::Result<Packet> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut control = cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
            Err(nix::Error::EINTR) => {}
            received => break received?,
        }
    };
    let (length, truncated) = (message.bytes, message.flags.contains(MsgFlags::MSG_TRUNC));
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            for fd in raw {
                // SAFETY: the kernel has just made this descriptor for this process, and nothing else has its number.
                descriptors.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    if truncated {
        return Err(io::ErrorKind::InvalidData.into());
    }
    bytes.truncate(length);
    Ok(Packet { bytes, descriptors })
}

/// Sets attributes (`MOUNT_ATTR_*`) and the propagation of all mounts of a tree; 0 leaves the propagation.
pub(crate) fn set_attributes(mount: impl AsFd, set: u64, propagation: u64) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation, userns_fd: 0 };
    mount::set_attributes(mount, attributes, true)
}

/// Moves this process, which has one thread, into a new mount namespace.
pub(super) fn unshare_mounts() -> io::Result<()> {
    Ok(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?)
}

/// Forks a sibling of this process: a child of its parent, which alone can wait for it. Returns 0 in the new process.
pub(super) fn fork_sibling() -> io::Result<i32> {
    let flags = libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: a null stack means that the new process runs on a copy of ours, as after fork(2); there is one thread, so
    // no lock is held by another.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid as i32) }
}

/// Ends this process without running anything of its parent's.
pub(super) fn end_at_once() -> ! {
    // SAFETY: takes an integer and does not return.
    unsafe { libc::_exit(127) }
}
