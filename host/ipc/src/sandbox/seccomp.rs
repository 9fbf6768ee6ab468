//! System call filters (seccomp(2)): a list of allowed calls for each process, some of them with conditions on
//! arguments.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::SandboxError;

/// Calls of the vmm once its machine is built. It answers exits, moves bytes between guest memory, the disks and the
/// sockets that it holds, starts the devices' threads, and ends.
#[rustfmt::skip]
const VMM_CALLS: &[libc::c_long] = &[
    // memory
    libc::SYS_brk, libc::SYS_madvise, libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_mremap, libc::SYS_munmap,
    // threads and signals
    libc::SYS_clone, libc::SYS_clone3, libc::SYS_exit, libc::SYS_exit_group, libc::SYS_futex, libc::SYS_getpid,
    libc::SYS_gettid, libc::SYS_prctl, libc::SYS_restart_syscall, libc::SYS_rseq, libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn, libc::SYS_sched_getaffinity, libc::SYS_sched_yield,
    libc::SYS_set_robust_list, libc::SYS_sigaltstack, libc::SYS_tgkill,
    // time and entropy
    libc::SYS_clock_gettime, libc::SYS_clock_nanosleep, libc::SYS_getrandom, libc::SYS_nanosleep,
    // files that are open
    libc::SYS_close, libc::SYS_dup, libc::SYS_fallocate, libc::SYS_fcntl, libc::SYS_fdatasync, libc::SYS_fstat,
    libc::SYS_fsync, libc::SYS_ftruncate, libc::SYS_lseek, libc::SYS_newfstatat, libc::SYS_preadv, libc::SYS_pread64,
    libc::SYS_pwritev, libc::SYS_pwrite64, libc::SYS_read, libc::SYS_readv, libc::SYS_statx, libc::SYS_write,
    libc::SYS_writev,
    // /proc/self and the sockets' own files; Landlock restricts the paths
    libc::SYS_openat, libc::SYS_unlink, libc::SYS_unlinkat,
    // events and sockets
    libc::SYS_accept4, libc::SYS_connect, libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait, libc::SYS_eventfd2, libc::SYS_getpeername, libc::SYS_getsockname, libc::SYS_getsockopt,
    libc::SYS_poll, libc::SYS_ppoll, libc::SYS_recvfrom, libc::SYS_recvmsg, libc::SYS_sendmsg, libc::SYS_sendto,
    libc::SYS_setsockopt, libc::SYS_shutdown, libc::SYS_timerfd_create, libc::SYS_timerfd_settime,
];

/// Calls of the network process. It maps guest memory, moves bytes between it and its sockets, and reads resolv.conf.
#[rustfmt::skip]
const NET_CALLS: &[libc::c_long] = &[
    // memory
    libc::SYS_brk, libc::SYS_madvise, libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_mremap, libc::SYS_munmap,
    // the process itself; no clone: it has one thread
    libc::SYS_exit, libc::SYS_exit_group, libc::SYS_futex, libc::SYS_getpid, libc::SYS_gettid,
    libc::SYS_restart_syscall, libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield, libc::SYS_sigaltstack, libc::SYS_tgkill,
    // time and entropy
    libc::SYS_clock_gettime, libc::SYS_getrandom,
    // files; Landlock restricts the paths
    libc::SYS_close, libc::SYS_fcntl, libc::SYS_fstat, libc::SYS_lseek, libc::SYS_newfstatat, libc::SYS_openat,
    libc::SYS_read, libc::SYS_statx, libc::SYS_write, libc::SYS_writev,
    // events and sockets
    // no bind and no listen: published ports arrive as listening sockets
    libc::SYS_accept4, libc::SYS_connect, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_epoll_wait,
    libc::SYS_getpeername, libc::SYS_getsockname, libc::SYS_getsockopt, libc::SYS_poll, libc::SYS_recvfrom, libc::SYS_recvmsg,
    libc::SYS_sendmsg, libc::SYS_sendto, libc::SYS_setsockopt, libc::SYS_shutdown,
];

/// `_IOC_TYPE` of KVM's ioctls, bits 8 to 15 of the request (`KVMIO` of `linux/kvm.h`).
const KVM_IOCTL: u64 = 0xae << 8;
const IOCTL_TYPE: u64 = 0xff << 8;
/// Switches a socket between blocking and non-blocking.
const FIONBIO: u64 = 0x5421;

pub(super) fn apply_vmm() -> Result<(), SandboxError> {
    Ok(seccompiler::apply_filter(&vmm()?)?)
}

pub(super) fn apply_net() -> Result<(), SandboxError> {
    let mut rules = allow(NET_CALLS);
    rules.insert(libc::SYS_ioctl, vec![argument(1, ALL_BITS, FIONBIO)?]);
    // A condition of one rule is enough for the call to pass: either family, and no unix, netlink or packet sockets.
    let families = [libc::AF_INET, libc::AF_INET6].map(|family| argument(0, ALL_BITS, family as u64));
    rules.insert(libc::SYS_socket, families.into_iter().collect::<Result<_, _>>()?);
    Ok(seccompiler::apply_filter(&filter(rules)?)?)
}

pub(super) fn apply_tap() -> Result<(), SandboxError> {
    let mut rules = allow(NET_CALLS);
    // Frames pass through as they are, so no connection is made or accepted and no name server looked up.
    for call in [libc::SYS_accept4, libc::SYS_connect, libc::SYS_openat] {
        rules.remove(&call);
    }
    rules.insert(libc::SYS_readv, Vec::new());
    rules.insert(libc::SYS_ioctl, vec![argument(1, ALL_BITS, libc::TUNSETOFFLOAD)?]);
    Ok(seccompiler::apply_filter(&filter(rules)?)?)
}

fn vmm() -> Result<BpfProgram, SandboxError> {
    let mut rules = allow(VMM_CALLS);
    // vCPUs run and interrupts are routed by KVM's ioctls. The condition excludes those of terminals, block devices and
    // network interfaces.
    rules.insert(libc::SYS_ioctl, vec![argument(1, IOCTL_TYPE, KVM_IOCTL)?, argument(1, ALL_BITS, FIONBIO)?]);
    // For the guest's vsock connections to host programs.
    rules.insert(libc::SYS_socket, vec![argument(0, ALL_BITS, libc::AF_UNIX as u64)?]);
    filter(rules)
}

/// Mask for all bits of a 32-bit argument.
const ALL_BITS: u64 = u32::MAX as u64;

fn allow(calls: &[libc::c_long]) -> BTreeMap<i64, Vec<SeccompRule>> {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

fn argument(index: u8, mask: u64, value: u64) -> Result<SeccompRule, SandboxError> {
    // The kernel truncates the arguments in question to 32 bits, so their upper halves must not decide.
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

fn filter(rules: BTreeMap<i64, Vec<SeccompRule>>) -> Result<BpfProgram, SandboxError> {
    // A denied call fails instead of killing the process: a guest must not be able to end its VM by provoking one.
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    Ok(SeccompFilter::new(rules, refused, SeccompAction::Allow, TargetArch::x86_64)?.try_into()?)
}

#[cfg(test)]
mod tests {
    /// Returns the result of `f` on a thread that is confined like the vmm.
    fn confined<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
        let body = || {
            super::super::confine_vmm(None).unwrap();
            f()
        };
        std::thread::spawn(body).join().unwrap()
    }

    #[test]
    fn a_confined_vmm_opens_no_file_but_its_own_accounting() {
        let own = std::fs::canonicalize("Cargo.toml").unwrap();
        let (manifest, smaps, create) = confined(move || {
            (
                std::fs::read(own).is_ok(),
                std::fs::read("/proc/self/smaps").is_ok(),
                std::fs::write(std::env::temp_dir().join("bulkhead-sandbox-test"), b"").is_ok(),
            )
        });
        assert_eq!((manifest, smaps, create), (false, true, false));
    }

    #[test]
    fn a_confined_vmm_starts_no_program_and_reaches_no_network() {
        let (program, network) = confined(|| {
            (
                std::process::Command::new("/bin/true").status().is_ok(),
                std::net::TcpStream::connect("127.0.0.1:1").unwrap_err().raw_os_error(),
            )
        });
        assert_eq!((program, network), (false, Some(libc::EPERM)));
    }

    #[test]
    fn a_confined_network_process_reads_resolv_conf_and_connects_only() {
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        let own = std::fs::canonicalize("Cargo.toml").unwrap();
        let body = move || {
            super::super::confine_net().unwrap();
            (
                std::fs::read("/etc/resolv.conf").is_ok(),
                std::net::TcpStream::connect(address).is_ok(),
                std::fs::read(own).is_ok(),
                std::fs::write("/etc/bulkhead-sandbox-test", b"").is_ok(),
                std::process::Command::new("/bin/true").status().is_ok(),
                std::net::TcpListener::bind("127.0.0.1:0").is_ok(),
                std::os::unix::net::UnixStream::pair().is_ok(),
            )
        };
        let outcome = std::thread::spawn(body).join().unwrap();
        assert_eq!(outcome, (true, true, false, false, false, false, false));
    }

    #[test]
    fn a_confined_tap_process_opens_nothing_but_still_says_what_is_wrong() {
        let body = || {
            super::super::confine_tap().unwrap();
            eprintln!("still here");
            (
                std::fs::read("/etc/resolv.conf").is_ok(),
                std::net::UdpSocket::bind("127.0.0.1:0").is_ok(),
                std::process::Command::new("/bin/true").status().is_ok(),
            )
        };
        assert_eq!(std::thread::spawn(body).join().unwrap(), (false, false, false));
    }

    #[test]
    fn a_confined_vmm_can_still_start_threads() {
        assert_eq!(confined(|| std::thread::spawn(|| 7).join().unwrap()), 7);
    }
}
