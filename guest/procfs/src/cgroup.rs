//! Limits and usage of a container's cgroup (cgroup v2).
//!
//! The kernel writes the files that are read here. They are read with bounds nevertheless, because a container decides
//! how many processes and cgroups of its own there are.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use bulkhead_guest_common::bounded;

/// Mount point of the VM's cgroup file system.
pub(crate) const CGROUPS: &str = "/sys/fs/cgroup";

/// Maximum length of a file that is read, in bytes.
const MAX_FILE: u64 = 256 * 1024;

/// Maximum number of cgroups visited in a container's own tree.
const MAX_GROUPS: usize = 64;

/// Highest CPU number in a list; `NR_CPUS` is 8192 at most.
const MAX_CPU: u32 = 8192;

/// A cgroup, and by its path those above it.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    mount: PathBuf,
    path: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Memory, in bytes.
    pub(crate) memory: Option<u64>,
    /// Swap, in bytes.
    pub(crate) swap: Option<u64>,
    /// CPU time, in whole CPUs, rounded up.
    pub(crate) cpus: Option<u32>,
    /// The CPUs that it may run on; empty when they are not known.
    pub(crate) cpu_set: Vec<u32>,
}

impl Cgroup {
    /// The cgroup at `path`, relative to the mount of the cgroup file system.
    pub(crate) fn new(mount: &Path, path: &Path) -> Self {
        Self { mount: mount.to_owned(), path: path.to_owned() }
    }

    fn file(&self, name: &str) -> Option<String> {
        text(&self.mount.join(&self.path).join(name))
    }

    /// The smallest of a limit in this group and in every group above, which is the one that holds.
    fn lowest<T: Ord>(&self, name: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let groups = self.path.ancestors().filter(|path| !path.as_os_str().is_empty());
        groups.filter_map(|path| parse(&text(&self.mount.join(path).join(name))?)).min()
    }

    /// Returns the limits that hold for this group.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            memory: self.lowest("memory.max", number),
            swap: self.lowest("memory.swap.max", number),
            cpus: self.lowest("cpu.max", whole_cpus),
            // The effective set is intersected with those above already.
            cpu_set: self.file("cpuset.cpus.effective").map(|list| cpu_list(&list)).unwrap_or_default(),
        }
    }

    /// Reads a file with a single number.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        number(&self.file(name)?)
    }

    /// Reads a file of lines `KEY VALUE`.
    pub(crate) fn table(&self, name: &str) -> BTreeMap<String, u64> {
        let text = self.file(name).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.split_once(' ').and_then(|(key, value)| Some((key.to_owned(), number(value)?))))
            .collect()
    }

    /// Returns the processes of this group and those below, at most `max`.
    pub(crate) fn processes(&self, max: usize) -> Vec<u32> {
        let mut groups = vec![self.mount.join(&self.path)];
        let mut processes = Vec::new();
        let mut visited = 0;
        while let Some(group) = groups.pop() {
            visited += 1;
            let list = text(&group.join("cgroup.procs")).unwrap_or_default();
            processes.extend(list.lines().filter_map(|line| line.parse::<u32>().ok()));
            // An inner engine or systemd has a tree of cgroups in here; a hostile container has a large one.
            if processes.len() >= max || visited >= MAX_GROUPS {
                break;
            }
            let below = fs::read_dir(&group).into_iter().flatten().flatten();
            let below = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            groups.extend(below.map(|entry| entry.path()).take(MAX_GROUPS));
        }
        processes.truncate(max);
        processes
    }
}

/// Reads a text file of the kernel's, up to a bound.
pub(crate) fn text(path: &Path) -> Option<String> {
    let bytes = bounded::read_file(path, MAX_FILE).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Parses a number; `max`, the absence of a limit, is `None`.
fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// Parses `QUOTA PERIOD` to whole CPUs, rounded up.
fn whole_cpus(text: &str) -> Option<u32> {
    let mut words = text.split_ascii_whitespace();
    let quota: u64 = words.next()?.parse().ok()?;
    let period: u64 = words.next()?.parse().ok().filter(|period| *period > 0)?;
    u32::try_from(quota.div_ceil(period).max(1)).ok()
}

/// Parses a list such as `0-2,5`.
pub(crate) fn cpu_list(text: &str) -> Vec<u32> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) {
            // Bounded, so that `0-4294967295` is not expanded.
            cpus.extend(first..=last.min(MAX_CPU));
        }
        if cpus.len() > MAX_CPU as usize {
            break;
        }
    }
    cpus.sort_unstable();
    cpus.dedup();
    cpus
}

/// Formats a sorted list as the kernel does.
pub(crate) fn write_cpu_list(cpus: &[u32]) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for cpu in cpus {
        match ranges.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(*cpu) => *last = *cpu,
            _ => ranges.push((*cpu, *cpu)),
        }
    }
    let parts =
        ranges.iter().map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") });
    parts.collect::<Vec<_>>().join(",")
}

impl Limits {
    /// The limits of a container without a cgroup.
    pub(crate) fn none() -> Self {
        Self { memory: None, swap: None, cpus: None, cpu_set: Vec::new() }
    }

    /// Returns the CPUs that a container sees, out of those that are online in the VM.
    pub(crate) fn visible_cpus(&self, online: &[u32]) -> Vec<u32> {
        let allowed: Vec<u32> = online.iter().copied().filter(|cpu| self.cpu_set.contains(cpu)).collect();
        let mut cpus = if allowed.is_empty() { online.to_vec() } else { allowed };
        // A quota of 1.5 CPUs shows two: programs size their thread pools by this.
        if let Some(count) = self.cpus {
            cpus.truncate(count as usize);
        }
        cpus
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn group(dir: &Path, files: &[(&str, &str)]) -> Cgroup {
        for (path, contents) in files {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
        Cgroup::new(dir, Path::new("docker/c"))
    }

    #[test]
    fn the_tightest_limit_of_all_groups_above_holds() {
        let dir = tempfile::tempdir().unwrap();
        let group = group(
            dir.path(),
            &[
                ("docker/c/memory.max", "max\n"),
                ("docker/memory.max", "1000\n"),
                ("memory.max", "1\n"),
                ("docker/c/cpu.max", "150000 100000\n"),
                ("docker/cpu.max", "max 100000\n"),
                ("docker/c/cpuset.cpus.effective", "1-2,4\n"),
            ],
        );
        let expected = Limits { memory: Some(1000), swap: None, cpus: Some(2), cpu_set: vec![1, 2, 4] };
        assert_eq!(group.limits(), expected);
        assert_eq!(expected.visible_cpus(&[0, 1, 2, 3, 4]), [1, 2]);
    }

    #[test]
    fn processes_of_groups_below_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let files = [("docker/c/cgroup.procs", "5\n6\n"), ("docker/c/inner/cgroup.procs", "7\n")];
        let group = group(dir.path(), &files);
        assert_eq!(group.processes(10), [5, 6, 7]);
        assert_eq!(group.processes(1), [5]);
    }

    #[test]
    fn without_a_cpu_set_all_that_are_online_are_seen() {
        let limits = Limits { memory: None, swap: None, cpus: None, cpu_set: Vec::new() };
        assert_eq!(limits.visible_cpus(&[0, 1]), [0, 1]);
    }

    proptest! {
        #[test]
        fn a_list_of_cpus_is_read_as_it_is_written(cpus in proptest::collection::btree_set(0_u32..200, 0..40)) {
            let cpus: Vec<_> = cpus.into_iter().collect();
            prop_assert_eq!(cpu_list(&write_cpu_list(&cpus)), cpus);
        }

        #[test]
        fn no_text_panics_or_makes_a_long_list(text in "[0-9,\\-\n max]{0,40}") {
            prop_assert!(cpu_list(&text).len() <= 2 * MAX_CPU as usize + 2);
            let _ = whole_cpus(&text);
        }
    }
}
