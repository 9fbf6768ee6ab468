//! The private directory in which a container's mounts are assembled.
//!
//! This process moves into a mount namespace of its own, which crun inherits. Its mounts are visible to no other
//! process and go away by themselves: with the container, or at once when the creation fails.

use std::{
    fs::{DirBuilder, File},
    io,
    os::fd::AsFd,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::FileType,
    mount::{MountFlags, MountPropagationFlags, UnmountFlags},
};

use crate::sys;

/// An empty tmpfs, mounted in this process's own mount namespace.
#[derive(Debug)]
pub(crate) struct StagingArea {
    path: PathBuf,
}

impl StagingArea {
    /// Leaves the VM's mount namespace and mounts an empty staging area at `path`.
    ///
    /// Later mounts of the VM still arrive here; no mount made here appears in the VM.
    pub(crate) fn enter(path: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o711).create(path)?;
        sys::unshare_mounts()?;
        // Slave before the first mount: in a shared tree it would propagate into the VM.
        let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        rustix::mount::mount_change("/", slave)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("stage", path, "tmpfs", flags, c"mode=0711,size=64m")?;
        // Private, so that no copy of this mount (in crun's namespace, say) receives the mounts made below it.
        rustix::mount::mount_change(path, MountPropagationFlags::PRIVATE)?;
        Ok(Self { path: path.to_owned() })
    }

    /// The path of `name` in the staging area.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Creates a directory.
    pub(crate) fn directory(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.path(name);
        DirBuilder::new().mode(0o711).create(&path)?;
        Ok(path)
    }

    /// Creates a mount point for `source`: a directory for a directory, else an empty file.
    pub(crate) fn mount_point(&self, name: &str, source: impl AsFd) -> io::Result<PathBuf> {
        let stat = rustix::fs::fstat(source)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return self.directory(name);
        }
        let path = self.path(name);
        File::create_new(&path)?;
        Ok(path)
    }

    /// Detaches a mount from the staging area; an overlay made of it, or a clone, keeps its file system alive.
    pub(crate) fn detach(path: &Path) -> io::Result<()> {
        rustix::mount::unmount(path, UnmountFlags::DETACH).map_err(Into::into)
    }
}
