//! Kernel settings and resource limits that container workloads expect.

use std::{fs, path::Path};

use nix::sys::resource::{Resource, setrlimit};

use crate::{error::Error, log};

/// `/proc/sys` path and value.
const SYSCTLS: [(&str, &str); 15] = [
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

/// Applies the settings and limits. A setting that this kernel lacks is logged and skipped.
pub(crate) fn apply() -> Result<(), Error> {
    for (name, value) in SYSCTLS {
        if let Err(error) = fs::write(Path::new("/proc/sys").join(name), value) {
            log::info(&format!("cannot set {name}: {error}"));
        }
    }
    // Services inherit init's limits, and containers theirs.
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.0, OPEN_FILES.1).map_err(Error::system("set the open-file limit"))?;
    setrlimit(Resource::RLIMIT_NPROC, libc::RLIM_INFINITY, libc::RLIM_INFINITY)
        .map_err(Error::system("set the process limit"))
}
