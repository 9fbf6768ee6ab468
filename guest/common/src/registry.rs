//! Which containers there are: one small file for each, written by the runtime and read by the warden.
//!
//! There is no conversation between the two: a container can be made while no warden runs, and a warden that is started
//! anew knows all of them. Each has a number that no other gets until the next boot.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Component, Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{bounded, namespace::Identity, process::Process};

/// Everything of the warden's, on a tmpfs.
pub const STATE: &str = "/run/sysbox-runc/warden";

/// Where the tree is mounted, below [`STATE`].
pub const TREE: &str = "/run/sysbox-runc/warden/fs";

/// Longest file that is read, in bytes.
const MAX_FILE: u64 = 16 * 1024;

/// Numbers of containers: an inode number has eight bits for the file.
pub const MAX_SLOT: u64 = u64::MAX >> 8;

/// A container, as its runtime describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Its number; the name of its directory in the tree.
    #[serde(default)]
    pub slot: u64,
    /// Its id.
    pub id: String,
    /// The state directory of crun that it lives in.
    pub state_root: PathBuf,
    /// The id that its root has in the VM.
    pub owner: u32,
    /// Its user namespace.
    pub user_namespace: Identity,
    /// Its cgroup, relative to the mount of the cgroup file system.
    pub cgroup: Option<PathBuf>,
    /// Its sysctls can't be written, which is what engines choose for containers without privilege.
    pub read_only: bool,
    /// The process that makes it, whose start is the container's.
    pub creator: Process,
}

impl Container {
    /// Whether it exists or is about to.
    pub fn lives(&self) -> bool {
        self.state_root.join(&self.id).exists() || self.creator.lives()
    }
}

/// A cgroup's path that leads nowhere but down, without the slash in front; `None` for any other.
pub fn cgroup_path(path: &str) -> Option<PathBuf> {
    let path = Path::new(path.trim_start_matches('/'));
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    (plain && !path.as_os_str().is_empty()).then(|| path.to_owned())
}

/// The files in their directory.
#[derive(Clone, Debug)]
pub struct Registry {
    containers: PathBuf,
    values: PathBuf,
}

impl Registry {
    /// The registry in `state`, which is made when missing.
    ///
    /// # Errors
    /// When the directories can't be made.
    pub fn open(state: &Path) -> io::Result<Self> {
        let own = Self { containers: state.join("containers"), values: state.join("values") };
        DirBuilder::new().recursive(true).mode(0o711).create(state)?;
        for path in [&own.containers, &own.values] {
            DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        }
        Ok(own)
    }

    /// Enters a container under a number of its own and returns the number; an older entry with its id is removed.
    ///
    /// # Errors
    /// When the files can't be written.
    pub fn enter(&self, container: Container) -> io::Result<u64> {
        let lock = File::options().create(true).append(true).open(self.containers.join("lock"))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
        let next = self.containers.join("next");
        let last = match fs::read_to_string(&next) {
            Ok(text) => text.trim().parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0_u64,
            Err(error) => return Err(error),
        };
        let slot = last.checked_add(1).filter(|slot| *slot <= MAX_SLOT).ok_or(io::ErrorKind::QuotaExceeded)?;
        replace(&next, slot.to_string().as_bytes())?;
        for old in self.all() {
            if old.id == container.id && old.state_root == container.state_root {
                self.remove(old.slot);
            }
        }
        let container = Container { slot, ..container };
        replace(&self.container_file(slot), &serde_json::to_vec(&container)?)?;
        Ok(slot)
    }

    /// The container with this number, dead or alive.
    pub fn get(&self, slot: u64) -> Option<Container> {
        let container: Container = serde_json::from_slice(&read(&self.container_file(slot))?).ok()?;
        (container.slot == slot).then_some(container)
    }

    /// All of them, dead or alive.
    pub fn all(&self) -> Vec<Container> {
        let entries = fs::read_dir(&self.containers).into_iter().flatten().flatten();
        let slots = entries.filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".json")?.parse().ok());
        slots.filter_map(|slot| self.get(slot)).collect()
    }

    /// Takes out what is left of a container.
    pub fn remove(&self, slot: u64) {
        let _ = fs::remove_file(self.container_file(slot));
        let _ = fs::remove_file(self.values_file(slot));
    }

    /// Takes the dead out and returns their numbers.
    pub fn sweep(&self) -> Vec<u64> {
        let dead: Vec<_> = self.all().into_iter().filter(|one| !one.lives()).map(|one| one.slot).collect();
        for slot in &dead {
            self.remove(*slot);
        }
        dead
    }

    fn container_file(&self, slot: u64) -> PathBuf {
        self.containers.join(format!("{slot}.json"))
    }

    /// Where a container's own values are kept.
    pub fn values_file(&self, slot: u64) -> PathBuf {
        self.values.join(format!("{slot}.json"))
    }
}

/// A small file's contents.
pub fn read(path: &Path) -> Option<Vec<u8>> {
    bounded::read_file(path, MAX_FILE).ok()
}

/// Writes a file so that it is seen whole or not at all.
pub fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(contents)?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A container that lives as long as this process.
    fn container(id: &str) -> Container {
        let creator = Process::find(std::process::id()).unwrap();
        let user_namespace = Identity::of(File::open("/proc/self/ns/user").unwrap()).unwrap();
        Container {
            slot: 0,
            id: id.to_owned(),
            state_root: "/nowhere".into(),
            owner: 100_000,
            user_namespace,
            cgroup: None,
            read_only: false,
            creator,
        }
    }

    #[test]
    fn numbers_are_never_used_twice() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).unwrap();
        assert_eq!(registry.enter(container("a")).unwrap(), 1);
        assert_eq!(registry.enter(container("b")).unwrap(), 2);
        registry.remove(2);
        assert_eq!(registry.enter(container("c")).unwrap(), 3);
        assert_eq!(registry.get(3).unwrap().id, "c");
        assert_eq!(registry.get(2), None);
    }

    #[test]
    fn a_container_made_again_takes_the_place_of_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).unwrap();
        let old = registry.enter(container("a")).unwrap();
        let new = registry.enter(container("a")).unwrap();
        assert_eq!(registry.get(old), None);
        assert_eq!(registry.all().iter().map(|one| one.slot).collect::<Vec<_>>(), [new]);
    }

    #[test]
    fn the_dead_are_swept_and_the_living_stay() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).unwrap();
        let alive = registry.enter(container("a")).unwrap();
        let mut dead = container("b");
        dead.creator.started += 1;
        let dead = registry.enter(dead).unwrap();
        let mut kept = container("c");
        kept.creator.started += 1;
        kept.state_root = dir.path().into();
        fs::create_dir(dir.path().join("c")).unwrap();
        let kept = registry.enter(kept).unwrap();
        assert_eq!(registry.sweep(), [dead]);
        let mut left: Vec<_> = registry.all().iter().map(|one| one.slot).collect();
        left.sort_unstable();
        assert_eq!(left, [alive, kept]);
    }

    #[test]
    fn a_torn_entry_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).unwrap();
        fs::write(dir.path().join("containers/9.json"), "{\"slot\":9,").unwrap();
        assert_eq!(registry.get(9), None);
        assert_eq!(registry.all(), []);
    }

    proptest! {
        #[test]
        fn no_cgroup_path_leads_up(path in "(/|\\.\\.|\\.|a|b){0,8}") {
            if let Some(path) = cgroup_path(&path) {
                prop_assert!(path.is_relative() && path.components().all(|part| matches!(part, Component::Normal(_))));
            }
        }
    }
}
