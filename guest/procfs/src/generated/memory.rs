//! `/proc/meminfo`.

use std::{collections::BTreeMap, fmt::Write};

use crate::cgroup::{Cgroup, Limits};

/// A container's memory usage, in bytes.
#[derive(Clone, Debug, Default)]
struct Usage {
    current: u64,
    swap: u64,
    parts: BTreeMap<String, u64>,
}

impl Usage {
    fn part(&self, name: &str) -> u64 {
        self.parts.get(name).copied().unwrap_or_default()
    }
}

/// The VM's text with the container's numbers; without a cgroup as it is.
pub(super) fn info(host: &str, limits: &Limits, group: Option<&Cgroup>) -> String {
    let Some(group) = group else { return host.to_owned() };
    let usage = Usage {
        current: group.number("memory.current").unwrap_or_default(),
        swap: group.number("memory.swap.current").unwrap_or_default(),
        parts: group.table("memory.stat"),
    };
    rewrite(host, limits, &usage)
}

/// Splits a line into its name and its number, which is in KiB for most.
fn line(text: &str) -> Option<(&str, u64)> {
    let (name, rest) = text.split_once(':')?;
    Some((name, rest.split_ascii_whitespace().next()?.parse().ok()?))
}

/// Rewrites `/proc/meminfo` line by line, so that the lines are those of the VM's kernel in its order.
fn rewrite(host: &str, limits: &Limits, usage: &Usage) -> String {
    let of_host: BTreeMap<_, _> = host.lines().filter_map(line).collect();
    let host_has = |name: &str| of_host.get(name).copied().unwrap_or_default().saturating_mul(1024);
    // Never more than the VM has: a limit may be far higher, and may be overcommitted by several containers.
    let total = limits.memory.unwrap_or(u64::MAX).min(host_has("MemTotal"));
    let free = total.saturating_sub(usage.current).min(host_has("MemFree"));
    // Reclaimable memory: pages of files and the kernel's caches, but no more than is in use.
    let cache = usage.part("active_file") + usage.part("inactive_file") + usage.part("slab_reclaimable");
    let available = free.saturating_add(cache.min(usage.current)).min(total).min(host_has("MemAvailable"));
    let swap = limits.swap.unwrap_or(u64::MAX).min(host_has("SwapTotal"));
    let parts = |names: &[&str]| names.iter().fold(0_u64, |sum, name| sum.saturating_add(usage.part(name)));
    let mut out = String::with_capacity(host.len());
    for text in host.lines() {
        let Some((name, before)) = line(text) else { continue };
        let bytes = match name {
            "MemTotal" => total,
            "MemFree" => free,
            "MemAvailable" => available,
            "SwapTotal" => swap,
            "SwapFree" => swap.saturating_sub(usage.swap).min(host_has("SwapFree")),
            "Cached" => parts(&["file"]),
            "Active" => parts(&["active_anon", "active_file"]),
            "Inactive" => parts(&["inactive_anon", "inactive_file"]),
            "Active(anon)" => parts(&["active_anon"]),
            "Inactive(anon)" => parts(&["inactive_anon"]),
            "Active(file)" => parts(&["active_file"]),
            "Inactive(file)" => parts(&["inactive_file"]),
            "Unevictable" => parts(&["unevictable"]),
            "Dirty" => parts(&["file_dirty"]),
            "Writeback" => parts(&["file_writeback"]),
            "AnonPages" => parts(&["anon"]),
            "Mapped" => parts(&["file_mapped"]),
            "Shmem" => parts(&["shmem"]),
            "KReclaimable" | "SReclaimable" => parts(&["slab_reclaimable"]),
            "SUnreclaim" => parts(&["slab_unreclaimable"]),
            "Slab" => parts(&["slab_reclaimable", "slab_unreclaimable"]),
            "KernelStack" => parts(&["kernel_stack"]),
            "PageTables" => parts(&["pagetables"]),
            "Percpu" => parts(&["percpu"]),
            "AnonHugePages" => parts(&["anon_thp"]),
            "ShmemHugePages" => parts(&["shmem_thp"]),
            "FileHugePages" => parts(&["file_thp"]),
            // Accounted for the whole machine only. The VM's numbers would tell a container about others.
            "Buffers" | "SwapCached" | "Mlocked" | "NFS_Unstable" | "Bounce" | "WritebackTmp" | "Committed_AS"
            | "VmallocUsed" | "DirectMap4k" | "DirectMap2M" | "DirectMap1G" | "Balloon" => 0,
            // As the kernel computes it with the default overcommit_ratio of 50.
            "CommitLimit" => (total / 2).saturating_add(swap),
            // Sizes of pages and constants of the kernel.
            _ => before.saturating_mul(1024),
        };
        let has_unit = text.ends_with("kB");
        // As the kernel writes it (fs/proc/meminfo.c): the name has 15 columns and a space, or more, and the number ends in
        // column 24 unless it is longer.
        let (label, number) = (format!("{name}:"), bytes / 1024);
        let width = 23_usize.saturating_sub(label.len().max(15));
        let _ = writeln!(out, "{label:<15} {number:>width$}{}", if has_unit { " kB" } else { "" });
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOST: &str = "\
MemTotal:        4000000 kB
MemFree:         3000000 kB
MemAvailable:    3500000 kB
Buffers:             100 kB
Cached:           200000 kB
SwapTotal:             0 kB
SwapFree:              0 kB
Committed_AS:     123456 kB
VmallocTotal:   34359738367 kB
HugePages_Total:       3
Hugepagesize:       2048 kB
";

    fn limits(memory: Option<u64>) -> Limits {
        Limits { memory, swap: None, cpus: None, cpu_set: Vec::new() }
    }

    fn usage(current: u64, parts: &[(&str, u64)]) -> Usage {
        Usage { current, swap: 0, parts: parts.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect() }
    }

    #[test]
    fn a_limit_is_the_total_and_usage_is_taken_from_it() {
        let usage = usage(24 << 20, &[("file", 8 << 20), ("inactive_file", 8 << 20)]);
        let text = rewrite(HOST, &limits(Some(64 << 20)), &usage);
        let expected = "\
MemTotal:          65536 kB
MemFree:           40960 kB
MemAvailable:      49152 kB
Buffers:               0 kB
Cached:             8192 kB
SwapTotal:             0 kB
SwapFree:              0 kB
Committed_AS:          0 kB
VmallocTotal:   34359738367 kB
HugePages_Total:       3
Hugepagesize:       2048 kB
";
        assert_eq!(text, expected);
    }

    #[test]
    fn without_a_limit_the_total_is_the_vms() {
        let text = rewrite(HOST, &limits(None), &usage(1 << 20, &[]));
        assert!(text.starts_with("MemTotal:        4000000 kB\nMemFree:         3000000 kB\n"), "{text}");
    }

    proptest! {
        #[test]
        fn nothing_overflows_and_free_memory_is_never_more_than_the_total(
            host in "(Mem(Total|Free|Available)|Swap(Total|Free)|Cached)?: *[0-9]{0,20}( kB)?(\n(MemTotal|MemFree|MemAvailable|X):? *[0-9]{0,20}( kB)?){0,4}",
            memory: Option<u64>, current: u64, part: u64,
        ) {
            let parts = [("file", part), ("active_file", part / 4), ("inactive_file", part / 4), ("slab_reclaimable", part / 4)];
            let text = rewrite(&host, &limits(memory), &usage(current, &parts));
            // Readers split the lines at spaces.
            for line in text.lines().filter(|line| line.contains(':')) {
                prop_assert!(line.split_once(": ").is_some(), "{}", line);
            }
            let has: BTreeMap<_, _> = text.lines().filter_map(line).collect();
            let free = has.get("MemFree").copied().unwrap_or_default();
            prop_assert!(has.get("MemTotal").is_none_or(|total| free <= *total));
        }
    }
}
