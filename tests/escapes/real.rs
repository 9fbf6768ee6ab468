//! The attempts that are known to be real: those that succeed without isolation.

/// The containers in which an attempt succeeds with isolation off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Real {
    /// In any container.
    Default,
    /// In a privileged one.
    Privileged,
    /// In none of this VM, for the reason given; the attempt is made so that it stays so.
    Never(&'static str),
}

const PATCHED: Real = Real::Never("runc and crun are patched");
const OWN_CGROUPS: Real = Real::Never("each container has a control group namespace; open with --cgroupns=host");
const OWN_PROCESSES: Real = Real::Never("each container has a process namespace; open with --pid=host");
const NOT_BUILT: Real = Real::Never("the VM's kernel has no such thing");

/// Every attempt.
pub const ATTEMPTS: &[(&str, Real)] = &[
    ("descriptors", PATCHED),
    ("working directory", PATCHED),
    ("core_pattern", Real::Privileged),
    ("usermode helpers", Real::Privileged),
    ("sysctls", Real::Privileged),
    ("sysfs files", Real::Privileged),
    ("procfs files", Real::Default),
    ("kernel memory", Real::Default),
    ("kernel addresses", Real::Privileged),
    ("cgroup limits", Real::Never("no process may change those of its control group namespace's root")),
    ("release_agent", OWN_CGROUPS),
    ("block devices", Real::Privileged),
    ("mounting disks", Real::Privileged),
    ("machine devices", Real::Privileged),
    ("consoles", Real::Default),
    ("file systems", Real::Privileged),
    ("file handles", Real::Privileged),
    ("bpf", Real::Privileged),
    ("modules", NOT_BUILT),
    ("kexec", NOT_BUILT),
    ("clock", Real::Privileged),
    ("perf events", Real::Privileged),
    ("kernel log", Real::Privileged),
    ("swap and accounting", Real::Privileged),
    ("ports", NOT_BUILT),
    ("precedence", Real::Privileged),
    ("foreign ids", Real::Default),
    ("keyrings", Real::Privileged),
    ("foreign processes", OWN_PROCESSES),
    ("foreign roots", OWN_PROCESSES),
    ("foreign namespaces", OWN_PROCESSES),
    ("wide id map", Real::Privileged),
    ("tcp", Real::Never("no program of the VM listens for TCP")),
    ("abstract sockets", Real::Never("no program of the VM has one")),
    ("engine sockets", Real::Never("they are not in a container; open with mounts")),
    ("vsock socket", Real::Privileged),
    ("vsock socket, high bits", Real::Default),
    ("vsock socket, 32-bit", Real::Privileged),
    ("vsock socketcall, 32-bit", Real::Default),
    ("vsock socket, x32", NOT_BUILT),
    ("vsock socket, io_uring", Real::Privileged),
    ("vsock to the agent", Real::Never("the host takes one connection, which is the agent's")),
    ("vsock to the gate", Real::Never("the gate serves the host only")),
    ("vsock as the gate", Real::Default),
    (
        "vsock to another container",
        Real::Never("the VM's kernel has no vsock loopback, and the host sends nothing back"),
    ),
    ("read-only root", Real::Privileged),
    ("read-only volume", Real::Privileged),
    ("read-only volume below /dev", Real::Privileged),
    ("read-only volume below a tmpfs", Real::Privileged),
    ("read-only volume below another tmpfs", Real::Privileged),
    ("read-only volume below /sys", Real::Privileged),
    ("read-only volume below /proc", Real::Never("runc mounts nothing there, so it is tried with isolation only")),
    ("-v docker.sock", Real::Privileged),
    ("-v the engine's own socket", Real::Privileged),
    ("-v /run", Real::Privileged),
    ("-v /", Real::Privileged),
    ("a volume of the VM's /usr", Real::Privileged),
    ("--pid=host", Real::Privileged),
    ("--network=host", Real::Never("nothing in the VM listens for TCP or has an abstract socket")),
    ("--ipc=host", Real::Privileged),
    ("--uts=host", Real::Privileged),
    ("--userns=host", Real::Privileged),
    ("--cgroupns=host", Real::Privileged),
    ("--runtime=runc", Real::Privileged),
    ("--runtime=io.containerd.runc.v2", Real::Privileged),
    ("--runtime=PATH", Real::Never("the engine looks for a shim at a path")),
    ("--device=/dev/vdb", Real::Privileged),
    ("--device-cgroup-rule", Real::Privileged),
    ("--sysctl=kernel.core_pattern", Real::Never("the engine allows namespaced ones only")),
    ("--oom-score-adj=-1000", Real::Privileged),
    ("build --network=host", Real::Privileged),
    ("a plugin with all rights", Real::Privileged),
    ("runtime overwrite", Real::Never("runc runs as a sealed copy, and the VM's programs are on a read-only disk")),
    ("race of a bind's target", PATCHED),
    ("race of a volume's directory", PATCHED),
    ("race of docker cp", PATCHED),
    ("link under docker cp", PATCHED),
];

/// Attempts that are open with isolation on, with the reason: they lead nowhere, or are not closed yet.
pub const KNOWN_OPEN: &[(&str, &str)] =
    &[("vsock socketcall, 32-bit", "the socket can be made and reaches neither the host nor the engine's port")];

pub fn of(name: &str) -> Option<Real> {
    ATTEMPTS.iter().find(|(attempt, _)| *attempt == name).map(|(_, real)| *real)
}

pub fn is_known_open(name: &str) -> bool {
    KNOWN_OPEN.iter().any(|(known, _)| *known == name)
}
