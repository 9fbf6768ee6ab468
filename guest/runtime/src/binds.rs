//! Bind mounts: each source is opened once, judged, id-mapped and put on the stage for crun.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use crate::{
    mountinfo::Mount,
    paths::{Asker, Policy, Source},
    root,
    spec::mounts::{Bind, MountError},
    stage::{self, Stage},
    sys,
};

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
    let fd = stage::open_path(&context.bundle.join(&bind.source)).map_err(open)?;
    let path = stage::path_of(&fd).map_err(open)?;
    let mount = mount_of(&fd, context.table).ok_or_else(restricted)?;
    let data_fd = stage::open_path(&context.policy.data_root).map_err(open)?;
    let data_path = stage::path_of(&data_fd).map_err(open)?;
    let data = Source { path: &data_path, mount: mount_of(&data_fd, context.table).ok_or_else(restricted)? };
    if !context.policy.allows(Source { path: &path, mount }, data, context.table, context.asker) {
        return Err(restricted());
    }
    Ok(Judged { bind, fd })
}

fn mount_of(fd: impl AsFd, table: &[Mount]) -> Option<&Mount> {
    let id = root::mount_id(fd).ok()?;
    table.iter().find(|mount| mount.id == id)
}

impl Judged<'_> {
    /// Its place in the spec's list.
    pub(crate) fn index(&self) -> usize {
        self.bind.index
    }

    /// Puts the id-mapped mount on the stage and returns its path.
    pub(crate) fn place(&self, stage: &Stage, userns: BorrowedFd<'_>) -> Result<PathBuf, MountError> {
        let failed = |source| MountError::Mount { path: self.bind.source.display().to_string(), source };
        let target = stage.target(&format!("bind{}", self.bind.index), &self.fd).map_err(failed)?;
        let tree = stage::clone_tree(&self.fd, self.bind.recursive).map_err(failed)?;
        // A file system that has no id maps is shown as it is: its owners appear as nobody, which only takes access
        // away. A tree with such a file system below its top is mapped at the top alone.
        if sys::idmap_mount(tree.as_fd(), userns, self.bind.recursive).is_err() && self.bind.recursive {
            let _ = sys::idmap_mount(tree.as_fd(), userns, false);
        }
        // Set out here, these become locked in the container: no mount call of its own can take them away.
        sys::restrict_mount(tree.as_fd(), self.bind.read_only).map_err(failed)?;
        stage::attach(&tree, &target).map_err(failed)?;
        Ok(target)
    }
}
