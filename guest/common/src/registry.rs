//! The list of containers: one small file for each, written by the runtime and read by the procfs service.
//!
//! The two never talk to each other. A container can be created while the service does not run, and a restarted service
//! knows all of them. Each container has a number that no other one gets until the next boot.
//!
//! Everything is on a tmpfs that only root of the VM can write, so files are trusted but may be torn or missing.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Component, Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{bounded, namespace::Identity, process::Process};

/// The service's directory, on a tmpfs.
pub const STATE: &str = "/run/sysbox-runc/procfs";

/// Mount point of the tree of files, below [`STATE`].
pub const TREE: &str = "/run/sysbox-runc/procfs/fs";

/// Maximum length of a file, in bytes.
const MAX_FILE: u64 = 16 * 1024;

/// Highest number of a container. Inode numbers of the tree have eight further bits for the file.
pub const MAX_SLOT: u64 = u64::MAX >> 8;

/// A container, as its runtime describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Number of the container, which is the name of its directory in the tree.
    #[serde(default)]
    pub slot: u64,
    /// The engine's id of it.
    pub id: String,
    /// crun's state directory (`--root`), where it has a directory named by its id.
    pub state_root: PathBuf,
    /// The VM's user and group id of its root.
    pub owner: u32,
    /// User namespace of the container.
    pub user_namespace: Identity,
    /// Path of its cgroup, relative to the mount point of the cgroup file system.
    pub cgroup: Option<PathBuf>,
    /// True if `/proc/sys` is read-only, as engines have it in containers that are not privileged.
    pub read_only: bool,
    /// The runtime process that creates it. The container's age counts from its start.
    pub creator: Process,
}

impl Container {
    /// Returns whether it exists or is being created.
    pub fn lives(&self) -> bool {
        self.state_root.join(&self.id).exists() || self.creator.lives()
    }
}

/// Returns a cgroup's path without the leading slash; `None` for one that does not lead down from the root only.
///
/// The path comes from config.json, or from a process that may be in a cgroup namespace, where it can begin with `/..`.
pub fn cgroup_path(path: &str) -> Option<PathBuf> {
    let path = Path::new(path.trim_start_matches('/'));
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    (plain && !path.as_os_str().is_empty()).then(|| path.to_owned())
}

/// The files of all containers.
#[derive(Clone, Debug)]
pub struct Registry {
    containers: PathBuf,
    values: PathBuf,
}

impl Registry {
    /// Opens the registry in `state`, and creates it if it is missing.
    ///
    /// # Errors
    /// If a directory cannot be created.
    pub fn open(state: &Path) -> io::Result<Self> {
        let own = Self { containers: state.join("containers"), values: state.join("values") };
        DirBuilder::new().recursive(true).mode(0o711).create(state)?;
        for path in [&own.containers, &own.values] {
            DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        }
        Ok(own)
    }

    /// Enters a container under a new number and returns the number. An older entry with the same id is removed.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn enter(&self, container: Container) -> io::Result<u64> {
        // Several runtimes run at once. The lock is released with the descriptor, so a killed one leaves none behind.
        let lock = File::options().create(true).append(true).open(self.containers.join("lock"))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
        let next = self.containers.join("next");
        let last = match fs::read_to_string(&next) {
            Ok(text) => text.trim().parse().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?,
            // The first container since boot. Any other failure must not restart the count.
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0_u64,
            Err(error) => return Err(error),
        };
        let slot = last.checked_add(1).filter(|slot| *slot <= MAX_SLOT).ok_or(io::ErrorKind::QuotaExceeded)?;
        // Before the entry: a number that is given away twice would let one container see another's files.
        replace(&next, slot.to_string().as_bytes())?;
        // An engine uses an id again when it restarts a container; ids of different state directories may be equal.
        for old in self.all() {
            if old.id == container.id && old.state_root == container.state_root {
                self.remove(old.slot);
            }
        }
        let container = Container { slot, ..container };
        replace(&self.container_file(slot), &serde_json::to_vec(&container)?)?;
        Ok(slot)
    }

    /// Returns the container with this number, whether it still exists or not.
    pub fn get(&self, slot: u64) -> Option<Container> {
        let container: Container = serde_json::from_slice(&read(&self.container_file(slot))?).ok()?;
        // The content names the number as well: a file that was copied or renamed by hand is not an entry.
        (container.slot == slot).then_some(container)
    }

    /// Returns all containers, whether they still exist or not.
    pub fn all(&self) -> Vec<Container> {
        let entries = fs::read_dir(&self.containers).into_iter().flatten().flatten();
        // Also the lock, the last number and unfinished `.new` files are in this directory.
        let slots = entries.filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".json")?.parse().ok());
        slots.filter_map(|slot| self.get(slot)).collect()
    }

    /// Removes a container's entry and its sysctls.
    pub fn remove(&self, slot: u64) {
        let _ = fs::remove_file(self.container_file(slot));
        let _ = fs::remove_file(self.values_file(slot));
    }

    /// Removes the containers that do not exist any more, and returns their numbers.
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

    /// Path of the file with the sysctls that a container has written.
    pub fn values_file(&self, slot: u64) -> PathBuf {
        self.values.join(format!("{slot}.json"))
    }
}

/// Reads a file of the registry, up to a bound.
pub fn read(path: &Path) -> Option<Vec<u8>> {
    bounded::read_file(path, MAX_FILE).ok()
}

/// Replaces a file, so that readers see the old or the new contents and never a part.
///
/// # Errors
/// As write(2) and rename(2).
pub fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    // Without fsync(2): the directory is on a tmpfs, and nothing survives a crash of the VM. Concurrent writers of one
    // file hold a lock.
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
