//! The files of `/proc` and `/sys` that each container has of its own.
//!
//! The table is the single list of them: runtime and `seccomp_notify` mount its entries, the FUSE tree serves them.

use crate::sysctl_rules::{Ceiling, Numbers, Rule};

/// A file that containers have of their own.
#[derive(Debug, PartialEq, Eq)]
pub struct Node {
    /// Absolute path in the container; also that of the kernel's file.
    pub path: &'static str,
    /// Permission bits, those of the kernel's file.
    pub mode: u32,
    /// Source of its contents.
    pub(crate) source: Source,
}

impl Node {
    /// Name in the container's directory of the tree (`proc+uptime`).
    pub fn file_name(&self) -> String {
        // Unambiguous, since no path has a plus in it.
        self.path.trim_start_matches('/').replace('/', "+")
    }

    /// Returns whether it differs from the kernel's file in a container whose sysctls are `read_only` or not.
    ///
    /// The names read as in the kernel's file. Only for writing them root of a container needs this one.
    pub fn adds(&self, read_only: bool) -> bool {
        self.source != Source::Hostname || !read_only
    }

    /// Returns whether the VM's kernel has the file, without which there is nothing to mount on.
    pub fn exists(&self) -> bool {
        std::fs::symlink_metadata(self.path).is_ok()
    }
}

/// Source of a file's contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Generated from the container's cgroup, tasks and age; read-only.
    Generated(Generated),
    /// The value that the container has written, else the VM's.
    Sysctl(Rule),
    /// The kernel's own file, in the UTS namespace of the caller.
    Hostname,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Generated {
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

const fn generated(path: &'static str, mode: u32, file: Generated) -> Node {
    Node { path, mode, source: Source::Generated(file) }
}

const fn sysctl(path: &'static str, mode: u32, rule: Rule) -> Node {
    Node { path, mode, source: Source::Sysctl(rule) }
}

const fn per_container(low: i64, high: i64) -> Rule {
    Rule::PerContainer(Numbers { count: 1, low, high })
}

const ANY_INT: Rule = per_container(i32::MIN as i64, i32::MAX as i64);

const fn raising(ceiling: i64) -> Rule {
    Rule::Raise { low: 0, ceiling: Ceiling::Fixed(ceiling) }
}

const fn raising_by_memory(each: u64, most: i64) -> Rule {
    Rule::Raise { low: 0, ceiling: Ceiling::ByMemory { each, most } }
}

/// Memory of a tracked connection in bytes: `struct nf_conn`, whose cache aligns it to 320 at most, and its extensions
/// (NAT, counters, times, labels).
const CONNECTION: u64 = 512;

/// All files.
///
/// A file's index is part of its inode number, which a restarted service must read as its predecessor wrote it. So new
/// files go at the end, and there is room for 254.
pub const NODES: &[Node] = &[
    // The container as if it were the whole machine. `product_uuid` is root's to read, as in the kernel.
    generated("/proc/uptime", 0o444, Generated::Uptime),
    generated("/proc/swaps", 0o444, Generated::Swaps),
    generated("/proc/meminfo", 0o444, Generated::Memory),
    generated("/proc/cpuinfo", 0o444, Generated::CpuInfo),
    generated("/proc/stat", 0o444, Generated::Statistics),
    generated("/proc/loadavg", 0o444, Generated::LoadAverage),
    generated("/sys/devices/system/cpu/online", 0o444, Generated::CpuOnline),
    generated("/sys/devices/virtual/dmi/id/product_uuid", 0o400, Generated::ProductUuid),
    // Shared by all network namespaces: the VM's table grows to the largest that a container asks for.
    // A bucket is a pointer. As many as there may be connections, one for each, is all that a table needs.
    sysctl("/sys/module/nf_conntrack/parameters/hashsize", 0o600, raising_by_memory(CONNECTION, 1 << 20)),
    // Settings of the whole kernel. Inner engines, kubelet and systemd write them, and some fail if they cannot; the
    // value stays in the container.
    sysctl("/proc/sys/kernel/dmesg_restrict", 0o644, per_container(0, 1)),
    sysctl("/proc/sys/kernel/kptr_restrict", 0o644, per_container(0, 2)),
    sysctl("/proc/sys/kernel/panic", 0o644, ANY_INT),
    sysctl("/proc/sys/kernel/panic_on_oops", 0o644, ANY_INT),
    // The kernel's own bounds: RESERVED_PIDS + 1 and PID_MAX_LIMIT.
    sysctl("/proc/sys/kernel/pid_max", 0o644, per_container(301, 4_194_304)),
    sysctl("/proc/sys/kernel/printk", 0o644, Rule::PerContainer(Numbers { count: 4, low: 0, high: i32::MAX as i64 })),
    sysctl("/proc/sys/kernel/sysrq", 0o644, per_container(0, 511)),
    sysctl("/proc/sys/kernel/yama/ptrace_scope", 0o644, per_container(0, 3)),
    // Limits of the VM that a container can need more of. Raised up to a ceiling, never lowered.
    sysctl("/proc/sys/fs/file-max", 0o644, raising(1 << 24)),
    sysctl("/proc/sys/fs/nr_open", 0o644, raising(1 << 22)),
    sysctl("/proc/sys/fs/protected_hardlinks", 0o600, per_container(0, 1)),
    sysctl("/proc/sys/fs/protected_symlinks", 0o600, per_container(0, 1)),
    sysctl("/proc/sys/vm/mmap_min_addr", 0o644, per_container(0, i64::MAX)),
    sysctl("/proc/sys/vm/overcommit_memory", 0o644, per_container(0, 2)),
    // All other sysctls of the network are per namespace in this kernel, and the container's root may write them.
    // This one is a single value for all, by which the kernel limits each namespace by itself, and it charges the
    // connections to no container.
    sysctl("/proc/sys/net/netfilter/nf_conntrack_max", 0o644, raising_by_memory(CONNECTION, 1 << 22)),
    Node { path: "/proc/sys/kernel/hostname", mode: 0o644, source: Source::Hostname },
    Node { path: "/proc/sys/kernel/domainname", mode: 0o644, source: Source::Hostname },
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
    fn the_kernels_files_do_for_names_that_are_read_only() {
        let left_out: Vec<_> = NODES.iter().filter(|node| !node.adds(true)).map(|node| node.path).collect();
        assert_eq!(left_out, ["/proc/sys/kernel/hostname", "/proc/sys/kernel/domainname"]);
        assert!(NODES.iter().all(|node| node.adds(false)));
    }

    #[test]
    fn generated_files_are_read_only() {
        for node in NODES {
            if let Source::Generated(_) = node.source {
                assert_eq!(node.mode & 0o222, 0, "{}", node.path);
            }
        }
    }
}
