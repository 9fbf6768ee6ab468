//! Kernel settings and resource limits that container workloads expect.

use std::{fs, path::Path};

use nix::sys::resource::{Resource, setrlimit};

use bulkhead_guest_common::bounded;

use crate::{
    ceilings::{Ceilings, Machine},
    cgroup,
    error::Error,
    log,
};

/// `/proc/sys` path and value.
const SYSCTLS: [(&str, &str); 17] = [
    // Open files cost the memory of those who open them. The kernel's own limit, a tenth of the memory, is one pot that
    // a single container can empty.
    ("fs/file-max", "9223372036854775807"),
    ("fs/inotify/max_user_instances", "8192"),
    ("fs/inotify/max_user_watches", "1048576"),
    ("fs/protected_hardlinks", "1"),
    ("fs/protected_symlinks", "1"),
    // Each container has a session keyring, and those of the same user count together.
    ("kernel/keys/maxbytes", "400000"),
    ("kernel/keys/maxkeys", "20000"),
    ("kernel/dmesg_restrict", "1"),
    ("kernel/kptr_restrict", "1"),
    ("kernel/pid_max", "4194304"),
    // Terminals kept for the VM's own /dev/pts, where nobody opens one; the default takes a quarter from containers.
    ("kernel/pty/reserve", "16"),
    ("kernel/unprivileged_bpf_disabled", "1"),
    // As on a kernel without Yama: debuggers attach as they do under Docker elsewhere.
    ("kernel/yama/ptrace_scope", "0"),
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/ping_group_range", "0 2147483647"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("vm/max_map_count", "262144"),
];

/// Soft and hard limit of open files of services and containers. The soft one is small, because some programs close
/// every possible descriptor one by one.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

fn set(name: &str, value: &str) {
    if let Err(error) = fs::write(Path::new("/proc/sys").join(name), value) {
        log::info(&format!("cannot set {name}: {error}"));
    }
}

/// Returns the size of the VM; `None` if the kernel's files are not as expected.
fn machine(meminfo: &str, threads: &str) -> Option<Machine> {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(Machine { memory: kib.checked_mul(1024)?, threads: threads.trim().parse().ok()? })
}

/// Limits what containers can take together.
fn set_ceilings() -> Result<(), Error> {
    let read = |path: &str| {
        let bytes = bounded::read_file(path, 16 * 1024).map_err(Error::file("read", path))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let (memory, threads) = (read("/proc/meminfo")?, read("/proc/sys/kernel/threads-max")?);
    let Some(machine) = machine(&memory, &threads) else {
        log::info("cannot tell the size of the VM, so containers together have no limits");
        return Ok(());
    };
    let ceilings = Ceilings::of(machine);
    set("kernel/pty/max", &ceilings.terminals.to_string());
    cgroup::limit(&ceilings)
}

/// Applies the settings and limits. A setting that this kernel lacks is logged and skipped.
pub(crate) fn apply() -> Result<(), Error> {
    for (name, value) in SYSCTLS {
        set(name, value);
    }
    set_ceilings()?;
    // Services inherit init's limits, and containers theirs.
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.0, OPEN_FILES.1).map_err(Error::system("set the open-file limit"))?;
    setrlimit(Resource::RLIMIT_NPROC, libc::RLIM_INFINITY, libc::RLIM_INFINITY)
        .map_err(Error::system("set the process limit"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_size_of_a_machine_is_read() {
        let read = machine("MemFree: 1 kB\nMemTotal:        4015736 kB\nx\n", "31234\n").unwrap();
        assert_eq!(read, Machine { memory: 4_015_736 * 1024, threads: 31_234 });
        for (memory, threads) in [("", "1"), ("MemTotal: x kB", "1"), ("MemTotal: 1 MB", "1"), ("MemTotal: 1 kB", "")] {
            assert_eq!(machine(memory, threads), None);
        }
        assert_eq!(machine(&format!("MemTotal: {} kB", u64::MAX), "1"), None);
    }

    #[test]
    fn this_machine_has_a_size() {
        let read = |path| fs::read_to_string(path).unwrap();
        assert!(machine(&read("/proc/meminfo"), &read("/proc/sys/kernel/threads-max")).is_some());
    }

    proptest! {
        #[test]
        fn no_text_panics(memory in "(MemTotal:| |[0-9]{1,21}|kB|\n){0,8}", threads in "[0-9]{0,21}") {
            let _ = machine(&memory, &threads);
        }
    }
}
