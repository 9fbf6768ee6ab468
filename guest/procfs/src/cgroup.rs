//! What a container's cgroup (v2) allows and uses. Everything read here is written by the kernel; it is read with
//! bounds nevertheless, because a container decides how much of it there is.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use bulkhead_guest_common::bounded;

/// Longest file of a cgroup that is read, in bytes.
const MAX_FILE: u64 = 256 * 1024;

/// Most cgroups that a container's own tree is followed into.
const MAX_GROUPS: usize = 64;

/// Highest CPU number that is looked at.
const MAX_CPU: u32 = 8192;

/// A cgroup and those above it.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    mount: PathBuf,
    path: PathBuf,
}

/// A container's limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Bytes of memory.
    pub(crate) memory: Option<u64>,
    /// Bytes of swap.
    pub(crate) swap: Option<u64>,
    /// CPU time per time, rounded up to whole CPUs.
    pub(crate) cpus: Option<u32>,
    /// The CPUs that it may run on; empty when that can't be told.
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

    /// The smallest of a limit here and in every group above.
    fn lowest<T: Ord>(&self, name: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let groups = self.path.ancestors().filter(|path| !path.as_os_str().is_empty());
        groups.filter_map(|path| parse(&text(&self.mount.join(path).join(name))?)).min()
    }

    /// The limits.
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            memory: self.lowest("memory.max", number),
            swap: self.lowest("memory.swap.max", number),
            cpus: self.lowest("cpu.max", whole_cpus),
            cpu_set: self.file("cpuset.cpus.effective").map(|list| cpu_list(&list)).unwrap_or_default(),
        }
    }

    /// One number in a file of its own.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        number(&self.file(name)?)
    }

    /// A file of lines `key value`.
    pub(crate) fn table(&self, name: &str) -> BTreeMap<String, u64> {
        let text = self.file(name).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.split_once(' ').and_then(|(key, value)| Some((key.to_owned(), number(value)?))))
            .collect()
    }

    /// The processes here and below, at most `most`.
    pub(crate) fn processes(&self, most: usize) -> Vec<u32> {
        let mut groups = vec![self.mount.join(&self.path)];
        let mut processes = Vec::new();
        let mut visited = 0;
        while let Some(group) = groups.pop() {
            visited += 1;
            let list = text(&group.join("cgroup.procs")).unwrap_or_default();
            processes.extend(list.lines().filter_map(|line| line.parse::<u32>().ok()));
            if processes.len() >= most || visited >= MAX_GROUPS {
                break;
            }
            let below = fs::read_dir(&group).into_iter().flatten().flatten();
            let below = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            groups.extend(below.map(|entry| entry.path()).take(MAX_GROUPS));
        }
        processes.truncate(most);
        processes
    }
}

/// A file's text, up to a bound.
pub(crate) fn text(path: &Path) -> Option<String> {
    let bytes = bounded::read_file(path, MAX_FILE).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// A number; `max` is none.
fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// `QUOTA PERIOD` in whole CPUs, rounded up.
fn whole_cpus(text: &str) -> Option<u32> {
    let mut words = text.split_ascii_whitespace();
    let quota: u64 = words.next()?.parse().ok()?;
    let period: u64 = words.next()?.parse().ok().filter(|period| *period > 0)?;
    u32::try_from(quota.div_ceil(period).max(1)).ok()
}

/// A list such as `0-2,5`.
pub(crate) fn cpu_list(text: &str) -> Vec<u32> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) {
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

/// The list as the kernel writes it.
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
    /// The CPUs that a program in the container is to see, of those that are online in the VM.
    pub(crate) fn visible_cpus(&self, online: &[u32]) -> Vec<u32> {
        let allowed: Vec<u32> = online.iter().copied().filter(|cpu| self.cpu_set.contains(cpu)).collect();
        let mut cpus = if allowed.is_empty() { online.to_vec() } else { allowed };
        if let Some(most) = self.cpus {
            cpus.truncate(most as usize);
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
