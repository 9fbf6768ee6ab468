//! The container's root file system, id-mapped: on disk owners stay as they are, no file is ever chowned.
//!
//! overlayfs cannot be id-mapped itself, but its layers can. So the layers of the engine's overlay are looked up, and
//! mounted a second time as an overlay of id-mapped layers. The writable layer is the same one, so that the engine's own
//! view of the container (cp, diff, commit) shows what the container wrote. The work directory is a different one, beside
//! the engine's, because overlayfs empties its work directory when it is mounted.

use std::{
    fs::DirBuilder,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use bulkhead_guest_common::mountinfo::Mount;
use rustix::{
    fs::StatVfsMountFlags,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags},
};

use crate::{
    mount_fd,
    overlay::{self, Layers, LayersError},
    refresh,
    staging::StagingArea,
    sys,
};

/// The name of the work directory, beside the writable layer; the engine removes it with the container's directory.
const WORK_DIR: &str = "isolated-work";

/// The name of the root's mount in the staging area.
const ROOT_DIR: &str = "root";

/// The length limit of a value for fsconfig(2), less the final zero.
const MAX_VALUE: usize = 255;

/// The reason why a root file system cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootfsError {
    /// The options of the engine's overlay do not say where its layers are.
    #[error("cannot find the overlay layers of {}", path.display())]
    Layers {
        path: PathBuf,
        #[source]
        source: LayersError,
    },
    /// A system call failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// The purpose, to stand after "cannot" and before the path.
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
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

/// The mount point of the root in the staging area.
pub(crate) fn mount_point(staging: &StagingArea) -> PathBuf {
    staging.path(ROOT_DIR)
}

/// A container's root in the staging area.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) path: PathBuf,
    /// The device number of the overlay that it is on; `None` if it is not on one.
    pub(crate) overlay: Option<(u32, u32)>,
}

/// Mounts an id-mapped view of `root` in the staging area.
pub(crate) fn prepare(
    staging: &StagingArea,
    root: &Path,
    mounts: &[Mount<'_>],
    userns: BorrowedFd<'_>,
    first_id: u32,
) -> Result<Root, RootfsError> {
    let fd = mount_fd::open_path(root).map_err(failed("open", root))?;
    let id = mount_fd::mount_id(&fd).map_err(failed("stat", root))?;
    let path = mount_fd::path_of(&fd).map_err(failed("find", root))?;
    let target = staging.directory(ROOT_DIR).map_err(failed("create a mount point for", root))?;
    let overlay = mounts.iter().find(|mount| mount.id == id && mount.fs_type == b"overlay");
    let Some(mount) = overlay else {
        // A root that is not an overlay is cloned and mapped as a whole. Unlike a bind it must not be left unmapped: all of
        // the image's files would belong to nobody.
        let tree = mount_fd::clone_tree(&fd, true).map_err(failed("clone", &path))?;
        sys::idmap_mount(tree.as_fd(), userns, true).map_err(failed("id-map", &path))?;
        mount_fd::attach(&tree, &target).map_err(failed("attach", &path))?;
        return Ok(Root { path: target, overlay: None });
    };
    let layers =
        overlay::layers(mount.super_options).map_err(|source| RootfsError::Layers { path: path.clone(), source })?;
    let overlay = mount_layers(staging, &resolve(layers, &mount.point())?, userns, first_id)?;
    let device = refresh::device(&overlay).map_err(failed("stat the overlay of", &path))?;
    mount_fd::attach(&overlay, &target).map_err(failed("attach", &path))?;
    // The root can be a directory in the overlay, or the mount can show only one of the overlay's directories.
    let inner = mount.root().join(path.strip_prefix(mount.point()).unwrap_or(Path::new("")));
    let path = target.join(inner.strip_prefix("/").unwrap_or(&inner));
    Ok(Root { path, overlay: Some(device) })
}

/// Makes every path absolute and free of links.
fn resolve(layers: Layers, point: &Path) -> Result<Layers, RootfsError> {
    // dockerd keeps the options short: its lower layers are links in `l/`, relative to its storage directory, which is
    // two above the mount point (`overlay2/ID/merged`). `join` leaves an absolute path as it is.
    let base = point.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    let real = |path: &PathBuf| {
        let fd = mount_fd::open_path(&base.join(path)).map_err(failed("open layer", path))?;
        mount_fd::path_of(&fd).map_err(failed("find layer", path))
    };
    Ok(Layers {
        lower: layers.lower.iter().map(real).collect::<Result<_, _>>()?,
        upper: layers.upper.as_ref().map(real).transpose()?,
    })
}

/// The layers as paths below id-mapped mounts in the staging area.
#[derive(Debug)]
pub(crate) struct MappedLayers {
    pub(crate) lower: Vec<PathBuf>,
    /// The writable layer and its work directory.
    pub(crate) upper: Option<(PathBuf, PathBuf)>,
}

fn mount_layers(
    staging: &StagingArea,
    layers: &Layers,
    userns: BorrowedFd<'_>,
    first_id: u32,
) -> Result<OwnedFd, RootfsError> {
    let area = staging.directory("layers").map_err(failed("create a mount point for", Path::new("layers")))?;
    // A file system of its own, so that detaching it takes the mounts of all layers with it.
    rustix::mount::mount("layers", &area, "tmpfs", rustix::mount::MountFlags::empty(), c"mode=0711,size=1m")
        .map_err(failed("mount", &area))?;
    let work = match &layers.upper {
        Some(upper) => Some(work_directory(upper)?),
        None => None,
    };
    let mapped = match common_parent(layers, work.as_deref()) {
        Some(base) => map_together(&area, &base, layers, work.as_deref(), userns)?,
        None => map_each(&area, layers, work.as_deref(), userns)?,
    };
    let overlay = mount_overlay(&mapped, &area, first_id)?;
    // The overlay has private clones of the layers' mounts, so these have served.
    StagingArea::detach(&area).map_err(failed("detach", &area))?;
    Ok(overlay)
}

/// Creates the work directory, or takes the one from the container's last start.
fn work_directory(upper: &Path) -> Result<PathBuf, RootfsError> {
    let work = upper.with_file_name(WORK_DIR);
    match DirBuilder::new().mode(0o700).create(&work) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed("create", &work)(error)),
        _ => Ok(work),
    }
}

/// The directory that holds all layers on one mount, if there is one: one id-mapped clone of it then serves them all.
fn common_parent(layers: &Layers, work: Option<&Path>) -> Option<PathBuf> {
    let all = || layers.lower.iter().chain(&layers.upper).map(PathBuf::as_path).chain(work);
    let base = all().skip(1).fold(all().next()?.parent()?, |base, path| {
        base.ancestors().find(|ancestor| path.starts_with(ancestor)).unwrap_or(base)
    });
    // A layer on another mount would be missing from the clone, which has the top mount only.
    let id = |path: &Path| mount_fd::open_path(path).and_then(mount_fd::mount_id).ok();
    let base_id = id(base)?;
    all().all(|path| id(path) == Some(base_id)).then(|| base.to_owned())
}

/// Id-maps a clone of the mount at `path` and attaches it at `target`.
pub(crate) fn map_one(target: &Path, path: &Path, userns: BorrowedFd<'_>) -> Result<(), RootfsError> {
    let fd = mount_fd::open_path(path).map_err(failed("open layer", path))?;
    let tree = mount_fd::clone_tree(&fd, false).map_err(failed("clone layer", path))?;
    sys::idmap_mount(tree.as_fd(), userns, false).map_err(failed("id-map layer", path))?;
    std::fs::create_dir(target).map_err(failed("create a mount point for", path))?;
    mount_fd::attach(&tree, target).map_err(failed("attach layer", path))
}

fn map_together(
    area: &Path,
    base: &Path,
    layers: &Layers,
    work: Option<&Path>,
    userns: BorrowedFd<'_>,
) -> Result<MappedLayers, RootfsError> {
    let target = area.join("0");
    let moved = |path: &Path| target.join(path.strip_prefix(base).unwrap_or(path));
    let mapped = MappedLayers {
        lower: layers.lower.iter().map(|path| moved(path)).collect(),
        upper: layers.upper.as_deref().zip(work).map(|(upper, work)| (moved(upper), moved(work))),
    };
    // Below the parent a path keeps most of its length. Mapped one by one, each layer has a short name.
    if mapped.lower.iter().any(|path| path.as_os_str().len() > MAX_VALUE) {
        return map_each(area, layers, work, userns);
    }
    map_one(&target, base, userns)?;
    Ok(mapped)
}

fn map_each(
    area: &Path,
    layers: &Layers,
    work: Option<&Path>,
    userns: BorrowedFd<'_>,
) -> Result<MappedLayers, RootfsError> {
    let mut lower = Vec::new();
    for (number, path) in layers.lower.iter().enumerate() {
        let target = area.join(format!("l{number}"));
        map_one(&target, path, userns)?;
        lower.push(target);
    }
    let upper = match layers.upper.as_deref().zip(work) {
        None => None,
        Some((upper, work)) => {
            // overlayfs requires the two on one mount, because it renames from one to the other.
            let base = upper.parent().unwrap_or(upper);
            let target = area.join("u");
            map_one(&target, base, userns)?;
            let moved = |path: &Path| target.join(path.strip_prefix(base).unwrap_or(path));
            Some((moved(upper), moved(work)))
        }
    };
    Ok(MappedLayers { lower, upper })
}

/// Mounts an overlay of the layers in `area`, attached nowhere yet, in the name of the container's root.
pub(crate) fn mount_overlay(layers: &MappedLayers, area: &Path, first_id: u32) -> Result<OwnedFd, RootfsError> {
    // overlayfs keeps the credentials of its mounter for all its own work on the layers. They must be ids that the
    // layers' id map knows: as the VM's uid 0 it could not create its work directory, and would come up read-only.
    let take = failed("take the ids of the container's root for", area);
    let overlay = sys::with_filesystem_id(first_id, || mount_as_caller(layers)).map_err(take)??;
    let flags = rustix::fs::fstatvfs(&overlay).map_err(failed("stat", area))?.f_flag;
    match &layers.upper {
        Some((upper, _)) if flags.contains(StatVfsMountFlags::RDONLY) => Err(RootfsError::ReadOnly(upper.clone())),
        _ => Ok(overlay),
    }
}

fn mount_as_caller(layers: &MappedLayers) -> Result<OwnedFd, RootfsError> {
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|e| RootfsError::Overlay { message: String::new(), source: e.into() })?;
    configure(&context, layers)
        .and_then(|()| {
            // An image can hold device nodes, which no container could have created.
            rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NODEV)
        })
        .map_err(|error| RootfsError::Overlay { message: kernel_message(&context), source: error.into() })
}

fn configure(context: &OwnedFd, layers: &MappedLayers) -> rustix::io::Result<()> {
    use rustix::mount::fsconfig_set_string as set;
    set(context, "source", "overlay")?;
    // Layer by layer, where mount(2) has one page for all options and an image can have more than a hundred layers.
    for lower in &layers.lower {
        set(context, "lowerdir+", lower)?;
    }
    if let Some((upper, work)) = &layers.upper {
        set(context, "upperdir", upper)?;
        set(context, "workdir", work)?;
    }
    // The engine's mount of the same layers has to be able to read what this one writes: no feature that leaves marks of
    // its own in the writable layer, such as redirects and copies of mere metadata.
    for option in ["index", "metacopy", "redirect_dir", "xino"] {
        set(context, option, "off")?;
    }
    rustix::mount::fsconfig_create(context)
}

/// The kernel's messages about a file system context that failed, for appending.
fn kernel_message(context: &OwnedFd) -> String {
    let mut text = String::new();
    let mut line = [0; 1024];
    let Ok(copy) = context.try_clone() else { return text };
    let mut file = std::fs::File::from(copy);
    // Each read returns one message, with `e`, `w` or `i` for its severity in front; the last one fails with ENODATA.
    while let Ok(length @ 1..) = file.read(&mut line) {
        text.push_str(": ");
        text.push_str(String::from_utf8_lossy(&line[..length]).trim_start_matches(['e', 'w', 'i', ' ']).trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_in_one_directory_are_mapped_through_it() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a/diff", "b/diff", "c/diff", "c/work"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        let layers = Layers {
            lower: vec![dir.path().join("a/diff"), dir.path().join("b/diff")],
            upper: Some(dir.path().join("c/diff")),
        };
        assert_eq!(common_parent(&layers, Some(&dir.path().join("c/work"))).as_deref(), Some(dir.path()));
    }

    #[test]
    fn layers_on_different_mounts_are_not_mapped_through_their_parent() {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers { lower: vec![dir.path().to_owned(), "/proc/self".into()], upper: None };
        assert_eq!(common_parent(&layers, None), None);
    }
}
