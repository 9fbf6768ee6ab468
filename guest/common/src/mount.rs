//! Mounts by descriptor: open_tree(2), move_mount(2) and mount_setattr(2).

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, StatxAttributes, StatxFlags},
    mount::{MoveMountFlags, OpenTreeFlags},
};

fn clone_flags(recursive: bool) -> OpenTreeFlags {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive { flags | OpenTreeFlags::AT_RECURSIVE } else { flags }
}

/// Returns a copy of the mount at an open file, attached nowhere; with `recursive`, of the mounts below as well.
pub fn clone_tree(fd: impl AsFd, recursive: bool) -> io::Result<OwnedFd> {
    Ok(rustix::mount::open_tree(fd, c"", clone_flags(recursive) | OpenTreeFlags::AT_EMPTY_PATH)?)
}

/// Returns a copy of the mount at a path, as [`clone_tree`] does; links are followed.
pub fn clone_tree_at(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    Ok(rustix::mount::open_tree(CWD, path, clone_flags(recursive))?)
}

/// Returns true if a file system is mounted on a directory. The kernel knows that by itself: no server is asked.
pub fn is_mount_point(path: &Path) -> bool {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let found = rustix::fs::statx(CWD, path, flags, StatxFlags::empty());
    found.is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Attaches a mount at `target`.
pub fn attach(mount: impl AsFd, target: &Path) -> io::Result<()> {
    Ok(rustix::mount::move_mount(mount, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Changes the attributes (`MOUNT_ATTR_*`), the propagation or the id map of a mount; with `recursive`, of all mounts
/// of the tree or of none.
pub fn set_attributes(mount: impl AsFd, attributes: libc::mount_attr, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a valid empty C string, `attributes` lives across the call and its true size is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
