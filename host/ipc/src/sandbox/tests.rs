//! Attempts of confined threads: each thing that a process must not do, and beside it the one that it needs.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream},
    },
    path::PathBuf,
    process::Command,
    ptr::null_mut,
    thread,
};

use super::{
    SandboxError, Shared, confine_net, confine_share, confine_share_thread, confine_tap, confine_vmm,
    confine_vmm_thread, landlock, process,
};

/// KVM_RUN and KVM_CREATE_VM.
const RUN: libc::c_ulong = 0xae80;
const CREATE_VM: libc::c_ulong = 0xae01;

/// Returns the result of `f` on a thread that has confined itself. Both mechanisms are of the thread; the limits that
/// come with them are of the test process.
fn confined<T: Send + 'static>(confine: fn() -> Result<(), SandboxError>, f: impl FnOnce() -> T + Send + 'static) -> T {
    let body = move || {
        confine().unwrap();
        f()
    };
    thread::spawn(body).join().unwrap()
}

/// Confines like a device's thread of the vmm.
fn as_device() -> Result<(), SandboxError> {
    confine_vmm()?;
    confine_vmm_thread()
}

/// Confines like a thread of the share process that has no shares.
fn as_share() -> Result<(), SandboxError> {
    confine_share(&[], false)?;
    confine_share_thread(false)
}

/// All ways to be confined.
const EVERYONE: [fn() -> Result<(), SandboxError>; 5] = [confine_vmm, as_device, confine_net, confine_tap, as_share];

/// Returns the error of a system call, 0 for none.
fn errno(result: impl Into<i64>) -> i32 {
    if result.into() < 0 { io::Error::last_os_error().raw_os_error().unwrap() } else { 0 }
}

fn code<T>(result: io::Result<T>) -> i32 {
    result.map_or_else(|error| error.raw_os_error().unwrap_or(-1), |_| 0)
}

fn socket_path(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("bulkhead-sandbox-{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    path
}

#[test]
fn a_confined_vmm_opens_nothing_but_reads_what_is_open() {
    let own = std::fs::canonicalize("Cargo.toml").unwrap();
    for confine in [confine_vmm, as_device] {
        let (own, mut open) = (own.clone(), File::open(&own).unwrap());
        let outcome = confined(confine, move || {
            (
                code(File::open(own)),
                code(File::open("/proc/self/smaps")),
                code(File::open("/dev/null")),
                code(std::fs::write(std::env::temp_dir().join("bulkhead-sandbox-test"), b"")),
                open.read(&mut [0; 16]).is_ok(),
            )
        });
        assert_eq!(outcome, (libc::EPERM, libc::EPERM, libc::EPERM, libc::EPERM, true));
    }
}

#[test]
fn a_confined_vmm_starts_threads_but_no_program_and_no_process() {
    let outcome = confined(confine_vmm, || {
        // SAFETY: fork without flags; a child, which must not exist, ends at once.
        let forked = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
        if forked == 0 {
            // SAFETY: ends the process without running anything.
            unsafe { libc::_exit(0) };
        }
        let named = thread::Builder::new().name("seven".into()).spawn(|| 7);
        (errno(forked), code(Command::new("/bin/true").status()), named.unwrap().join().unwrap())
    });
    assert_eq!(outcome, (libc::EPERM, libc::EPERM, 7));
}

#[test]
fn the_thread_of_a_device_starts_no_other() {
    assert!(confined(as_device, || thread::Builder::new().spawn(|| ()).is_err()));
}

#[test]
fn a_confined_vmm_reaches_no_network_and_no_unix_socket_but_serves_those_it_has() {
    for confine in [confine_vmm, as_device] {
        let path = socket_path("vmm");
        let listener = UnixListener::bind(&path).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"hi").unwrap();
        let to = path.clone();
        let outcome = confined(confine, move || {
            let mut accepted = listener.accept().unwrap().0;
            let mut bytes = [0; 2];
            accepted.read_exact(&mut bytes).unwrap();
            let refused = [
                code(UnixStream::connect(&to)),
                code(UnixDatagram::unbound()),
                code(UnixStream::pair()),
                code(TcpStream::connect("127.0.0.1:1")),
                code(std::fs::remove_file(&to)),
            ];
            (bytes, refused)
        });
        assert_eq!(outcome, (*b"hi", [libc::EPERM; 5]));
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn signals_reach_only_threads_of_the_process_itself() {
    // SAFETY: getppid takes nothing.
    let other = unsafe { libc::getppid() };
    for confine in EVERYONE {
        let outcome = confined(confine, move || {
            // SAFETY: system calls with integers. Signal 0 only checks.
            unsafe {
                let own = libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), 0);
                let foreign = libc::syscall(libc::SYS_tgkill, other, other, 0);
                let tkill = libc::syscall(libc::SYS_tkill, other, 0);
                // The owner of a descriptor is sent signals by the kernel.
                let owner = libc::fcntl(2, libc::F_SETOWN, other);
                [errno(own), errno(foreign), errno(tkill), errno(libc::kill(other, 0)), errno(owner)]
            }
        });
        assert_eq!(outcome, [0, libc::EPERM, libc::EPERM, libc::EPERM, libc::EPERM]);
    }
}

#[test]
fn no_memory_becomes_code() {
    for confine in EVERYONE {
        let outcome = confined(confine, || {
            let (data, code) = (libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ | libc::PROT_EXEC);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: new mappings that nothing else uses.
            unsafe {
                let page = libc::mmap(null_mut(), 4096, data, flags, -1, 0);
                assert_ne!(page, libc::MAP_FAILED);
                let changed = errno(libc::mprotect(page, 4096, code));
                let mapped = libc::mmap(null_mut(), 4096, code, flags, -1, 0);
                let mapped = if mapped == libc::MAP_FAILED { errno(-1) } else { 0 };
                [changed, mapped, errno(libc::mprotect(page, 4096, libc::PROT_READ)), errno(libc::munmap(page, 4096))]
            }
        });
        assert_eq!(outcome, [libc::EPERM, libc::EPERM, 0, 0]);
    }
}

#[test]
fn the_kernel_itself_refuses_executable_memory_where_it_can() {
    process::harden().unwrap();
    // SAFETY: prctl with integers, and a new mapping that nothing else uses.
    unsafe {
        if libc::prctl(libc::PR_GET_MDWE, 0, 0, 0, 0) < 0 {
            return;
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let page = libc::mmap(null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        assert_eq!(errno(libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_EXEC)), libc::EACCES);
    }
}

#[test]
fn a_hardened_process_leaves_no_core() {
    use nix::sys::resource::{Resource, getrlimit};
    process::harden().unwrap();
    assert_eq!(getrlimit(Resource::RLIMIT_CORE).unwrap(), (0, 0));
    // SAFETY: prctl with integers.
    assert_eq!(unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) }, 0);
}

#[test]
fn a_vcpu_makes_its_requests_and_no_others_and_a_device_makes_none() {
    let null = File::open("/dev/null").unwrap();
    let fd = null.as_raw_fd();
    // SAFETY: none of these requests means anything to /dev/null, which would say so.
    let ask = move |request| errno(unsafe { libc::ioctl(fd, request, 0) });
    let requests = [RUN, CREATE_VM, libc::TIOCSTI, libc::FIONREAD];
    let vcpu = confined(confine_vmm, move || requests.map(ask));
    assert_eq!(vcpu, [libc::ENOTTY, libc::EPERM, libc::EPERM, libc::EPERM]);
    assert_eq!(confined(as_device, move || requests.map(ask)), [libc::EPERM; 4]);
}

#[test]
fn a_vmm_enters_rings_that_it_has_and_makes_none() {
    for confine in [confine_vmm, as_device] {
        let outcome = confined(confine, || {
            // SAFETY: none of these calls names a ring or memory.
            unsafe {
                [
                    errno(libc::syscall(libc::SYS_io_uring_enter, -1, 0, 0, 0, 0, 0)),
                    errno(libc::syscall(libc::SYS_io_uring_enter, -1, 0, 0, 2, 0, 0)),
                    errno(libc::syscall(libc::SYS_io_uring_setup, 1, 0)),
                    errno(libc::syscall(libc::SYS_io_uring_register, -1, 0, 0, 0)),
                ]
            }
        });
        assert_eq!(outcome[1..], [libc::EPERM; 3]);
        // By the kernel, not by the filter: it may be off altogether.
        assert_ne!(outcome[0], 0);
    }
    for confine in [confine_net, confine_tap] {
        // SAFETY: as above.
        let enter = || errno(unsafe { libc::syscall(libc::SYS_io_uring_enter, -1, 0, 0, 0, 0, 0) });
        assert_eq!(confined(confine, enter), libc::EPERM);
    }
}

#[test]
fn a_confined_thread_changes_nothing_of_its_process_but_names() {
    let outcome = confined(confine_vmm, || {
        // SAFETY: all of these options take integers.
        let set = |option, value: libc::c_ulong| errno(unsafe { libc::prctl(option, value, 0, 0, 0) });
        [set(libc::PR_SET_DUMPABLE, 1), set(libc::PR_SET_PDEATHSIG, 9), set(libc::PR_SET_MDWE, 0)]
    });
    assert_eq!(outcome, [libc::EPERM; 3]);
    for confine in [as_device as fn() -> _, confine_net, confine_tap] {
        let name = c"name";
        // SAFETY: the name outlives the call.
        let set = move || errno(unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) });
        assert_eq!(confined(confine, set), libc::EPERM);
    }
}

/// Returns the version of Landlock; 0 without it.
fn landlock_version() -> i64 {
    // SAFETY: with this flag the call takes no pointer.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, null_mut::<u8>(), 0, 1) }
}

#[test]
fn landlock_alone_denies_files_ports_abstract_sockets_and_signals() {
    let version = landlock_version();
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let name = SocketAddr::from_abstract_name(format!("bulkhead-{}", std::process::id())).unwrap();
    let _abstract = UnixListener::bind_addr(&name).unwrap();
    let mut child = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = child.id().cast_signed();
    let outcome = confined(landlock::restrict_all, move || {
        [
            (1, code(File::open("/etc/passwd")), libc::EACCES),
            (4, code(TcpStream::connect(address)), libc::EACCES),
            (4, code(TcpListener::bind("127.0.0.1:0")), libc::EACCES),
            (6, code(UnixStream::connect_addr(&name)), libc::EPERM),
            // SAFETY: signal 0 only checks.
            (6, errno(unsafe { libc::kill(pid, 0) }), libc::EPERM),
        ]
    });
    child.kill().unwrap();
    child.wait().unwrap();
    for (since, error, expected) in outcome {
        assert_eq!(error, if version >= since { expected } else { 0 }, "ABI {since}, kernel {version}");
    }
}

#[test]
fn a_confined_network_process_reads_resolv_conf_and_connects_only() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let own = std::fs::canonicalize("Cargo.toml").unwrap();
    let path = socket_path("net");
    let _unix = UnixListener::bind(&path).unwrap();
    let to = path.clone();
    let outcome = confined(confine_net, move || {
        let works = (std::fs::read("/etc/resolv.conf").is_ok(), TcpStream::connect(address).is_ok());
        let refused = [
            code(std::fs::write("/etc/bulkhead-sandbox-test", b"")),
            code(File::options().write(true).open("/etc/resolv.conf")),
            code(TcpListener::bind("127.0.0.1:0")),
            code(UnixStream::connect(&to)),
            code(UnixStream::pair()),
            code(Command::new("/bin/true").status()),
        ];
        (works, refused, File::open(own).is_ok(), thread::Builder::new().spawn(|| ()).is_ok())
    });
    std::fs::remove_file(&path).unwrap();
    assert_eq!(outcome, ((true, true), [libc::EPERM; 6], landlock_version() < 1, false));
}

#[test]
fn a_confined_network_process_has_no_sockets_but_tcp_udp_and_ping() {
    use libc::{AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_VSOCK, SOCK_DGRAM, SOCK_RAW, SOCK_STREAM};
    const SCTP: i32 = 132;
    const MPTCP: i32 = 262;
    let outcome = confined(confine_net, || {
        let open = |(family, kind, protocol)| {
            // SAFETY: integers only.
            let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
            if fd >= 0 {
                // SAFETY: the descriptor is new and has no other owner.
                drop(unsafe { OwnedFd::from_raw_fd(fd) });
            }
            errno(fd)
        };
        let taken = [(AF_INET, SOCK_STREAM, 0), (AF_INET, SOCK_DGRAM, 0)].map(open);
        let refused = [
            (AF_INET, SOCK_RAW, libc::IPPROTO_ICMP),
            (AF_INET, SOCK_STREAM, SCTP),
            (AF_INET, SOCK_STREAM, MPTCP),
            (AF_INET, SOCK_DGRAM, libc::IPPROTO_UDPLITE),
            (AF_INET6, SOCK_DGRAM, libc::IPPROTO_ICMP),
            (AF_NETLINK, SOCK_DGRAM, 0),
            (AF_PACKET, SOCK_DGRAM, 0),
            (AF_VSOCK, SOCK_STREAM, 0),
        ];
        (taken, refused.map(open))
    });
    assert_eq!(outcome, ([0; 2], [libc::EPERM; 8]));
}

#[test]
fn a_confined_tap_process_opens_nothing_but_still_says_what_is_wrong() {
    let outcome = confined(confine_tap, || {
        eprintln!("still here");
        [
            code(File::open("/etc/resolv.conf")),
            code(std::net::UdpSocket::bind("127.0.0.1:0")),
            code(Command::new("/bin/true").status()),
        ]
    });
    assert_eq!(outcome, [libc::EPERM; 3]);
}

/// openat2 without restrictions of its own.
fn openat2(directory: &impl AsRawFd, path: &std::ffi::CStr, flags: i32) -> i32 {
    // `struct open_how` of `linux/openat2.h`: flags, mode, resolve.
    let how = [flags as u64, if flags & libc::O_CREAT == 0 { 0 } else { 0o600 }, 0];
    let size = size_of_val(&how);
    // SAFETY: the string ends with a zero, and the size is that of the structure.
    let fd = unsafe { libc::syscall(libc::SYS_openat2, directory.as_raw_fd(), path.as_ptr(), how.as_ptr(), size) };
    if fd >= 0 {
        // SAFETY: the descriptor is new and has no other owner.
        drop(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    }
    errno(fd)
}

#[test]
fn a_confined_share_process_opens_what_is_in_its_shares_and_nothing_else() {
    let root = std::env::temp_dir().join(format!("bulkhead-sandbox-share-{}", std::process::id()));
    for name in ["rw", "ro", "outside"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
        std::fs::write(root.join(name).join("file"), b"x").unwrap();
    }
    let open = |name: &str| File::open(root.join(name)).unwrap();
    let (rw, ro, outside) = (open("rw"), open("ro"), open("outside"));
    let body = move || {
        let shared = |directory: &'_ File, read_only| Shared {
            // SAFETY: the directory outlives this thread's body.
            directory: unsafe { std::os::fd::BorrowedFd::borrow_raw(directory.as_raw_fd()) },
            read_only,
        };
        confine_share(&[shared(&rw, false), shared(&ro, true)], false).unwrap();
        confine_share_thread(false).unwrap();
        let create = libc::O_CREAT | libc::O_WRONLY;
        let allowed = [
            openat2(&rw, c"file", libc::O_RDWR | libc::O_TRUNC),
            openat2(&rw, c"new", create),
            openat2(&ro, c"file", libc::O_RDONLY),
            openat2(&ro, c".", libc::O_RDONLY | libc::O_DIRECTORY),
        ];
        let refused = [
            openat2(&ro, c"file", libc::O_WRONLY),
            openat2(&ro, c"new", create),
            openat2(&outside, c"file", libc::O_RDONLY),
            openat2(&rw, c"../outside/file", libc::O_RDONLY),
            openat2(&rw, c"/etc/passwd", libc::O_RDONLY),
            openat2(&rw, c"/proc/self/mem", libc::O_RDWR),
            openat2(&rw, c"/proc/self/root/etc/passwd", libc::O_RDONLY),
        ];
        (allowed, refused)
    };
    let (allowed, refused) = thread::spawn(body).join().unwrap();
    std::fs::remove_dir_all(&root).unwrap();
    assert_eq!(allowed, [0; 4]);
    // Without Landlock, or with its first version, the rules above are the server's own.
    if landlock_version() >= 2 {
        assert_eq!(refused, [libc::EACCES; 7]);
    }
}

#[test]
fn a_confined_share_process_changes_nothing_by_a_path() {
    let path = std::env::temp_dir().join(format!("bulkhead-sandbox-paths-{}", std::process::id()));
    std::fs::write(&path, b"x").unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let outcome = confined(as_share, move || {
        let (path, attribute, at) = (name.as_ptr(), c"user.x".as_ptr(), libc::AT_FDCWD);
        let (value, now) = (c"x".as_ptr(), null_mut::<libc::timespec>());
        // SAFETY: strings that end with a zero; times are null.
        let refused = unsafe {
            [
                errno(libc::chmod(path, 0o777)),
                errno(libc::fchmodat(at, path, 0o777, 0)),
                errno(libc::syscall(libc::SYS_fchmodat2, at, path, 0o777, 0)),
                errno(libc::chown(path, 0, 0)),
                errno(libc::lchown(path, 0, 0)),
                errno(libc::fchownat(at, path, 0, 0, 0)),
                errno(libc::utimensat(at, path, now, 0)),
                errno(libc::setxattr(path, attribute, value.cast(), 1, 0)),
                errno(libc::lsetxattr(path, attribute, value.cast(), 1, 0)),
                errno(libc::removexattr(path, attribute)),
                errno(libc::truncate(path, 0)),
                errno(libc::open(path, libc::O_RDONLY)),
                errno(libc::chdir(c"/".as_ptr())),
                errno(libc::chroot(c"/".as_ptr())),
                errno(libc::syscall(libc::SYS_mount, 0, path, 0, 0, 0)),
            ]
        };
        // SAFETY: the descriptor is open; times are null.
        let allowed =
            unsafe { [errno(libc::fchmod(file.as_raw_fd(), 0o600)), errno(libc::futimens(file.as_raw_fd(), now))] };
        (refused, allowed)
    });
    std::fs::remove_file(&path).unwrap();
    assert_eq!(outcome, ([libc::EPERM; 15], [0; 2]));
}

#[test]
fn a_confined_share_process_has_no_sockets_programs_or_further_threads() {
    let outcome = confined(as_share, || {
        let started = thread::Builder::new().spawn(|| ()).is_ok();
        let refused = [
            code(std::net::UdpSocket::bind("127.0.0.1:0")),
            code(TcpStream::connect("127.0.0.1:1")),
            code(UnixStream::pair()),
            code(Command::new("/bin/true").status()),
        ];
        (started, refused)
    });
    assert_eq!(outcome, (false, [libc::EPERM; 4]));
    let threads =
        confined(|| confine_share(&[], false), || thread::Builder::new().spawn(|| 7).unwrap().join().unwrap());
    assert_eq!(threads, 7);
}

#[test]
fn a_thread_of_the_share_process_may_have_a_working_directory_of_its_own_and_nothing_else() {
    let apart = || {
        [libc::CLONE_FS, libc::CLONE_NEWUSER, libc::CLONE_FS | libc::CLONE_NEWNS, libc::CLONE_FILES].map(|flags| {
            // SAFETY: an integer.
            code(match unsafe { libc::unshare(flags) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            })
        })
    };
    let refused = [libc::EPERM; 3];
    assert_eq!(confined(|| confine_share(&[], false), apart), [&[0][..], &refused].concat()[..]);
    assert_eq!(confined(as_share, apart), [libc::EPERM; 4]);
}

#[test]
fn a_confined_share_process_locks_files_only_if_it_is_to() {
    let path = std::env::temp_dir().join(format!("bulkhead-sandbox-locks-{}", std::process::id()));
    std::fs::write(&path, b"x").unwrap();
    let locking = || {
        confine_share(&[], true)?;
        confine_share_thread(true)
    };
    let expected = [(as_share as fn() -> _, [libc::EPERM; 4]), (locking, [0, 0, 0, libc::EPERM])];
    for (confine, expected) in expected {
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let outcome = confined(confine, move || {
            let fd = file.as_raw_fd();
            // SAFETY: integers only, which may be zero.
            let mut lock: libc::flock = unsafe { std::mem::zeroed() };
            lock.l_type = libc::F_WRLCK as libc::c_short;
            // SAFETY: the descriptor is open, and the structure lives until each call has returned.
            unsafe {
                [
                    errno(libc::flock(fd, libc::LOCK_EX)),
                    errno(libc::fcntl(fd, libc::F_OFD_SETLKW, &raw const lock)),
                    errno(libc::fcntl(fd, libc::F_OFD_GETLK, &raw mut lock)),
                    // Those of processes end with any descriptor of the file.
                    errno(libc::fcntl(fd, libc::F_SETLK, &raw const lock)),
                ]
            }
        });
        assert_eq!(outcome, expected);
    }
    std::fs::remove_file(&path).unwrap();
}
