//! Bind mounts: each source is opened once, judged, id-mapped and mounted before crun begins.

mod destination;
mod engine_socket;
pub(crate) mod source_policy;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::FileType,
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags},
};

use crate::{
    mountinfo::Mount,
    rootfs,
    spec::mounts::{Bind, Cover, MountError, Staged},
    staging::{self, Stage},
    sys,
};
use destination::Missing;
use source_policy::{Asker, Policy, Source};

/// What is needed to judge.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context<'a> {
    /// The rules.
    pub(crate) policy: &'a Policy,
    /// The VM's mounts.
    pub(crate) table: &'a [Mount],
    /// Who asks.
    pub(crate) asker: Asker<'a>,
    /// Relative sources are relative to it.
    pub(crate) bundle: &'a Path,
}

/// A source that may be bound.
#[derive(Debug)]
pub(crate) struct Judged<'a> {
    bind: &'a Bind,
    fd: OwnedFd,
}

/// Opens and judges the sources; every refusal comes before anything is mounted.
pub(crate) fn judge<'a>(binds: &'a [Bind], context: Context<'_>) -> Result<Vec<Judged<'a>>, MountError> {
    binds.iter().map(|bind| judge_one(bind, context)).collect()
}

fn judge_one<'a>(bind: &'a Bind, context: Context<'_>) -> Result<Judged<'a>, MountError> {
    let name = || bind.source.display().to_string();
    let open = |source| MountError::Open { path: name(), source };
    let restricted = || MountError::Restricted(name());
    let fd = staging::open_path(&context.bundle.join(&bind.source)).map_err(open)?;
    let path = staging::path_of(&fd).map_err(open)?;
    if engine_socket::is_engines(&path) && !context.asker.build {
        return Ok(Judged { bind, fd: engine_socket::own(context.asker.containers.last())? });
    }
    let mount = mount_of(&fd, context.table).ok_or_else(restricted)?;
    let data_fd = staging::open_path(&context.policy.data_root).map_err(open)?;
    let data_path = staging::path_of(&data_fd).map_err(open)?;
    let data = Source { path: &data_path, mount: mount_of(&data_fd, context.table).ok_or_else(restricted)? };
    if !context.policy.allows(Source { path: &path, mount }, data, context.table, context.asker) {
        return Err(restricted());
    }
    Ok(Judged { bind, fd })
}

fn mount_of(fd: impl AsFd, table: &[Mount]) -> Option<&Mount> {
    let id = rootfs::mount_id(fd).ok()?;
    table.iter().find(|mount| mount.id == id)
}

/// The container's root as far as it is mounted.
#[derive(Debug)]
pub(crate) struct Root {
    fd: OwnedFd,
    path: PathBuf,
    /// First id of the container.
    start: u32,
    /// Where crun mounts over the root later.
    covered: Vec<PathBuf>,
}

impl Root {
    /// The root at `path`, and the destinations in it that crun is going to mount.
    pub(crate) fn open(path: &Path, start: u32, destinations: &[PathBuf]) -> io::Result<Self> {
        let fd = staging::open_path(path)?;
        let covered = destinations
            .iter()
            // What is missing has no links in it that matter.
            .filter_map(|destination| {
                destination::open(&fd, destination, Missing::Fail).and_then(staging::path_of).ok()
            })
            .chain(destinations.iter().map(|d| path.join(d.strip_prefix("/").unwrap_or(d))))
            .collect();
        Ok(Self { fd, path: path.to_owned(), start, covered })
    }

    /// Makes the mount at `top`, which the root is on, read-only before crun begins, so that it is locked as well.
    ///
    /// crun can't make the places for its own mounts then: the directories `destinations` are made here. One that
    /// can't be made is left to crun, which says what is wrong.
    pub(crate) fn freeze(&self, top: &Path, destinations: &[PathBuf]) -> io::Result<()> {
        for destination in destinations {
            // Below /dev and the like the place is in what crun mounts there.
            let mut parents = destination.ancestors().skip(1);
            if parents.all(|parent| destinations.iter().all(|other| other != parent)) {
                let make = || destination::open(&self.fd, destination, Missing::Directory).map(drop);
                let _ = sys::with_filesystem_id(self.start, make)?;
            }
        }
        sys::make_read_only(staging::open_path(top)?.as_fd())
    }

    fn is_covered(&self, place: &Path) -> bool {
        self.covered.iter().any(|covered| place.starts_with(covered))
    }
}

/// Mounts a tmpfs of the container's where it goes in the root, so that the binds on it can be placed too.
pub(crate) fn place_cover(cover: &Cover, root: &Root, userns: BorrowedFd<'_>) -> io::Result<()> {
    let make = || destination::open(&root.fd, &cover.destination, Missing::Directory);
    let place = sys::with_filesystem_id(root.start, make)??;
    let found = staging::path_of(&place)?;
    if found == root.path || root.is_covered(&found) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // As crun does it: without a mode it has that of the directory below.
    let mode = format!("{:o}", rustix::fs::fstat(&place)?.st_mode & 0o7777);
    let mut attributes = MountAttrFlags::empty();
    attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, cover.no_devices);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, cover.restrict.no_exec);
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOSUID, cover.restrict.no_suid);
    let mount = sys::open_in_userns(userns, || {
        let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_set_string(&context, "source", "tmpfs")?;
        for (name, value) in [("uid", "0"), ("gid", "0"), ("mode", &mode)] {
            rustix::mount::fsconfig_set_string(&context, name, value)?;
        }
        for (name, value) in &cover.options {
            rustix::mount::fsconfig_set_string(&context, name.as_str(), value.as_str())?;
        }
        rustix::mount::fsconfig_create(&context)?;
        rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(Into::into)
    })?;
    staging::attach_on(&mount, &place)
}

impl Judged<'_> {
    /// Its place in the spec's list.
    pub(crate) fn index(&self) -> usize {
        self.bind.index
    }

    /// Puts the id-mapped mount where it goes in the root, and then returns `None`.
    ///
    /// Mounts that are there before crun makes the container's mount namespace are locked in it
    /// (mount_namespaces(7)): no mount call of the container's root can make a read-only one writable. Below what crun
    /// mounts itself that can't be; such a one goes onto the stage, is locked there, and is returned for crun.
    pub(crate) fn place(
        &self,
        stage: &Stage,
        root: &Root,
        userns: BorrowedFd<'_>,
    ) -> Result<Option<Staged>, MountError> {
        let failed = |source| MountError::Mount { path: self.bind.source.display().to_string(), source };
        let tree = self.tree(userns).map_err(failed)?;
        if let Some(place) = self.destination(root).map_err(failed)? {
            staging::attach_on(&tree, &place).map_err(failed)?;
            return Ok(None);
        }
        self.stage(stage, &tree, userns).map(Some).map_err(failed)
    }

    /// Puts a locked copy of the mount onto the stage: crun's copy of that has the locks as well.
    fn stage(&self, stage: &Stage, tree: &OwnedFd, userns: BorrowedFd<'_>) -> io::Result<Staged> {
        let path = stage.target(&format!("bind{}", self.bind.index), &self.fd)?;
        staging::attach(tree, &path)?;
        let clone = || staging::clone_tree(staging::open_path(&path)?, self.bind.recursive);
        let locked = sys::open_in_userns(userns, clone)?;
        Stage::detach(&path)?;
        staging::attach(&locked, &path)?;
        Ok(Staged { taken: staging::restrictions(&locked)?, path })
    }

    fn tree(&self, userns: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let tree = staging::clone_tree(&self.fd, self.bind.recursive)?;
        // A file system that has no id maps is shown as it is: its owners appear as nobody, which only takes access
        // away. A tree with such a file system below its top is mapped at the top alone.
        if sys::idmap_mount(tree.as_fd(), userns, self.bind.recursive).is_err() && self.bind.recursive {
            let _ = sys::idmap_mount(tree.as_fd(), userns, false);
        }
        sys::restrict_mount(tree.as_fd(), self.bind.restrict, self.bind.recursive)?;
        Ok(tree)
    }

    /// The place in the root; `None` when crun is going to mount over it.
    fn destination(&self, root: &Root) -> io::Result<Option<OwnedFd>> {
        let path = &self.bind.destination;
        if root.is_covered(&root.path.join(path.strip_prefix("/").unwrap_or(path))) {
            return Ok(None);
        }
        let is_directory = FileType::from_raw_mode(rustix::fs::fstat(&self.fd)?.st_mode) == FileType::Directory;
        let missing = if is_directory { Missing::Directory } else { Missing::File };
        let place = sys::with_filesystem_id(root.start, || destination::open(&root.fd, path, missing))??;
        let found = staging::path_of(&place)?;
        Ok(Some(place).filter(|_| found != root.path && !root.is_covered(&found)))
    }
}
