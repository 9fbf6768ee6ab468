//! `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf` of a container, which the engine keeps as files of its own.
//!
//! dockerd reads them by path and as a whole when a network is joined or left, whatever their length. A container that
//! could write the engine's file would decide how much memory dockerd takes, also with a hole of any size that costs no
//! disk. Limits of a file system count blocks or pages and not lengths, so none would help.
//!
//! Therefore the container gets an overlay of the directory, of which it sees these files alone. The engine's file is
//! in the lower layer, and its changes are visible, because overlayfs passes reads through to it. The first write of
//! the container copies the file to a tmpfs of its own, which its memory limit counts. From then on it sees its own
//! file, and the engine reads what the engine wrote.

use std::{
    ffi::CString,
    fs::File,
    io::Read,
    os::fd::{BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::StatVfsMountFlags,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
        mount,
    },
};

use super::{IdMap, VerifiedBind};
use crate::{
    mount_fd,
    rootfs::{RootfsError, failed, mapped_clone},
    staging::StagingArea,
    sys,
};

/// Size of the tmpfs for the files of a container, in MiB: lists of blocked hosts have some.
const SIZE: u32 = 16;

/// Inodes of the tmpfs: the directories of the overlay, a copy of each file and one more while it is made.
const INODES: u32 = 32;

/// Replaces the engine's files among the sources with those of an overlay. A read-only bind keeps the engine's file.
pub(crate) fn separate(
    binds: &mut [VerifiedBind<'_>],
    staging: &StagingArea,
    userns: BorrowedFd<'_>,
    first_id: u32,
) -> Result<(), RootfsError> {
    // A container that shares the network of another has files of two directories at most.
    let mut overlays: Vec<(PathBuf, PathBuf)> = Vec::new();
    for bind in binds.iter_mut().filter(|bind| bind.is_engine_file && !bind.bind.restrictions.read_only) {
        let path = mount_fd::path_of(&bind.source).map_err(failed("find", &bind.bind.source))?;
        let (Some(directory), Some(file)) = (path.parent(), path.file_name()) else { continue };
        let known = overlays.iter().find(|(known, _)| known == directory).map(|(_, overlay)| overlay.clone());
        let overlay = if let Some(overlay) = known {
            overlay
        } else {
            let name = format!("files{}", overlays.len());
            let overlay = mount_over(directory, staging, &name, userns, first_id)?;
            overlays.push((directory.to_owned(), overlay.clone()));
            overlay
        };
        bind.source = mount_fd::open_path(&overlay.join(file)).map_err(failed("open", &path))?;
        // The overlay's layers are id-mapped.
        bind.id_map = IdMap::Present;
    }
    Ok(())
}

/// Mounts the overlay of a directory in the staging area, and returns its mount point.
fn mount_over(
    directory: &Path,
    staging: &StagingArea,
    name: &str,
    userns: BorrowedFd<'_>,
    first_id: u32,
) -> Result<PathBuf, RootfsError> {
    let area = staging.directory(name).map_err(failed("create a mount point for", directory))?;
    let options = format!("mode=0700,uid={first_id},gid={first_id},size={SIZE}m,nr_inodes={INODES}");
    let options = CString::new(options).map_err(failed("mount a tmpfs for", directory))?;
    mount("files", &area, "tmpfs", MountFlags::empty(), options.as_c_str())
        .map_err(failed("mount a tmpfs for", directory))?;
    let (upper, work) = (area.join("upper"), area.join("work"));
    let create = || std::fs::create_dir(&upper).and_then(|()| std::fs::create_dir(&work));
    sys::with_filesystem_id(first_id, create).and_then(|made| made).map_err(failed("create layers for", directory))?;
    let lower = area.join("lower");
    std::fs::create_dir(&lower).map_err(failed("create a mount point for", directory))?;
    mount_fd::attach(&mapped_clone(directory, userns)?, &lower).map_err(failed("attach layer", directory))?;
    // overlayfs keeps the credentials of its mounter for all its own work on the layers. They must be ids that the
    // layers' id map knows: as the VM's uid 0 it could not create its work directory, and would come up read-only.
    let overlay = sys::with_filesystem_id(first_id, || mount_overlay(&lower, &upper, &work))
        .map_err(failed("take the ids of the container's root for", directory))??;
    let flags = rustix::fs::fstatvfs(&overlay).map_err(failed("stat the overlay of", directory))?.f_flag;
    if flags.contains(StatVfsMountFlags::RDONLY) {
        return Err(RootfsError::ReadOnly(directory.to_owned()));
    }
    // The overlay has private clones of the mounts of its layers.
    StagingArea::detach(&area).map_err(failed("detach", &area))?;
    mount_fd::attach(&overlay, &area).map_err(failed("attach", &area))?;
    Ok(area)
}

/// Mounts an overlay, attached nowhere yet.
fn mount_overlay(lower: &Path, upper: &Path, work: &Path) -> Result<OwnedFd, RootfsError> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|error| RootfsError::Overlay { message: String::new(), source: error.into() })?;
    let mount = || {
        for (option, layer) in [("lowerdir+", lower), ("upperdir", upper), ("workdir", work)] {
            fsconfig_set_string(&context, option, layer)?;
        }
        for option in ["index", "metacopy", "redirect_dir", "xino"] {
            fsconfig_set_string(&context, option, "off")?;
        }
        fsconfig_set_string(&context, "source", "overlay")?;
        fsconfig_create(&context)?;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NODEV)
    };
    mount().map_err(|error: rustix::io::Errno| RootfsError::Overlay {
        message: kernel_message(&context),
        source: error.into(),
    })
}

/// The kernel's messages about a file system context that failed, for appending.
fn kernel_message(context: &OwnedFd) -> String {
    let mut text = String::new();
    let mut line = [0; 1024];
    let Ok(copy) = context.try_clone() else { return text };
    let mut file = File::from(copy);
    // Each read returns one message, with `e`, `w` or `i` for its severity in front; the last one fails with ENODATA.
    while let Ok(length @ 1..) = file.read(&mut line) {
        text.push_str(": ");
        text.push_str(String::from_utf8_lossy(&line[..length]).trim_start_matches(['e', 'w', 'i', ' ']).trim_end());
    }
    text
}
