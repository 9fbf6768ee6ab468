//! The files that are generated: what a container would see if it were the whole machine.

mod cpu;
mod memory;
mod product;

use std::{
    io,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use bulkhead_guest_common::registry::Container;
use rustix::time::ClockId;

use crate::{
    cgroup::{self, Cgroup, Limits},
    files::View,
    loadavg::Loads,
};

/// Where the VM has its cgroups.
pub(crate) const CGROUPS: &str = "/sys/fs/cgroup";

/// Clock ticks in a second, as programs see them (`USER_HZ`, the same on every x86-64 Linux).
const TICKS: u64 = 100;

/// `/proc/swaps` without any.
const SWAPS: &str = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";

/// Generates a file.
pub(crate) fn generate(view: View, container: &Container, loads: &Loads) -> io::Result<String> {
    let group = container.cgroup.as_deref().map(|path| Cgroup::new(Path::new(CGROUPS), path));
    let limits = || group.as_ref().map_or_else(Limits::none, Cgroup::limits);
    let age = age(container);
    Ok(match view {
        View::Uptime => uptime(age),
        View::Swaps => SWAPS.to_owned(),
        View::Memory => memory::info(&host("/proc/meminfo")?, &limits(), group.as_ref()),
        View::CpuInfo => cpu::info(&host("/proc/cpuinfo")?, &limits().visible_cpus(&online()?)),
        View::CpuOnline => format!("{}\n", cgroup::write_cpu_list(&limits().visible_cpus(&online()?))),
        View::Statistics => {
            let used = group.as_ref().map(|group| group.table("cpu.stat")).unwrap_or_default();
            let load = loads.get(container.slot);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            cpu::statistics(&limits().visible_cpus(&online()?), &used, age, now.saturating_sub(age / TICKS), load)
        }
        View::LoadAverage => loads.get(container.slot).line(),
        View::ProductUuid => {
            let own = host("/sys/devices/virtual/dmi/id/product_uuid").unwrap_or_default();
            product::uuid(&own, &container.id)
        }
    })
}

impl Limits {
    /// No limits.
    fn none() -> Self {
        Self { memory: None, swap: None, cpus: None, cpu_set: Vec::new() }
    }
}

fn host(path: &str) -> io::Result<String> {
    cgroup::text(Path::new(path)).ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn online() -> io::Result<Vec<u32>> {
    host("/sys/devices/system/cpu/online").map(|list| cgroup::cpu_list(&list))
}

/// How long the container has been there, in clock ticks.
fn age(container: &Container) -> u64 {
    let now = rustix::time::clock_gettime(ClockId::Boottime);
    let ticks = now.tv_sec.unsigned_abs() * TICKS + now.tv_nsec.unsigned_abs() / (1_000_000_000 / TICKS);
    ticks.saturating_sub(container.creator.started)
}

/// Both fields are the same, as Enhanced Container Isolation has them.
fn uptime(age: u64) -> String {
    let (seconds, rest) = (age / TICKS, age % TICKS);
    format!("{seconds}.{rest:02} {seconds}.{rest:02}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::container;

    #[test]
    fn uptime_has_the_same_number_twice_and_begins_with_the_container() {
        assert_eq!(uptime(586), "5.86 5.86\n");
        assert_eq!(uptime(3), "0.03 0.03\n");
        // The container of the test is as old as this process.
        assert!(age(&container("a")) < 600 * TICKS);
    }

    #[test]
    fn every_view_can_be_generated_without_a_cgroup() {
        let loads = Loads::default();
        for view in [View::CpuInfo, View::CpuOnline, View::LoadAverage, View::Memory, View::Statistics, View::Swaps] {
            let text = generate(view, &container("a"), &loads).unwrap();
            assert!(text.ends_with('\n'), "{view:?}: {text:?}");
        }
    }
}
