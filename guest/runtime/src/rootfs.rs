//! The container's root file system, id-mapped: on disk owners stay as they are, no file is ever chowned.
//!
//! The container gets a clone of the engine's own mount of its root, with the container's id map on it. Both are mounts
//! of one file system, so each sees at once what the other writes (cp, export, exec), and the container gets the events
//! of files that the engine changes. A second overlay over the same writable layer would not do: each caches names for
//! itself, and the kernel leaves undefined what two of them make of a layer (overlayfs.rst, "Sharing and copying
//! layers").
//!
//! Linux lets no overlay be id-mapped. The guest's kernel does, by a patch in `firmware/patches`.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use crate::{
    mount_fd,
    staging::StagingArea,
    sys::{self, Restrictions},
};

/// The name of the root's mount in the staging area.
const ROOT_DIR: &str = "root";

/// The reason why a root file system cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootfsError {
    /// A system call failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// The purpose, to stand after "cannot" and before the path.
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The file system has no id maps in this kernel.
    #[error(
        "cannot id-map {}: this kernel has no id maps for its file system; use the kernel of `firmware/build guest`, \
         which has them for overlays, too",
        .0.display()
    )]
    NoIdMaps(PathBuf),
    /// overlayfs refused the layers or an option.
    #[error("cannot mount the id-mapped overlay{}", .message)]
    Overlay {
        /// The kernel's own message beside the error number, with a colon in front, or nothing.
        message: String,
        #[source]
        source: io::Error,
    },
    /// overlayfs fell back to a read-only mount, which it does without an error.
    #[error("the id-mapped overlay of {} came up read-only", .0.display())]
    ReadOnly(PathBuf),
}

pub(crate) fn failed<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> RootfsError {
    let path = path.to_owned();
    move |source| RootfsError::Io { what, path, source: source.into() }
}

/// Mounts an id-mapped clone of the engine's mount at `root` in the staging area, and returns its path.
pub(crate) fn prepare(staging: &StagingArea, root: &Path, userns: BorrowedFd<'_>) -> Result<PathBuf, RootfsError> {
    let target = staging.directory(ROOT_DIR).map_err(failed("create a mount point for", root))?;
    let tree = mapped_clone(root, userns)?;
    // An image can hold device nodes, which no container could have created.
    sys::restrict_mount(tree.as_fd(), Restrictions::default(), false).map_err(failed("restrict", root))?;
    mount_fd::attach(&tree, &target).map_err(failed("attach", root))?;
    Ok(target)
}

/// Returns a detached, id-mapped clone of the mount at `path`. Mounts below it are left out: nothing has judged them.
pub(crate) fn mapped_clone(path: &Path, userns: BorrowedFd<'_>) -> Result<OwnedFd, RootfsError> {
    let fd = mount_fd::open_path(path).map_err(failed("open", path))?;
    let tree = mount_fd::clone_tree(&fd, false).map_err(failed("clone", path))?;
    sys::idmap_mount(tree.as_fd(), userns, false).map_err(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => RootfsError::NoIdMaps(path.to_owned()),
        _ => failed("id-map", path)(error),
    })?;
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::unix::fs::MetadataExt,
    };

    use rustix::{
        fs::StatVfsMountFlags,
        mount::{MountFlags, mount},
    };

    use super::*;

    /// Runs `test` as root in a mount namespace of its own, with a staging area, an empty directory, and a user
    /// namespace with its first id.
    fn with_staging(test: impl FnOnce(&StagingArea, &Path, BorrowedFd<'_>, u32) + Send) {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let run = || {
            // The tests beside this one take ranges as well.
            let mut starts = (7..).map(|number| 100_000 + number * 65_536);
            let (userns, first_id) =
                starts.find_map(|start| Some((sys::new_userns(start, 65_536).unwrap()?, start))).unwrap();
            let staging = StagingArea::enter(&directory.path().join("stage")).unwrap();
            let root = directory.path().join("root");
            fs::create_dir(&root).unwrap();
            test(&staging, &root, userns.as_fd(), first_id);
        };
        std::thread::scope(|scope| scope.spawn(run).join()).unwrap();
    }

    #[test]
    fn a_root_is_the_engines_own_file_system_with_other_owners() {
        with_staging(|staging, root, userns, first_id| {
            mount("root", root, "tmpfs", MountFlags::empty(), None).unwrap();
            File::create(root.join("before")).unwrap();
            let mapped = prepare(staging, root, userns).unwrap();
            File::create(root.join("after")).unwrap();
            for name in ["before", "after"] {
                let (own, shown) = (fs::metadata(root.join(name)).unwrap(), fs::metadata(mapped.join(name)).unwrap());
                assert_eq!((own.dev(), own.ino()), (shown.dev(), shown.ino()), "{name}");
                assert_eq!((own.uid(), shown.uid()), (0, first_id), "{name}");
            }
            let flags = rustix::fs::statvfs(&mapped).unwrap().f_flag;
            assert!(flags.contains(StatVfsMountFlags::NODEV));
        });
    }

    #[test]
    fn a_root_that_is_a_directory_shows_that_directory() {
        with_staging(|staging, root, userns, first_id| {
            mount("root", root, "tmpfs", MountFlags::empty(), None).unwrap();
            fs::create_dir_all(root.join("vfs/dir/a/etc")).unwrap();
            let mapped = prepare(staging, &root.join("vfs/dir/a"), userns).unwrap();
            assert_eq!(fs::metadata(mapped.join("etc")).unwrap().uid(), first_id);
            assert!(!mapped.join("vfs").exists());
        });
    }

    #[test]
    fn a_read_only_mount_stays_read_only() {
        with_staging(|staging, root, userns, _| {
            mount("root", root, "tmpfs", MountFlags::RDONLY, None).unwrap();
            let mapped = prepare(staging, root, userns).unwrap();
            assert!(rustix::fs::statvfs(&mapped).unwrap().f_flag.contains(StatVfsMountFlags::RDONLY));
        });
    }

    #[test]
    fn a_mount_below_the_root_stays_out() {
        with_staging(|staging, root, userns, _| {
            mount("root", root, "tmpfs", MountFlags::empty(), None).unwrap();
            let below = root.join("below");
            fs::create_dir(&below).unwrap();
            mount("below", &below, "tmpfs", MountFlags::empty(), None).unwrap();
            File::create(below.join("secret")).unwrap();
            let mapped = prepare(staging, root, userns).unwrap();
            assert_eq!(fs::read_dir(mapped.join("below")).unwrap().count(), 0);
        });
    }

    #[test]
    fn a_file_system_without_id_maps_is_refused_with_the_remedy() {
        with_staging(|staging, root, userns, _| {
            mount("root", root, "proc", MountFlags::empty(), None).unwrap();
            let error = prepare(staging, root, userns).unwrap_err();
            assert!(error.to_string().contains("firmware/build"), "{error}");
        });
    }
}
