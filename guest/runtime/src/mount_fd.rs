//! Files and mounts by descriptor: `O_PATH`, open_tree(2) and move_mount(2).
//!
//! A path is resolved once. Everything after that works on the descriptor, so a link that a container swaps in between
//! changes nothing.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

pub(crate) use bulkhead_guest_common::mount::{attach, clone_tree};
use rustix::{
    fs::{AtFlags, Mode, OFlags, StatVfsMountFlags, StatxFlags},
    mount::MoveMountFlags,
};

use crate::sys::Restrictions;

/// Opens a path as a mere reference, which reads nothing and wakes no device; links are followed.
pub(crate) fn open_path(path: &Path) -> io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(Into::into)
}

/// The kernel's own path of an open file, without links.
pub(crate) fn path_of(fd: impl AsFd) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// The id of the mount that an open file is on, as in the first column of mountinfo.
pub(crate) fn mount_id(fd: impl AsFd) -> io::Result<u64> {
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    Ok(stat.stx_mnt_id)
}

/// Attaches a mount on an open file.
pub(crate) fn attach_on(mount: impl AsFd, target: impl AsFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, c"", target, c"", flags).map_err(Into::into)
}

/// The restrictions in force on the mount at an open file: the mount's own and those of its file system.
pub(crate) fn restrictions(fd: impl AsFd) -> io::Result<Restrictions> {
    let flags = rustix::fs::fstatvfs(fd)?.f_flag;
    Ok(Restrictions {
        read_only: flags.contains(StatVfsMountFlags::RDONLY),
        no_exec: flags.contains(StatVfsMountFlags::NOEXEC),
        no_suid: flags.contains(StatVfsMountFlags::NOSUID),
    })
}
