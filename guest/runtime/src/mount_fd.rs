//! Files and mounts by descriptor: `O_PATH`, open_tree(2) and move_mount(2).
//!
//! A path is resolved once. Everything after that works on the descriptor, so a link that a container swaps in between
//! changes nothing.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, StatVfsMountFlags, StatxFlags},
    mount::{MoveMountFlags, OpenTreeFlags},
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

/// A copy of the mount at an open file, attached nowhere.
pub(crate) fn clone_tree(fd: impl AsFd, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(fd, c"", flags).map_err(Into::into)
}

/// Attaches a mount at `target`.
pub(crate) fn attach(mount: impl AsFd, target: &Path) -> io::Result<()> {
    rustix::mount::move_mount(mount, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(Into::into)
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
