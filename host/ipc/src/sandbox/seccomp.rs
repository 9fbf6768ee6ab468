//! System call filters (seccomp(2)): a list of allowed calls for each process and thread, some of them with conditions
//! on arguments.
//!
//! A filter cannot look behind a pointer, and a later filter can only take away. So the filter of a process holds what
//! any of its threads needs, and threads that need less install a second one.

use super::{
    SandboxError,
    rules::{EQUAL, Rules, rule, rule_of_long},
};

/// Calls of the vmm's threads that move data: the devices' and the one that serves the backend. They move bytes between
/// guest memory, the disks and the sockets that they hold.
#[rustfmt::skip]
const VMM_CALLS: &[libc::c_long] = &[
    // memory; mmap and mprotect have conditions
    libc::SYS_brk, libc::SYS_madvise, libc::SYS_mremap, libc::SYS_munmap,
    // the thread itself and signals; tgkill has a condition
    libc::SYS_exit, libc::SYS_exit_group, libc::SYS_futex, libc::SYS_getpid, libc::SYS_gettid,
    libc::SYS_restart_syscall, libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield, libc::SYS_sigaltstack,
    // time and entropy; getrusage counts the waits of a thread
    libc::SYS_clock_gettime, libc::SYS_clock_nanosleep, libc::SYS_getrandom, libc::SYS_getrusage, libc::SYS_nanosleep,
    // files that are open; fcntl has a condition, and there is no call that opens another
    libc::SYS_close, libc::SYS_fallocate, libc::SYS_fdatasync, libc::SYS_fstat, libc::SYS_fsync, libc::SYS_ftruncate,
    libc::SYS_lseek, libc::SYS_preadv, libc::SYS_preadv2, libc::SYS_pread64, libc::SYS_pwritev, libc::SYS_pwritev2,
    libc::SYS_pwrite64, libc::SYS_read, libc::SYS_readv, libc::SYS_write, libc::SYS_writev,
    // events and sockets; no socket and no connect: every stream is accepted or comes from the backend
    libc::SYS_accept4, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_epoll_wait, libc::SYS_eventfd2,
    libc::SYS_getpeername, libc::SYS_getsockname, libc::SYS_getsockopt, libc::SYS_poll, libc::SYS_ppoll,
    libc::SYS_recvfrom, libc::SYS_recvmsg, libc::SYS_sendmsg, libc::SYS_sendto, libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// Calls that a thread makes besides to start another one, and the new thread before its own filter. clone and prctl
/// have conditions.
#[rustfmt::skip]
const THREAD_START_CALLS: &[libc::c_long] = &[
    libc::SYS_clone3, libc::SYS_epoll_create1, libc::SYS_rseq, libc::SYS_sched_getaffinity, libc::SYS_set_robust_list,
];

/// Calls of the network process. It maps guest memory and moves bytes between it and its sockets.
#[rustfmt::skip]
const NET_CALLS: &[libc::c_long] = &[
    // memory; mmap and mprotect have conditions
    libc::SYS_brk, libc::SYS_madvise, libc::SYS_mremap, libc::SYS_munmap,
    // the process itself; no clone: it has one thread
    libc::SYS_exit, libc::SYS_exit_group, libc::SYS_futex, libc::SYS_getpid, libc::SYS_gettid,
    libc::SYS_restart_syscall, libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield, libc::SYS_sigaltstack,
    // time and entropy
    libc::SYS_clock_gettime, libc::SYS_getrandom,
    // files that are open; fcntl has a condition
    libc::SYS_close, libc::SYS_fstat, libc::SYS_lseek, libc::SYS_read, libc::SYS_write, libc::SYS_writev,
    // events and sockets; no bind and no listen: published ports arrive as listening sockets
    libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_epoll_wait, libc::SYS_getpeername, libc::SYS_getsockname,
    libc::SYS_getsockopt, libc::SYS_poll, libc::SYS_recvfrom, libc::SYS_recvmsg, libc::SYS_sendmsg, libc::SYS_sendto,
    libc::SYS_setsockopt, libc::SYS_shutdown,
];

/// Calls of the network process besides if it ends the guest's connections itself: it makes and takes connections and
/// reads resolv.conf and the hosts file. socket and openat have conditions.
const STACK_CALLS: &[libc::c_long] = &[libc::SYS_accept4, libc::SYS_connect, libc::SYS_newfstatat, libc::SYS_statx];

/// Calls of the share process. It opens files in directories that it has open and moves bytes between them and guest
/// memory.
///
/// Nothing changes the mode, the times or the attributes of a file by a path: `chmod`, `fchmodat`, `setxattr` and their
/// like are missing, and `utimensat` has a condition. Reading attributes by a path is how records are looked up without
/// opening each file.
#[rustfmt::skip]
const SHARE_CALLS: &[libc::c_long] = &[
    // memory; mmap and mprotect have conditions
    libc::SYS_brk, libc::SYS_madvise, libc::SYS_mremap, libc::SYS_munmap,
    // the thread itself and signals; tgkill has a condition
    libc::SYS_exit, libc::SYS_exit_group, libc::SYS_futex, libc::SYS_getpid, libc::SYS_gettid,
    libc::SYS_restart_syscall, libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield, libc::SYS_sigaltstack,
    // time and entropy
    libc::SYS_clock_gettime, libc::SYS_getrandom,
    // names; Landlock decides where they may lead
    libc::SYS_linkat, libc::SYS_mkdirat, libc::SYS_mknodat, libc::SYS_openat2, libc::SYS_readlinkat,
    libc::SYS_renameat2, libc::SYS_symlinkat, libc::SYS_unlinkat,
    // states; 464 is getxattrat
    464, libc::SYS_fchdir, libc::SYS_fstat, libc::SYS_fstatfs, libc::SYS_getxattr, libc::SYS_lgetxattr, libc::SYS_statx,
    // events of files, of which a process sees those that it may read
    libc::SYS_inotify_add_watch, libc::SYS_inotify_rm_watch,
    // files that are open; fcntl and utimensat have conditions
    libc::SYS_close, libc::SYS_copy_file_range, libc::SYS_fallocate, libc::SYS_fchmod, libc::SYS_fdatasync,
    libc::SYS_fgetxattr, libc::SYS_flistxattr, libc::SYS_fremovexattr, libc::SYS_fsetxattr, libc::SYS_fsync,
    libc::SYS_ftruncate, libc::SYS_getdents64, libc::SYS_lseek, libc::SYS_preadv, libc::SYS_pwritev2, libc::SYS_read,
    libc::SYS_write, libc::SYS_writev,
    // the two sockets and the queues' events
    libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_ppoll,
    libc::SYS_recvfrom, libc::SYS_recvmsg, libc::SYS_sendmsg, libc::SYS_sendto,
];

/// Requests of ioctl(2) for a vCPU's thread (`linux/kvm.h`): it enters the guest, reads the vCPU's state for a
/// snapshot, and connects interrupts and notifications when the driver sets up a device. Everything else about the
/// machine was decided before.
#[rustfmt::skip]
const VCPU_REQUESTS: [u64; 8] = [
    0xae80, // KVM_RUN
    0x8090_ae81, // KVM_GET_REGS
    0x8138_ae83, // KVM_GET_SREGS
    0x8400_ae8e, // KVM_GET_LAPIC
    0x8004_ae98, // KVM_GET_MP_STATE
    0x4020_ae76, // KVM_IRQFD
    0x4040_ae79, // KVM_IOEVENTFD
    0x4008_ae6a, // KVM_SET_GSI_ROUTING
];

/// Commands of fcntl(2). Without `F_SETOWN`, which would send signals to any process of the user.
const FCNTL_COMMANDS: [libc::c_int; 5] =
    [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL];

/// Commands of fcntl(2) for locks, without those of processes: the one process stands for many of the guest's.
const LOCK_COMMANDS: [libc::c_int; 3] = [libc::F_OFD_GETLK, libc::F_OFD_SETLK, libc::F_OFD_SETLKW];

/// Flags with which the C libraries start a thread (pthread_create), and no process: glibc's. musl adds
/// `CLONE_DETACHED`, which has no effect.
const THREAD_FLAGS: libc::c_int = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;

/// Flag of io_uring_enter(2): waits for completions.
const IORING_ENTER_GETEVENTS: u32 = 1;

/// Switches a socket between blocking and non-blocking.
const FIONBIO: u64 = 0x5421;

/// Kind and protocol of a socket (socket(2)). The lower four bits of the second argument are the kind, the others
/// flags.
const SOCKET_KIND: u64 = 0xf;

pub(super) fn apply_vmm() -> Result<(), SandboxError> {
    // The flags of clone3 are behind a pointer. The C libraries use clone when it is missing, whose are not.
    Rules::default().allow(&[libc::SYS_clone3]).refuse_listed(libc::ENOSYS)?;
    vmm()?
        .allow(THREAD_START_CALLS)
        .allow_if(libc::SYS_clone, [rule_of_long(0, !(libc::CLONE_DETACHED as u64), THREAD_FLAGS as u64)])?
        // std names its threads; the rest is for the filters of threads.
        .allow_if(
            libc::SYS_prctl,
            [libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS].map(|option| rule(&[(0, EQUAL, option as u64)])),
        )?
        .allow_if(libc::SYS_seccomp, [rule(&[(0, EQUAL, u64::from(libc::SECCOMP_SET_MODE_FILTER)), (1, EQUAL, 0)])])?
        .allow_if(libc::SYS_ioctl, VCPU_REQUESTS.map(|request| rule(&[(1, EQUAL, request)])))?
        .refuse_others()
}

pub(super) fn apply_vmm_thread() -> Result<(), SandboxError> {
    vmm()?.refuse_others()
}

pub(super) fn apply_share(locks: bool) -> Result<(), SandboxError> {
    Rules::default().allow(&[libc::SYS_clone3]).refuse_listed(libc::ENOSYS)?;
    share(locks)?
        .allow(THREAD_START_CALLS)
        // Each thread has an event by which it is woken.
        .allow(&[libc::SYS_eventfd2])
        // And a working directory.
        .allow_if(libc::SYS_unshare, [rule_of_long(0, u64::MAX, libc::CLONE_FS as u64)])?
        .allow_if(libc::SYS_clone, [rule_of_long(0, !(libc::CLONE_DETACHED as u64), THREAD_FLAGS as u64)])?
        .allow_if(
            libc::SYS_prctl,
            [libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS].map(|option| rule(&[(0, EQUAL, option as u64)])),
        )?
        .allow_if(libc::SYS_seccomp, [rule(&[(0, EQUAL, u64::from(libc::SECCOMP_SET_MODE_FILTER)), (1, EQUAL, 0)])])?
        .refuse_others()
}

pub(super) fn apply_share_thread(locks: bool) -> Result<(), SandboxError> {
    share(locks)?.refuse_others()
}

fn share(locks: bool) -> Result<Rules, SandboxError> {
    // Without a path: the times of an open file.
    let rules = Rules::default().allow(SHARE_CALLS).allow_if(libc::SYS_utimensat, [rule_of_long(1, u64::MAX, 0)])?;
    let rules = if locks {
        let commands = LOCK_COMMANDS.map(|command| rule(&[(1, EQUAL, command as u64)]));
        // dup3 puts a file in the place of another one, by which a thread that waits for a lock is interrupted.
        rules.allow(&[libc::SYS_dup3, libc::SYS_flock]).allow_if(libc::SYS_fcntl, commands)?
    } else {
        rules
    };
    rules.guarded()
}

pub(super) fn apply_net() -> Result<(), SandboxError> {
    // TCP, UDP and ping; no raw, unix, netlink or packet sockets, and none whose protocol the kernel would load a
    // module for.
    let sockets = [
        (libc::AF_INET, libc::SOCK_STREAM, 0),
        (libc::AF_INET6, libc::SOCK_STREAM, 0),
        (libc::AF_INET, libc::SOCK_DGRAM, 0),
        (libc::AF_INET6, libc::SOCK_DGRAM, 0),
        (libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP),
        (libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_ICMPV6),
    ];
    let socket = |(family, kind, protocol): (libc::c_int, libc::c_int, libc::c_int)| {
        rule(&[(0, EQUAL, family as u64), (1, SOCKET_KIND, kind as u64), (2, EQUAL, protocol as u64)])
    };
    // For reading only, also where there is no Landlock. C libraries add O_LARGEFILE.
    let reading = !u64::from((libc::O_CLOEXEC | libc::O_LARGEFILE | 0o100_000) as u32) & EQUAL;
    net()?
        .allow(STACK_CALLS)
        .allow_if(libc::SYS_ioctl, [rule(&[(1, EQUAL, FIONBIO)])])?
        .allow_if(libc::SYS_socket, sockets.map(socket))?
        .allow_if(libc::SYS_openat, [rule(&[(2, reading, 0)])])?
        .refuse_others()
}

pub(super) fn apply_tap() -> Result<(), SandboxError> {
    // Frames pass through as they are, so no connection is made or accepted and no name server looked up.
    net()?
        .allow(&[libc::SYS_readv])
        .allow_if(libc::SYS_ioctl, [rule(&[(1, EQUAL, libc::TUNSETOFFLOAD)])])?
        .refuse_others()
}

fn vmm() -> Result<Rules, SandboxError> {
    // Rings of the disks were made and restricted before: no call makes one or changes its restrictions. Only waiting,
    // no other flag.
    let enter = !u64::from(IORING_ENTER_GETEVENTS) & EQUAL;
    Rules::default().allow(VMM_CALLS).allow_if(libc::SYS_io_uring_enter, [rule(&[(3, enter, 0)])])?.guarded()
}

fn net() -> Result<Rules, SandboxError> {
    Rules::default().allow(NET_CALLS).guarded()
}

impl Rules {
    /// Allows the calls with which every process manages its memory, descriptors and signals, with their conditions.
    fn guarded(self) -> Result<Self, SandboxError> {
        let exec = libc::PROT_EXEC as u64;
        self
            // No new code, also where the kernel lacks PR_SET_MDWE.
            .allow_if(libc::SYS_mmap, [rule(&[(2, exec, 0)])])?
            .allow_if(libc::SYS_mprotect, [rule(&[(2, exec, 0)])])?
            .allow_if(libc::SYS_fcntl, FCNTL_COMMANDS.map(|command| rule(&[(1, EQUAL, command as u64)])))?
            // Threads of this process only. The number is this process's for as long as the filter is in place.
            .allow_if(libc::SYS_tgkill, [rule(&[(0, EQUAL, u64::from(std::process::id()))])])
    }
}
