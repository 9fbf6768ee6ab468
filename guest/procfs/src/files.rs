//! The list of files that a container has of its own.

use crate::sysctl_rules::{Lines, Rule};

/// A file.
#[derive(Debug, PartialEq, Eq)]
pub struct Node {
    /// Where it goes in the container.
    pub path: &'static str,
    /// Its permissions.
    pub mode: u32,
    /// Where what is read comes from.
    pub(crate) source: Source,
}

impl Node {
    /// Its name in the container's directory of the tree.
    pub fn file_name(&self) -> String {
        self.path.trim_start_matches('/').replace('/', "+")
    }

    /// Whether it shows or takes more than the kernel's file, for a container whose sysctls are `read_only` or not.
    pub fn adds(&self, read_only: bool) -> bool {
        self.source != Source::Name || !read_only
    }

    /// Whether the kernel of this VM has the file at all, without which there is no place to mount on.
    pub fn exists(&self) -> bool {
        std::fs::symlink_metadata(self.path).is_ok()
    }
}

/// Where what is read comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Generated from the container's cgroup and age.
    View(View),
    /// A value that is set by writing.
    Value(Rule),
    /// The kernel's own file, as the one who asks sees it.
    Name,
}

/// What is generated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum View {
    /// `/proc/cpuinfo`.
    CpuInfo,
    /// `/sys/devices/system/cpu/online`.
    CpuOnline,
    /// `/proc/loadavg`.
    LoadAverage,
    /// `/proc/meminfo`.
    Memory,
    /// `/sys/devices/virtual/dmi/id/product_uuid`.
    ProductUuid,
    /// `/proc/stat`.
    Statistics,
    /// `/proc/swaps`.
    Swaps,
    /// `/proc/uptime`.
    Uptime,
}

const fn view(path: &'static str, mode: u32, view: View) -> Node {
    Node { path, mode, source: Source::View(view) }
}

const fn value(path: &'static str, mode: u32, rule: Rule) -> Node {
    Node { path, mode, source: Source::Value(rule) }
}

const fn own(low: i64, high: i64) -> Rule {
    Rule::Own(Lines { numbers: 1, low, high })
}

const ANY_INT: Rule = own(i32::MIN as i64, i32::MAX as i64);

const fn raise(ceiling: i64) -> Rule {
    Rule::Raise { low: 0, ceiling }
}

/// All of them. Their places are part of inode numbers: new ones go at the end.
pub const NODES: &[Node] = &[
    view("/proc/uptime", 0o444, View::Uptime),
    view("/proc/swaps", 0o444, View::Swaps),
    view("/proc/meminfo", 0o444, View::Memory),
    view("/proc/cpuinfo", 0o444, View::CpuInfo),
    view("/proc/stat", 0o444, View::Statistics),
    view("/proc/loadavg", 0o444, View::LoadAverage),
    view("/sys/devices/system/cpu/online", 0o444, View::CpuOnline),
    view("/sys/devices/virtual/dmi/id/product_uuid", 0o400, View::ProductUuid),
    value("/sys/module/nf_conntrack/parameters/hashsize", 0o600, raise(1 << 20)),
    value("/proc/sys/kernel/dmesg_restrict", 0o644, own(0, 1)),
    value("/proc/sys/kernel/kptr_restrict", 0o644, own(0, 2)),
    value("/proc/sys/kernel/panic", 0o644, ANY_INT),
    value("/proc/sys/kernel/panic_on_oops", 0o644, ANY_INT),
    // 301 is the kernel's own lowest (RESERVED_PIDS + 1), the highest PID_MAX_LIMIT.
    value("/proc/sys/kernel/pid_max", 0o644, own(301, 4_194_304)),
    value("/proc/sys/kernel/printk", 0o644, Rule::Own(Lines { numbers: 4, low: 0, high: i32::MAX as i64 })),
    value("/proc/sys/kernel/sysrq", 0o644, own(0, 511)),
    value("/proc/sys/kernel/yama/ptrace_scope", 0o644, own(0, 3)),
    value("/proc/sys/fs/file-max", 0o644, raise(1 << 24)),
    value("/proc/sys/fs/nr_open", 0o644, raise(1 << 22)),
    value("/proc/sys/fs/protected_hardlinks", 0o600, own(0, 1)),
    value("/proc/sys/fs/protected_symlinks", 0o600, own(0, 1)),
    value("/proc/sys/vm/mmap_min_addr", 0o644, own(0, i64::MAX)),
    value("/proc/sys/vm/overcommit_memory", 0o644, own(0, 2)),
    // What else the network has is per namespace in this kernel, and the container's root may write it.
    value("/proc/sys/net/netfilter/nf_conntrack_max", 0o644, raise(1 << 22)),
    Node { path: "/proc/sys/kernel/hostname", mode: 0o644, source: Source::Name },
    Node { path: "/proc/sys/kernel/domainname", mode: 0o644, source: Source::Name },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_absolute_plain_and_listed_once() {
        for (place, node) in NODES.iter().enumerate() {
            assert!(node.path.starts_with("/proc/") || node.path.starts_with("/sys/"), "{}", node.path);
            assert!(!node.path.contains("//") && !node.path.contains("..") && !node.path.contains('+'));
            assert!(NODES[..place].iter().all(|other| other.path != node.path));
        }
    }

    #[test]
    fn where_names_can_not_be_written_the_kernels_files_do() {
        let left_out: Vec<_> = NODES.iter().filter(|node| !node.adds(true)).map(|node| node.path).collect();
        assert_eq!(left_out, ["/proc/sys/kernel/hostname", "/proc/sys/kernel/domainname"]);
        assert!(NODES.iter().all(|node| node.adds(false)));
    }

    #[test]
    fn what_is_generated_can_not_be_written() {
        for node in NODES {
            if let Source::View(_) = node.source {
                assert_eq!(node.mode & 0o222, 0, "{}", node.path);
            }
        }
    }
}
