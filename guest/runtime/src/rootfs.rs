//! The container's root file system, id-mapped: on disk owners stay what they are, nothing is ever chowned.
//!
//! overlayfs can't be id-mapped itself, its layers can. So the engine's overlay is taken apart and mounted a second
//! time from id-mapped layers. The writable layer is the same, which is what lets the engine's own view of the
//! container (cp, diff, commit) show what the container wrote; the work directory is our own, beside the engine's,
//! because a mount empties its work directory.

use std::{
    fs::DirBuilder,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{StatVfsMountFlags, StatxFlags},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags},
};

use crate::{
    mountinfo::{self, Layers, LayersError, Mount},
    staging::{self, Stage},
    sys,
};

/// Name of our work directory, beside the writable layer; the engine removes it with the container's directory.
const WORK: &str = "isolated-work";

/// Name of the root's mount on the stage.
const NAME: &str = "root";

/// Longest value that fsconfig(2) takes, less the final zero.
const MAX_VALUE: usize = 255;

/// Why a root file system can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootError {
    /// The layers can't be told.
    #[error("{path}: its overlay can't be taken apart", path = path.display())]
    Layers {
        /// The root.
        path: PathBuf,
        /// Why.
        #[source]
        source: LayersError,
    },
    /// A system call failed.
    #[error("can't {what} {path}", path = path.display())]
    Io {
        /// The purpose.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// overlayfs refused, in the kernel's own words.
    #[error("can't mount the id-mapped overlay{}", .message)]
    Overlay {
        /// What the kernel said besides the error number.
        message: String,
        /// The error number.
        #[source]
        source: io::Error,
    },
    /// overlayfs came up read-only without an error.
    #[error("the id-mapped overlay of {path} came up read-only", path = .0.display())]
    ReadOnly(PathBuf),
}

fn failed<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> RootError {
    let path = path.to_owned();
    move |source| RootError::Io { what, path, source: source.into() }
}

/// The id of the mount that an open file is on.
pub(crate) fn mount_id(fd: impl AsFd) -> io::Result<u64> {
    let stat = rustix::fs::statx(fd, c"", rustix::fs::AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    Ok(stat.stx_mnt_id)
}

/// Where the root's mount is.
pub(crate) fn top(stage: &Stage) -> PathBuf {
    stage.path(NAME)
}

/// Puts an id-mapped view of `root` on the stage and returns its path.
pub(crate) fn prepare(
    stage: &Stage,
    root: &Path,
    table: &[Mount],
    userns: BorrowedFd<'_>,
    start: u32,
) -> Result<PathBuf, RootError> {
    let fd = staging::open_path(root).map_err(failed("open", root))?;
    let id = mount_id(&fd).map_err(failed("stat", root))?;
    let path = staging::path_of(&fd).map_err(failed("find", root))?;
    let target = stage.directory(NAME).map_err(failed("make a stage for", root))?;
    let overlay = table.iter().find(|mount| mount.id == id && mount.fs_type == b"overlay");
    let Some(mount) = overlay else {
        let tree = staging::clone_tree(&fd, true).map_err(failed("clone", &path))?;
        sys::idmap_mount(tree.as_fd(), userns, true).map_err(failed("id-map", &path))?;
        staging::attach(&tree, &target).map_err(failed("attach", &path))?;
        return Ok(target);
    };
    let layers =
        mountinfo::layers(&mount.options).map_err(|source| RootError::Layers { path: path.clone(), source })?;
    let overlay = mount_layers(stage, &resolve(layers, &mount.point)?, userns, start)?;
    staging::attach(&overlay, &target).map_err(failed("attach", &path))?;
    // The root may be a directory inside of the overlay, or the mount may show one.
    let inner = mount.root.join(path.strip_prefix(&mount.point).unwrap_or(Path::new("")));
    Ok(target.join(inner.strip_prefix("/").unwrap_or(&inner)))
}

/// Makes every path absolute and free of links.
///
/// dockerd shortens the options by giving paths relative to its storage directory, two above the mount point.
fn resolve(layers: Layers, point: &Path) -> Result<Layers, RootError> {
    let base = point.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    let real = |path: &PathBuf| {
        let fd = staging::open_path(&base.join(path)).map_err(failed("open layer", path))?;
        staging::path_of(&fd).map_err(failed("find layer", path))
    };
    Ok(Layers {
        lower: layers.lower.iter().map(real).collect::<Result<_, _>>()?,
        upper: layers.upper.as_ref().map(real).transpose()?,
    })
}

/// Layers as paths below id-mapped mounts on the stage.
#[derive(Debug)]
struct Mapped {
    lower: Vec<PathBuf>,
    /// Writable layer and work directory.
    upper: Option<(PathBuf, PathBuf)>,
}

fn mount_layers(stage: &Stage, layers: &Layers, userns: BorrowedFd<'_>, start: u32) -> Result<OwnedFd, RootError> {
    let place = stage.directory("layers").map_err(failed("make a stage for", Path::new("layers")))?;
    // A file system of its own, so that one detach takes all the layers off.
    rustix::mount::mount("layers", &place, "tmpfs", rustix::mount::MountFlags::empty(), c"mode=0711,size=1m")
        .map_err(failed("mount", &place))?;
    let work = match &layers.upper {
        Some(upper) => Some(work_directory(upper)?),
        None => None,
    };
    let mapped = match common(layers, work.as_deref()) {
        Some(base) => map_together(&place, &base, layers, work.as_deref(), userns)?,
        None => map_each(&place, layers, work.as_deref(), userns)?,
    };
    let overlay = sys::with_filesystem_id(start, || mount_overlay(&mapped))
        .map_err(failed("take the ids of the container's root for", &place))??;
    Stage::detach(&place).map_err(failed("detach", &place))?;
    let flags = rustix::fs::fstatvfs(&overlay).map_err(failed("stat", &place))?.f_flag;
    if let (Some(upper), true) = (&layers.upper, flags.contains(StatVfsMountFlags::RDONLY)) {
        return Err(RootError::ReadOnly(upper.clone()));
    }
    Ok(overlay)
}

fn work_directory(upper: &Path) -> Result<PathBuf, RootError> {
    let work = upper.with_file_name(WORK);
    match DirBuilder::new().mode(0o700).create(&work) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed("make", &work)(error)),
        _ => Ok(work),
    }
}

/// The directory that holds all the layers on one mount, if there is one: mapping it maps them all at once.
fn common(layers: &Layers, work: Option<&Path>) -> Option<PathBuf> {
    let all = || layers.lower.iter().chain(&layers.upper).map(PathBuf::as_path).chain(work);
    let base = all().skip(1).fold(all().next()?.parent()?, |base, path| {
        base.ancestors().find(|ancestor| path.starts_with(ancestor)).unwrap_or(base)
    });
    let id = |path: &Path| staging::open_path(path).and_then(mount_id).ok();
    let base_id = id(base)?;
    all().all(|path| id(path) == Some(base_id)).then(|| base.to_owned())
}

/// Id-maps a copy of the mount at `path` and attaches it at `target`.
fn map_one(target: &Path, path: &Path, userns: BorrowedFd<'_>) -> Result<(), RootError> {
    let fd = staging::open_path(path).map_err(failed("open layer", path))?;
    let tree = staging::clone_tree(&fd, false).map_err(failed("clone layer", path))?;
    sys::idmap_mount(tree.as_fd(), userns, false).map_err(failed("id-map layer", path))?;
    std::fs::create_dir(target).map_err(failed("make a stage for", path))?;
    staging::attach(&tree, target).map_err(failed("attach layer", path))
}

fn map_together(
    place: &Path,
    base: &Path,
    layers: &Layers,
    work: Option<&Path>,
    userns: BorrowedFd<'_>,
) -> Result<Mapped, RootError> {
    let target = place.join("0");
    let moved = |path: &Path| target.join(path.strip_prefix(base).unwrap_or(path));
    let mapped = Mapped {
        lower: layers.lower.iter().map(|path| moved(path)).collect(),
        upper: layers.upper.as_deref().zip(work).map(|(upper, work)| (moved(upper), moved(work))),
    };
    if mapped.lower.iter().any(|path| path.as_os_str().len() > MAX_VALUE) {
        return map_each(place, layers, work, userns);
    }
    map_one(&target, base, userns)?;
    Ok(mapped)
}

fn map_each(place: &Path, layers: &Layers, work: Option<&Path>, userns: BorrowedFd<'_>) -> Result<Mapped, RootError> {
    let mut lower = Vec::new();
    for (number, path) in layers.lower.iter().enumerate() {
        let target = place.join(format!("l{number}"));
        map_one(&target, path, userns)?;
        lower.push(target);
    }
    let upper = match layers.upper.as_deref().zip(work) {
        None => None,
        Some((upper, work)) => {
            // Both must be on one mount.
            let base = upper.parent().unwrap_or(upper);
            let target = place.join("u");
            map_one(&target, base, userns)?;
            let moved = |path: &Path| target.join(path.strip_prefix(base).unwrap_or(path));
            Some((moved(upper), moved(work)))
        }
    };
    Ok(Mapped { lower, upper })
}

fn mount_overlay(layers: &Mapped) -> Result<OwnedFd, RootError> {
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|e| RootError::Overlay { message: String::new(), source: e.into() })?;
    configure(&context, layers)
        .and_then(|()| {
            // Images can hold device nodes that no container could have made.
            rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NODEV)
        })
        .map_err(|error| RootError::Overlay { message: kernel_message(&context), source: error.into() })
}

fn configure(context: &OwnedFd, layers: &Mapped) -> rustix::io::Result<()> {
    use rustix::mount::fsconfig_set_string as set;
    set(context, "source", "overlay")?;
    for lower in &layers.lower {
        set(context, "lowerdir+", lower)?;
    }
    if let Some((upper, work)) = &layers.upper {
        set(context, "upperdir", upper)?;
        set(context, "workdir", work)?;
    }
    // The engine's mount of the same layers must be able to read what this one writes.
    for option in ["index", "metacopy", "redirect_dir", "xino"] {
        set(context, option, "off")?;
    }
    rustix::mount::fsconfig_create(context)
}

/// What the kernel says about a failed file system context, for appending.
fn kernel_message(context: &OwnedFd) -> String {
    let mut text = String::new();
    let mut line = [0; 1024];
    let Ok(copy) = context.try_clone() else { return text };
    let mut file = std::fs::File::from(copy);
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
        assert_eq!(common(&layers, Some(&dir.path().join("c/work"))).as_deref(), Some(dir.path()));
    }

    #[test]
    fn layers_on_different_mounts_are_not_mapped_through_their_parent() {
        let dir = tempfile::tempdir().unwrap();
        let layers = Layers { lower: vec![dir.path().to_owned(), "/proc/self".into()], upper: None };
        assert_eq!(common(&layers, None), None);
    }
}
