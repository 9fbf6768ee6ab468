//! Bind mounts, the way by which files of the VM could get into a container.
//!
//! Every source of a spec is opened once, verified, id-mapped and mounted before crun starts:
//!
//! - [`verify`] opens the source and decides by what was opened, not by its name;
//! - [`source_policy`] holds the rules: which places of the VM may be a source at all;
//! - [`engine_files`] keeps what a container writes into its `/etc/hosts` away from the engine;
//! - [`engine_socket`] replaces the engine's socket with one of the container's own, if the gate grants it;
//! - [`container_root`] finds the mount point in the container's root, whose links are an image's and may be hostile;
//! - [`VerifiedBind::mount`] mounts it there, or prepares it for crun where crun mounts the file system below it.
//!
//! [`crate::spec::mounts`] reads the entries out of config.json and writes the prepared ones back.

pub(crate) mod container_root;
mod destination;
mod engine_files;
mod engine_socket;
pub(crate) mod source_policy;

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use bulkhead_guest_common::mountinfo::Mount;
use container_root::ContainerRoot;
pub(crate) use engine_files::separate as separate_engine_files;
use source_policy::{OpenedSource, Requester, SourcePolicy};

use crate::{
    mount_fd,
    spec::mounts::{Bind, MountError, StagedBind},
    staging::StagingArea,
    sys,
};

/// The surroundings in which a bundle's sources are verified.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VerifyContext<'a> {
    pub(crate) policy: &'a SourcePolicy,
    /// The VM's mounts, as this process's own mount namespace shows them.
    pub(crate) mounts: &'a [Mount<'a>],
    pub(crate) requester: Requester<'a>,
    /// The directory that relative sources are relative to.
    pub(crate) bundle: &'a Path,
}

/// A bind mount whose source is open and allowed.
#[derive(Debug)]
pub(crate) struct VerifiedBind<'a> {
    bind: &'a Bind,
    source: OwnedFd,
    /// There are mounts below the source, all of them allowed, and they are bound as well.
    recursive: bool,
    id_map: IdMap,
    /// The engine goes on reading and writing the file, whatever the container makes of it.
    is_engine_file: bool,
}

/// The way by which a source's files get the container's ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IdMap {
    /// The mount is id-mapped, or refused.
    Required,
    /// The container sees the owners as nobody where the file system does not support id maps.
    IfSupported,
    /// The source shows the container's ids already.
    Present,
}

/// Opens and verifies all sources, so that a refusal comes before anything is mounted.
pub(crate) fn verify<'a>(binds: &'a [Bind], context: VerifyContext<'_>) -> Result<Vec<VerifiedBind<'a>>, MountError> {
    binds.iter().map(|bind| verify_one(bind, context)).collect()
}

fn verify_one<'a>(bind: &'a Bind, context: VerifyContext<'_>) -> Result<VerifiedBind<'a>, MountError> {
    let name = || bind.source.display().to_string();
    let open = |source| MountError::Open { path: name(), source };
    let restricted = || MountError::Restricted(name());
    // This descriptor is what gets mounted. A volume's files belong to containers, which may swap a link in the path at
    // any moment; that changes the name, but not what is open here.
    let source = open_source(&context.bundle.join(&bind.source), context.policy).map_err(open)?;
    let path = mount_fd::path_of(&source).map_err(open)?;
    // A build step has no container in the engine, so no grant: it falls through to the policy, which refuses the path.
    if engine_socket::is_engine_socket(&path) && !context.requester.is_build {
        let source = engine_socket::open_granted(context.requester.containers.last())?;
        return Ok(VerifiedBind { bind, source, recursive: false, id_map: IdMap::Required, is_engine_file: false });
    }
    // A mount that reached this namespace after the table was read is not in it, and is refused.
    let mount = mount_of(&source, context.mounts).ok_or_else(restricted)?;
    // The data directory is opened the same way, because the VM may have it behind a link or on a disk of its own.
    let data_fd = mount_fd::open_path(&context.policy.data_root).map_err(open)?;
    let data_path = mount_fd::path_of(&data_fd).map_err(open)?;
    let data_mount = mount_of(&data_fd, context.mounts).ok_or_else(restricted)?;
    let data_root = OpenedSource { path: &data_path, mount: data_mount };
    let allows = |path: &Path, mount| {
        context.policy.allows(OpenedSource { path, mount }, data_root, context.mounts, context.requester)
    };
    let below = if bind.recursive { mounts_below(mount, &path, context.mounts) } else { Vec::new() };
    if !allows(&path, mount) || !below.iter().all(|mount| allows(&mount.point(), mount)) {
        return Err(restricted());
    }
    // Overlays have id maps in the guest's kernel only; without, a build step can still read world-readable layers, and
    // the policy leaves overlays to build steps. What is the guest image's is for every user to read.
    let is_overlay = |mount: &Mount<'_>| mount.fs_type == b"overlay";
    let may_be_unmapped =
        is_overlay(mount) || below.iter().copied().any(is_overlay) || context.policy.is_of_image(&path);
    let id_map = if may_be_unmapped { IdMap::IfSupported } else { IdMap::Required };
    // Without mounts below the copy has the top alone, so that none gets in which appears after the table was read.
    let recursive = !below.is_empty();
    let is_engine_file = context.policy.is_engine_file(OpenedSource { path: &path, mount }, data_root);
    Ok(VerifiedBind { bind, source, recursive, id_map, is_engine_file })
}

/// Opens a source. What is named below the shares is looked up as on the host, where their root is the root.
fn open_source(path: &Path, policy: &SourcePolicy) -> io::Result<OwnedFd> {
    match path.strip_prefix(&policy.shares) {
        Ok(rest) => mount_fd::open_path_in(&policy.shares, rest),
        Err(_) => mount_fd::open_path(path),
    }
}

/// The mounts in the tree of `top` that are at or below `path`, directly and on each other.
fn mounts_below<'a>(top: &Mount<'_>, path: &Path, mounts: &'a [Mount<'a>]) -> Vec<&'a Mount<'a>> {
    let mut found: Vec<&Mount<'_>> = Vec::new();
    // A mount that was made before the one it is on now comes before it in the table. So the table is read until a
    // reading adds nothing.
    loop {
        let known = found.len();
        for mount in mounts {
            let is_below = mount.parent == top.id && mount.point().starts_with(path)
                || found.iter().any(|other| other.id == mount.parent);
            if is_below && found.iter().all(|other| other.id != mount.id) {
                found.push(mount);
            }
        }
        if found.len() == known {
            return found;
        }
    }
}

fn mount_of<'a>(fd: impl AsFd, mounts: &'a [Mount<'a>]) -> Option<&'a Mount<'a>> {
    let id = mount_fd::mount_id(fd).ok()?;
    mounts.iter().find(|mount| mount.id == id)
}

impl VerifiedBind<'_> {
    /// The entry's position in the spec's list of mounts.
    pub(crate) fn index(&self) -> usize {
        self.bind.index
    }

    /// Mounts the id-mapped source in the container's root and returns `None`, or prepares it for crun.
    ///
    /// Mounts that exist before crun creates the container's mount namespace are locked in it (mount_namespaces(7)): no
    /// mount call of the container's root can unmount one or make a read-only one writable. Below a file system that
    /// crun mounts itself that is impossible; such a bind is locked in the staging area and returned for crun.
    pub(crate) fn mount(
        &self,
        staging: &StagingArea,
        root: &ContainerRoot,
        userns: BorrowedFd<'_>,
    ) -> Result<Option<StagedBind>, MountError> {
        let failed = |source| MountError::Mount { path: self.bind.source.display().to_string(), source };
        let tree = self.mapped_tree(userns)?;
        if let Some(mount_point) = root.mount_point(&self.bind.destination, &self.source).map_err(failed)? {
            mount_fd::attach_on(&tree, &mount_point).map_err(failed)?;
            return Ok(None);
        }
        self.stage(staging, &tree, userns).map(Some).map_err(failed)
    }

    /// Puts a locked copy of the mount into the staging area: crun's clone of it has the locks as well.
    fn stage(&self, staging: &StagingArea, tree: &OwnedFd, userns: BorrowedFd<'_>) -> io::Result<StagedBind> {
        let path = staging.mount_point(&format!("bind{}", self.bind.index), &self.source)?;
        // The kernel locks a mount when a less privileged user namespace copies it with its mount namespace. So the
        // mount is attached, copied by a child in the container's user namespace, and replaced with that copy.
        mount_fd::attach(tree, &path)?;
        let clone = || mount_fd::clone_tree(mount_fd::open_path(&path)?, self.recursive);
        let locked = sys::open_in_userns(userns, clone)?;
        StagingArea::detach(&path)?;
        mount_fd::attach(&locked, &path)?;
        // Read back instead of taken from the spec: a source that is read-only in the VM has restrictions that the spec
        // does not name, and crun must not try to clear them.
        Ok(StagedBind { restrictions: mount_fd::restrictions(&locked)?, path })
    }

    /// A detached copy of the source's mount with the container's ids and the bind's restrictions.
    fn mapped_tree(&self, userns: BorrowedFd<'_>) -> Result<OwnedFd, MountError> {
        let name = || self.bind.source.display().to_string();
        let failed = |source| MountError::Mount { path: name(), source };
        let tree = mount_fd::clone_tree(&self.source, self.recursive).map_err(failed)?;
        let map = |recursive| sys::idmap_mount(tree.as_fd(), userns, recursive);
        match self.id_map {
            IdMap::Present => {}
            IdMap::Required => map(self.recursive).map_err(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => MountError::NoIdMaps(name()),
                _ => failed(error),
            })?,
            // If a file system below the top has no id maps, the kernel maps nothing, so the top is mapped alone.
            IdMap::IfSupported => {
                let _ = map(self.recursive).or_else(|error| if self.recursive { map(false) } else { Err(error) });
            }
        }
        // The restrictions must be in force on every mount of the tree, or the bind fails.
        sys::restrict_mount(tree.as_fd(), self.bind.restrictions, self.recursive).map_err(failed)?;
        Ok(tree)
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_guest_common::mountinfo;

    use super::*;

    #[test]
    fn mounts_below_a_source_are_found_in_any_order_and_others_are_not() {
        let table = b"5 4 0:5 / /v/a/b/c rw - tmpfs t rw\n1 0 8:1 / / rw - ext4 a rw\n2 1 8:2 / /v rw - ext4 b rw\n\
            3 2 0:3 / /v/ab rw - tmpfs t rw\n4 2 0:4 / /v/a/b rw - tmpfs t rw\n6 2 0:6 / /v/a rw - proc p rw\n\
            7 1 0:7 / /v/a/x rw - tmpfs t rw\n";
        let mounts: Vec<_> = mountinfo::parse(table).collect();
        let top = mounts.iter().find(|mount| mount.id == 2).unwrap();
        let mut below: Vec<_> = mounts_below(top, Path::new("/v/a"), &mounts).iter().map(|mount| mount.id).collect();
        below.sort_unstable();
        assert_eq!(below, [4, 5, 6]);
        assert!(mounts_below(top, Path::new("/v/none"), &mounts).is_empty());
    }
}
