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
    // Each container has a keyring of its own, charged to one user.
    ("kernel/keys/maxbytes", "400000"),
    ("kernel/keys/maxkeys", "20000"),
    ("kernel/dmesg_restrict", "1"),
    ("kernel/kptr_restrict", "1"),
    ("kernel/pid_max", "4194304"),
    ("kernel/unprivileged_bpf_disabled", "1"),
    // As without that module: debuggers attach as they do under Docker elsewhere.
    ("kernel/yama/ptrace_scope", "0"),
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv4/ping_group_range", "0 2147483647"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("vm/max_map_count", "262144"),
];

/// Open files of services and containers, soft and hard: small soft limits keep programs fast that walk all of them.
const OPEN_FILES: (u64, u64) = (1024, 524_288);

/// Applies them; a setting that this kernel lacks is logged and skipped.
pub(crate) fn apply() -> Result<(), Error> {
    for (name, value) in SYSCTLS {
        if let Err(error) = fs::write(Path::new("/proc/sys").join(name), value) {
            log::info(&format!("can't set {name}: {error}"));
        }
    }
    setrlimit(Resource::RLIMIT_NOFILE, OPEN_FILES.0, OPEN_FILES.1).map_err(Error::system("set the open-file limit"))?;
    setrlimit(Resource::RLIMIT_NPROC, libc::RLIM_INFINITY, libc::RLIM_INFINITY)
        .map_err(Error::system("set the process limit"))
}
