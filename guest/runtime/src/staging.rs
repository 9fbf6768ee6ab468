//! The private place where a container's mounts are put together.
//!
//! This process takes a mount namespace of its own, which crun inherits. Whatever is mounted here is seen by nobody
//! else and goes away by itself: with the container, or at once when its creation fails.

use std::{
    fs::{DirBuilder, File},
    io,
    os::fd::{AsFd, OwnedFd},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, StatVfsMountFlags},
    mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags},
};

use crate::sys::{self, Restrictions};

/// The stage, empty.
#[derive(Debug)]
pub(crate) struct Stage {
    path: PathBuf,
}

/// Opens a path without access to what it names; links are followed.
pub(crate) fn open_path(path: &Path) -> io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(Into::into)
}

/// The path that the kernel knows an open file by.
pub(crate) fn path_of(fd: impl AsFd) -> io::Result<PathBuf> {
    use std::os::fd::AsRawFd;
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
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

/// What is taken away on the mount at an open file, by itself or by its file system.
pub(crate) fn restrictions(fd: impl AsFd) -> io::Result<Restrictions> {
    let flags = rustix::fs::fstatvfs(fd)?.f_flag;
    Ok(Restrictions {
        read_only: flags.contains(StatVfsMountFlags::RDONLY),
        no_exec: flags.contains(StatVfsMountFlags::NOEXEC),
        no_suid: flags.contains(StatVfsMountFlags::NOSUID),
    })
}

impl Stage {
    /// Leaves the VM's mount namespace and mounts an empty stage at `path`.
    ///
    /// Mounts made in the VM later still arrive; nothing from here arrives there.
    pub(crate) fn enter(path: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o711).create(path)?;
        sys::unshare_mounts()?;
        let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", slave)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("stage", path, "tmpfs", flags, c"mode=0711,size=64m")?;
        // Binds are made below it: they must not be handed on to mounts that follow this one.
        rustix::mount::mount_change(path, MountPropagationFlags::PRIVATE)?;
        Ok(Self { path: path.to_owned() })
    }

    /// A path on the stage.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Makes a directory on the stage.
    pub(crate) fn directory(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.path(name);
        DirBuilder::new().mode(0o711).create(&path)?;
        Ok(path)
    }

    /// Makes what a mount of `source` can be attached to: a directory for a directory, else a file.
    pub(crate) fn target(&self, name: &str, source: impl AsFd) -> io::Result<PathBuf> {
        let stat = rustix::fs::fstat(source)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return self.directory(name);
        }
        let path = self.path(name);
        File::create_new(&path)?;
        Ok(path)
    }

    /// Takes a mount off the stage; what was built on it keeps it alive.
    pub(crate) fn detach(path: &Path) -> io::Result<()> {
        rustix::mount::unmount(path, UnmountFlags::DETACH).map_err(Into::into)
    }
}
