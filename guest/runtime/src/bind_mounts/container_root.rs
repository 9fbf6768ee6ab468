//! The container's root while its mounts are assembled: where mounts of this program go, and which are left to crun.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::FileType,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags},
};

use super::destination::{self, Missing};
use crate::{mount_fd, spec::mounts::TmpfsMount, sys};

/// A container's root, with all that is mounted in it so far.
#[derive(Debug)]
pub(crate) struct ContainerRoot {
    fd: OwnedFd,
    path: PathBuf,
    /// The container's first id, its root user.
    first_id: u32,
    /// The mount points over which crun mounts later; a mount made below one now would be hidden.
    crun_mounts: Vec<PathBuf>,
}

impl ContainerRoot {
    /// The root at `path`, and the destinations in it that crun is going to mount on.
    pub(crate) fn open(path: &Path, first_id: u32, crun_destinations: &[PathBuf]) -> io::Result<Self> {
        let fd = mount_fd::open_path(path)?;
        // Both spellings count: `/dev` as the spec has it, and the directory that the image's `/dev` may be a link to.
        let crun_mounts = crun_destinations
            .iter()
            // A destination that does not exist yet has no links to follow; its plain spelling is enough.
            .filter_map(|it| destination::open(&fd, it, Missing::Fail).and_then(mount_fd::path_of).ok())
            .chain(crun_destinations.iter().map(|it| path.join(it.strip_prefix("/").unwrap_or(it))))
            .collect();
        Ok(Self { fd, path: path.to_owned(), first_id, crun_mounts })
    }

    /// The mount point at `destination` for a mount of `source`, created when missing; `None` when crun mounts over it.
    pub(super) fn mount_point(&self, destination: &Path, source: impl AsFd) -> io::Result<Option<OwnedFd>> {
        // Asked first by the plain spelling, so that nothing is created where crun's mount is going to hide it.
        if self.is_below_crun_mount(&self.path.join(destination.strip_prefix("/").unwrap_or(destination))) {
            return Ok(None);
        }
        let is_directory = FileType::from_raw_mode(rustix::fs::fstat(source)?.st_mode) == FileType::Directory;
        let missing = if is_directory { Missing::Directory } else { Missing::File };
        // A created mount point belongs to the container's root, like those that crun creates.
        let create = || destination::open(&self.fd, destination, missing);
        let mount_point = sys::with_filesystem_id(self.first_id, create)??;
        // Asked again by the resolved path: `/link-to-dev/x` is below crun's `/dev` as well. A mount on the root itself
        // would replace the whole root.
        let found = mount_fd::path_of(&mount_point)?;
        Ok(Some(mount_point).filter(|_| found != self.path && !self.is_below_crun_mount(&found)))
    }

    /// Mounts a tmpfs of the container's in the root, so that the binds below it can be mounted too.
    pub(crate) fn mount_tmpfs(&self, tmpfs: &TmpfsMount, userns: BorrowedFd<'_>) -> io::Result<()> {
        let create = || destination::open(&self.fd, &tmpfs.destination, Missing::Directory);
        let mount_point = sys::with_filesystem_id(self.first_id, create)??;
        let found = mount_fd::path_of(&mount_point)?;
        // An image whose link leads this tmpfs below a mount of crun's cannot be honoured in the right order.
        if found == self.path || self.is_below_crun_mount(&found) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // As crun does it: a tmpfs without a mode of its own takes that of the directory which it covers.
        let mode = format!("{:o}", rustix::fs::fstat(&mount_point)?.st_mode & 0o7777);
        let mut attributes = MountAttrFlags::empty();
        attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, tmpfs.no_devices);
        attributes.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, tmpfs.restrictions.no_exec);
        attributes.set(MountAttrFlags::MOUNT_ATTR_NOSUID, tmpfs.restrictions.no_suid);
        // Mounted by a member of the container's user namespace, the file system belongs to the container.
        let mount = sys::open_in_userns(userns, || {
            let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
            rustix::mount::fsconfig_set_string(&context, "source", "tmpfs")?;
            // The child's own ids are those of the VM's root, which the container does not have. The last value of an
            // option wins, so the spec's own come after these.
            for (name, value) in [("uid", "0"), ("gid", "0"), ("mode", &mode)] {
                rustix::mount::fsconfig_set_string(&context, name, value)?;
            }
            for (name, value) in &tmpfs.options {
                rustix::mount::fsconfig_set_string(&context, name.as_str(), value.as_str())?;
            }
            rustix::mount::fsconfig_create(&context)?;
            rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(Into::into)
        })?;
        mount_fd::attach_on(&mount, &mount_point)
    }

    /// Makes the mount of the root read-only before crun starts, so that the kernel locks that, too.
    ///
    /// crun cannot create mount points any more then, so those of `crun_destinations` are created here. If one cannot
    /// be created, crun reports it.
    pub(crate) fn freeze(&self, crun_destinations: &[PathBuf]) -> io::Result<()> {
        for destination in crun_destinations {
            // A mount point below another one, `/dev/pts` say, is in what crun mounts there and not in the root.
            let mut parents = destination.ancestors().skip(1);
            if parents.all(|parent| crun_destinations.iter().all(|other| other != parent)) {
                let create = || destination::open(&self.fd, destination, Missing::Directory).map(drop);
                let _ = sys::with_filesystem_id(self.first_id, create)?;
            }
        }
        // Of the top mount alone: the binds in it keep what their own entries say.
        sys::make_read_only(self.fd.as_fd())
    }

    fn is_below_crun_mount(&self, path: &Path) -> bool {
        self.crun_mounts.iter().any(|mount| path.starts_with(mount))
    }
}
