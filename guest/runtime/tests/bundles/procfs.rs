//! The procfs service, as init starts it.

#[path = "../../../procfs/tests/support/mod.rs"]
mod support;

use std::{
    fs,
    path::{Path, PathBuf},
};

use bulkhead_guest_common::registry;

/// A service that ends with its owner.
pub struct ProcfsService(support::Service);

impl ProcfsService {
    /// Mounts the tree of files and starts `program`.
    pub fn start(program: &Path) -> Self {
        Self(support::Service::new(program, Path::new(registry::STATE)))
    }

    fn id(&self) -> u32 {
        self.0.process.as_ref().unwrap().id()
    }

    /// The number of containers in the registry.
    pub fn entries() -> usize {
        let files = fs::read_dir(PathBuf::from(registry::STATE).join("containers")).into_iter().flatten().flatten();
        files.filter(|file| file.path().extension().is_some_and(|it| it == "json")).count()
    }

    /// The number of containers and `exec` sessions whose mount calls it answers.
    pub fn listeners(&self) -> usize {
        let links = fs::read_dir(format!("/proc/{}/fd", self.id())).into_iter().flatten().flatten();
        let links = links.filter_map(|link| fs::read_link(link.path()).ok());
        links.filter(|link| link.to_string_lossy() == "anon_inode:seccomp notify").count()
    }

    /// The service's memory in KiB.
    pub fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }
}
