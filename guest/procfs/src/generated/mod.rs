//! Generates files of `/proc` and `/sys`: each shows the container as if it were the whole machine.
//!
//! Everything comes from the container's cgroup, the age of its creator and the VM's own files. Numbers that the kernel
//! does not have for a cgroup are zero.

mod cpu;
mod memory;
mod product;
mod uptime;

use std::{
    io,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use bulkhead_guest_common::registry::Container;

use self::uptime::TICKS;
use crate::{
    cgroup::{self, CGROUPS, Cgroup, Limits},
    files::Generated,
    loadavg::Loads,
};

/// `/proc/swaps` without any swap area.
const SWAPS: &str = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";

/// Generates a file for a container.
pub(crate) fn generate(file: Generated, container: &Container, loads: &Loads) -> io::Result<String> {
    let group = container.cgroup.as_deref().map(|path| Cgroup::new(Path::new(CGROUPS), path));
    let limits = || group.as_ref().map_or_else(Limits::none, Cgroup::limits);
    let age = uptime::age(container);
    Ok(match file {
        Generated::Uptime => uptime::line(age),
        Generated::Swaps => SWAPS.to_owned(),
        Generated::Memory => memory::info(&host("/proc/meminfo")?, &limits(), group.as_ref()),
        Generated::CpuInfo => cpu::info(&host("/proc/cpuinfo")?, &limits().visible_cpus(&online()?)),
        Generated::CpuOnline => format!("{}\n", cgroup::write_cpu_list(&limits().visible_cpus(&online()?))),
        // Boot time is the container's start, so that `now - btime` agrees with its uptime.
        Generated::Statistics => {
            let used = group.as_ref().map(|group| group.table("cpu.stat")).unwrap_or_default();
            let load = loads.get(container.slot);
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            cpu::statistics(&limits().visible_cpus(&online()?), &used, age, now.saturating_sub(age / TICKS), load)
        }
        Generated::LoadAverage => loads.get(container.slot).line(),
        Generated::ProductUuid => {
            // A VM without SMBIOS has no UUID; the container's part is enough to tell containers apart.
            let own = host("/sys/devices/virtual/dmi/id/product_uuid").unwrap_or_default();
            product::uuid(&own, &container.id)
        }
    })
}

fn host(path: &str) -> io::Result<String> {
    cgroup::text(Path::new(path)).ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn online() -> io::Result<Vec<u32>> {
    host("/sys/devices/system/cpu/online").map(|list| cgroup::cpu_list(&list))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::container;

    #[test]
    fn files_are_generated_without_a_cgroup() {
        let loads = Loads::default();
        for file in [
            Generated::CpuInfo,
            Generated::CpuOnline,
            Generated::LoadAverage,
            Generated::Memory,
            Generated::Statistics,
            Generated::Swaps,
        ] {
            let text = generate(file, &container("a"), &loads).unwrap();
            assert!(text.ends_with('\n'), "{file:?}: {text:?}");
        }
    }
}
