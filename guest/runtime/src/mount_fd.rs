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
    fs::{AtFlags, Mode, OFlags, ResolveFlags, StatVfsMountFlags, StatxFlags},
    io::Errno,
    mount::MoveMountFlags,
};

use crate::sys::Restrictions;

/// Attempts at a lookup below a directory.
const ATTEMPTS: u32 = 64;

/// Opens a path as a mere reference, which reads nothing and wakes no device; links are followed.
pub(crate) fn open_path(path: &Path) -> io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(Into::into)
}

/// Opens a path below a directory in the same way. The directory is the root for all links and for `..`.
pub(crate) fn open_path_in(root: &Path, path: &Path) -> io::Result<OwnedFd> {
    let root = open_path(root)?;
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    // The jumps of procfs would lead out.
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let mut opened = Err(Errno::AGAIN);
    // The kernel gives up if a directory on the way is moved at that moment.
    for _ in 0..ATTEMPTS {
        opened = rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve);
        if opened.as_ref().err() != Some(&Errno::AGAIN) {
            break;
        }
    }
    opened.map_err(Into::into)
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

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn no_link_and_no_dots_lead_out_of_the_directory_that_is_the_root() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        fs::create_dir_all(root.join("srv/data")).unwrap();
        fs::create_dir_all(root.join("home/me")).unwrap();
        fs::write(root.join("home/me/file"), "").unwrap();
        symlink("/srv/data", root.join("home/me/absolute")).unwrap();
        symlink("../../../../srv", root.join("home/me/beyond")).unwrap();
        symlink("/etc", root.join("home/me/etc")).unwrap();
        symlink("/proc/self/root/etc", root.join("home/me/jump")).unwrap();
        let open = |path: &str| open_path_in(&root, Path::new(path)).and_then(path_of);
        for (path, expected) in [
            ("", ""),
            ("home/me/file", "home/me/file"),
            ("home/me/absolute", "srv/data"),
            ("home/me/beyond/data", "srv/data"),
            ("home/../../../srv", "srv"),
            ("/srv", "srv"),
        ] {
            assert_eq!(open(path).unwrap(), root.join(expected).components().as_path(), "{path}");
        }
        for path in ["home/me/etc", "home/me/jump", "home/me/etc/passwd", "missing"] {
            assert_eq!(open(path).unwrap_err().kind(), io::ErrorKind::NotFound, "{path}");
        }
    }
}
