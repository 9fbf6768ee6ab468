//! The way of this program into its own directories.
//!
//! dockerd and containerd are in a jail, a mount namespace of init's, and this program is started there. What it needs
//! besides is not in view of the engine: the table of id ranges, the tree of containers' files, crun's state, the gate's
//! sockets, and `/proc` and `/sys` without mounts of the jail on them. init hands out these mounts to processes that execute this
//! program's file, and this process mounts them in a namespace of its own, which crun inherits.
//!
//! Outside of the jail everything is in its place already.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    time::Duration,
};

use bulkhead_protocol::{RUNTIME_SOCKET, RUNTIME_TREES};
use rustix::{
    mount::MountPropagationFlags,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg},
};

use crate::{mount_fd, sys};

/// Limit for init's answer, which it gives at once.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Mounts this program's directories, and returns true if it runs in the jail.
pub(crate) fn enter() -> io::Result<bool> {
    // The jail's `/run` is read-only: nothing of the engine's can remove the socket, or appear in the place of the table.
    if !Path::new(RUNTIME_SOCKET).exists() {
        return Ok(false);
    }
    let mounts = receive(&UnixStream::connect(RUNTIME_SOCKET)?)?;
    sys::unshare_mounts()?;
    // Slave before the first mount: in a shared tree it would appear in the jail.
    rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    for (mount, path) in mounts.into_iter().zip(RUNTIME_TREES) {
        mount_fd::attach(mount, Path::new(path))?;
    }
    Ok(true)
}

/// Receives one mount for each of [`RUNTIME_TREES`], in its order.
fn receive(init: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    init.set_read_timeout(Some(TIMEOUT))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(RUNTIME_TREES.len()))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC;
    rustix::io::retry_on_intr(|| recvmsg(init, &mut [IoSliceMut::new(&mut byte)], &mut rights, flags))?;
    let mut mounts = Vec::new();
    for message in rights.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            mounts.extend(descriptors);
        }
    }
    // Fewer than all would leave a directory of the jail in the place of one of this program's.
    if mounts.len() == RUNTIME_TREES.len() { Ok(mounts) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

#[cfg(test)]
mod tests {
    use std::{
        io::IoSlice,
        os::fd::{AsFd, BorrowedFd},
    };

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    fn answer(descriptors: &[BorrowedFd<'_>]) -> io::Result<Vec<OwnedFd>> {
        let (init, runtime) = UnixStream::pair().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(rights.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        sendmsg(&init, &[IoSlice::new(&[0])], &mut rights, SendFlags::empty()).unwrap();
        receive(&runtime)
    }

    #[test]
    fn only_a_whole_answer_counts() {
        let file = std::fs::File::open("/proc/self/status").unwrap();
        let file = file.as_fd();
        assert_eq!(answer(&vec![file; RUNTIME_TREES.len()]).unwrap().len(), RUNTIME_TREES.len());
        for count in [0, 1, RUNTIME_TREES.len() - 1] {
            assert!(answer(&vec![file; count]).is_err());
        }
    }

    #[test]
    fn an_init_that_refuses_gives_an_error() {
        let (init, runtime) = UnixStream::pair().unwrap();
        drop(init);
        assert!(receive(&runtime).is_err());
    }
}
