//! Files that would be more to the host than data: privileged programs, devices, attributes of the kernel, and those
//! whose open waits for somebody.

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::UnixListener,
    },
    time::{Duration, Instant},
};

use rustix::fs::{CWD, FileType, Mode, OFlags, XattrFlags, mknodat, open, setxattr};

use super::*;

/// Bits of a mode for changed identity on execution.
const PRIVILEGES: u32 = 0o6000;

/// Time in which each request has to be answered.
const ANSWERED: Duration = Duration::from_secs(5);

/// Runs a test as a user without privileges, and as root if this process is root's: then the server is, too.
fn as_each_user(test: fn()) {
    unprivileged(test);
    if rustix::process::geteuid().is_root() {
        test();
    }
}

/// Fails if a file below a directory is more than data, or lets somebody else's rights be had.
fn assert_harmless(directory: &Path) {
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let of = entry.metadata().unwrap();
        assert_eq!(of.mode() & PRIVILEGES, 0, "{entry:?}");
        assert!(of.is_file() || of.is_dir() || of.is_symlink(), "{entry:?}");
        if of.is_dir() {
            assert_harmless(&entry.path());
        }
    }
}

#[test]
fn no_request_makes_a_privileged_program_or_a_device_of_the_host() {
    as_each_user(|| {
        let guest = Guest { caller: (0, 0), ..Guest::new() };
        let root = guest.node("");
        for bits in [0o4000, 0o2000, 0o6000, 0o7000] {
            let mode = bits | 0o755;
            let name = |kind: &str| format!("{kind}-{bits:o}");
            let (file, handle, _) = guest.create(root, name("file"), libc::O_RDWR, mode).unwrap();
            guest.write(file, handle, 0, b"#!").unwrap();
            assert_eq!(guest.chmod(file, mode).unwrap().mode & 0o7777, mode);
            guest.chown(file, 0, 0).unwrap();
            guest.chmod(file, mode).unwrap();
            let (directory, _) = guest.mkdir(root, name("directory"), mode).unwrap();
            guest.chmod(directory, mode).unwrap();
            guest.create(directory, "below", libc::O_RDWR, mode).unwrap();
            for kind in [libc::S_IFREG, libc::S_IFCHR, libc::S_IFBLK, libc::S_IFIFO, libc::S_IFSOCK] {
                let (node, _) = guest.mknod(root, &name(&format!("node-{kind:o}")), kind | mode, 8 << 8 | 1).unwrap();
                guest.chmod(node, mode).unwrap();
            }
            let flags = (libc::O_RDWR | libc::O_TMPFILE).cast_unsigned();
            let whole = body().u32(flags).u32(libc::S_IFREG | mode).u64(0).name("/");
            let unnamed = entry(&guest.call(TMPFILE, root, whole).unwrap()).0;
            guest.call(LINK, root, body().u64(unnamed).name(name("linked"))).unwrap();
            // Types that are none.
            for kind in [libc::S_IFLNK, libc::S_IFDIR, libc::S_IFMT, 0] {
                assert_eq!(guest.mknod(root, "none", kind | mode, 0), Err(libc::EINVAL));
            }
        }
        assert_harmless(guest.directory.path());
    });
}

#[test]
fn attributes_that_mean_something_to_the_host_cannot_be_reached() {
    as_each_user(|| {
        let guest = Guest { caller: (0, 0), ..Guest::new() };
        let root = guest.node("");
        let (file, ..) = guest.create(root, "file", libc::O_RDWR, 0o755).unwrap();
        let (directory, _) = guest.mkdir(root, "directory", 0o755).unwrap();
        // The capability to do everything, in the kernel's version 2.
        let capability = [1, 0, 0, 2, 255, 255, 255, 255, 0, 0, 0, 0, 255, 255, 255, 255, 0, 0, 0, 0];
        let is_root = own().0 == 0;
        if is_root {
            setxattr(guest.path("file"), "trusted.kept", b"x", XattrFlags::empty()).unwrap();
        }
        for node in [file, directory] {
            for name in [
                "security.capability",
                "security.selinux",
                "security.ima",
                "trusted.overlay.opaque",
                "trusted.kept",
                "system.posix_acl_access",
                "system.posix_acl_default",
                "user.bulkhead.owner",
                "USER.x",
                "user",
                "",
            ] {
                let size = capability.len() as u32;
                let set = body().u32(size).u32(0).name(name).bytes(&capability);
                let results = [
                    guest.call(SETXATTR, node, set),
                    guest.call(GETXATTR, node, body().u32(size).u32(0).name(name)),
                    guest.call(REMOVEXATTR, node, body().name(name)),
                ];
                assert!(results.iter().all(|result| *result == Err(libc::EOPNOTSUPP)), "{name}: {results:?}");
            }
            assert_eq!(guest.call(LISTXATTR, node, body().u32(1000).u32(0)).unwrap(), b"");
        }
        if is_root {
            assert_eq!(rustix::fs::getxattr(guest.path("file"), "trusted.kept", &mut [0; 8]), Ok(1));
        }
    });
}

#[test]
fn a_pipe_or_a_socket_of_the_host_never_keeps_a_request_waiting() {
    unprivileged(|| {
        let guest = Guest::new();
        let root = guest.node("");
        fs::write(guest.path("pipe"), b"a file at first").unwrap();
        fs::write(guest.path("socket"), b"a file at first").unwrap();
        let known = ["pipe", "socket"].map(|name| guest.node(name));
        for name in ["pipe", "socket"] {
            fs::remove_file(guest.path(name)).unwrap();
        }
        // Nobody has the other end of the pipe; the socket listens.
        mknodat(CWD, guest.path("pipe"), FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
        let listener = UnixListener::bind(guest.path("socket")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let begun = Instant::now();
        let new = ["pipe", "socket"].map(|name| guest.node(name));
        for node in known {
            assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::ESTALE));
        }
        for (node, name) in new.into_iter().zip(["pipe", "socket"]) {
            for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_WRONLY | libc::O_TRUNC] {
                assert_eq!(guest.open(node, flags), Err(libc::EOPNOTSUPP));
                assert_eq!(guest.create(root, name, flags, 0o600), Err(libc::EOPNOTSUPP));
            }
            assert_eq!(guest.set(node, 1 << 3, 0, 0, 0, (0, 0)), Err(libc::EINVAL));
            assert_eq!(guest.call(OPENDIR, node, body().u64(0)), Err(libc::ENOTDIR));
            assert!(guest.set(node, 1 << 4 | 1 << 5, 0, 0, 0, (0, 0)).is_ok());
            assert_eq!(guest.call(LISTXATTR, node, body().u32(0).u32(0)).map(|reply| u32_at(&reply, 0)), Ok(0));
        }
        assert!(begun.elapsed() < ANSWERED);
        assert!(listener.accept().is_err(), "nothing connects to the host's socket");
    });
}

#[test]
fn a_race_of_a_file_and_a_pipe_never_keeps_a_request_waiting() {
    unprivileged(|| {
        let guest = Guest::new();
        let root = guest.node("");
        fs::write(guest.path("turn"), b"data").unwrap();
        mknodat(CWD, guest.path("pipe"), FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
        let (ended, seen) = mpsc::channel::<()>();
        let (turn, pipe) = (guest.path("turn"), guest.path("pipe"));
        let racing = thread::spawn(move || {
            while seen.try_recv() == Err(mpsc::TryRecvError::Empty) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(CWD, &turn, CWD, &pipe, flags).unwrap();
            }
        });
        let deadline = Instant::now() + Duration::from_secs(2);
        let mut opened = 0;
        while Instant::now() < deadline {
            let Ok((node, _)) = guest.lookup(root, "turn") else { continue };
            for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
                let begun = Instant::now();
                if let Ok(handle) = guest.open(node, flags) {
                    opened += 1;
                    guest.call(RELEASE, node, body().u64(handle)).unwrap();
                }
                assert!(begun.elapsed() < ANSWERED);
            }
        }
        drop(ended);
        racing.join().unwrap();
        assert!(opened > 0, "the file was never there");
    });
}

#[test]
fn a_lease_of_the_host_does_not_keep_a_request_waiting() {
    unprivileged(|| {
        let guest = Guest::new();
        fs::write(guest.path("leased"), b"data").unwrap();
        let node = guest.node("leased");
        let held = open(guest.path("leased"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        // The kernel tells the holder of a lease by SIGIO, which would end this process.
        // SAFETY: a signal's disposition, and integers for a descriptor that is open.
        unsafe {
            libc::signal(libc::SIGIO, libc::SIG_IGN);
            let fd = std::os::fd::AsRawFd::as_raw_fd(&held);
            assert_eq!(libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK), 0);
        }
        let begun = Instant::now();
        assert_eq!(guest.open(node, libc::O_WRONLY), Err(libc::EAGAIN));
        assert!(begun.elapsed() < ANSWERED, "it waited for the lease to be given up");
        drop(held);
        assert!(guest.open(node, libc::O_WRONLY).is_ok());
    });
}

#[test]
fn a_link_to_a_file_of_somebody_else_gives_no_access_to_it() {
    // Root makes the file of another user, and the server has no privileges.
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    let path = directory.path().to_owned();
    fs::write(path.join("theirs"), b"secret").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    fs::set_permissions(path.join("theirs"), fs::Permissions::from_mode(0o4700)).unwrap();
    unprivileged(move || {
        let mut guest = Guest { directory, ..Guest::new() };
        guest.caller = (0, 0);
        guest.restart(&[("", false)], 3);
        let (root, theirs) = (guest.node(""), guest.node("theirs"));
        // With `fs.protected_hardlinks` the host refuses it, without it the link is one more name.
        let node = match guest.call(LINK, root, body().u64(theirs).name("mine")) {
            Ok(reply) => entry(&reply).0,
            Err(error) => {
                assert_eq!(error, libc::EPERM);
                theirs
            }
        };
        for node in [theirs, node] {
            for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_WRONLY | libc::O_TRUNC] {
                assert_eq!(guest.open(node, flags), Err(libc::EACCES));
            }
            assert_eq!(guest.chmod(node, 0o777).map(drop), Err(libc::EACCES));
            assert_eq!(guest.chown(node, 1000, 1000).map(drop), Err(libc::EACCES));
            assert_eq!(guest.set(node, 1 << 3, 0, 0, 0, (0, 0)), Err(libc::EACCES));
            assert_eq!(guest.set(node, 1 << 5, 0, 0, 0, (0, 0)), Err(libc::EACCES));
            let set = body().u32(1).u32(0).name("user.x").bytes(b"x");
            assert_eq!(guest.call(SETXATTR, node, set), Err(libc::EACCES));
        }
        std::mem::forget(guest.directory);
    });
    let after = fs::metadata(path.join("theirs")).unwrap();
    assert_eq!(
        (after.mode() & 0o7777, after.uid(), fs::read(path.join("theirs")).unwrap()),
        (0o4700, 0, b"secret".into())
    );
    fs::remove_dir_all(path).unwrap();
}

#[test]
fn flags_of_open_that_are_the_hosts_business_are_not_passed_on() {
    let passed = OFlags::RWMODE | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC;
    for bit in 0..32 {
        let flags = crate::fs::open_flags(1 << bit);
        assert!(passed.contains(flags), "{flags:?}");
    }
    assert_eq!(crate::fs::open_flags(u32::MAX), passed);
}

#[test]
fn the_files_of_the_hosts_kernel_are_out_of_reach_by_every_path() {
    unprivileged(|| {
        let mut guest = Guest::new();
        let (server, failed) =
            Server::new(&[Share { path: "/".into(), read_only: false }], &[], 4096, 9, &State::own().unwrap(), false);
        assert!(failed.is_empty());
        guest.serve_with(server);
        // By links that the kernel resolves itself, and by their names.
        let root = guest.node("");
        for (name, target) in [("root", "/proc/self/root"), ("fd", "/proc/self/fd/0"), ("cwd", "/proc/thread-self/cwd")]
        {
            std::os::unix::fs::symlink(target, guest.path(name)).unwrap();
            let (node, _) = guest.lookup(root, name).unwrap();
            assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::EOPNOTSUPP));
            assert_eq!(guest.lookup(node, "etc"), Err(libc::ENOTDIR));
        }
        for path in ["/proc/self/mem", "/proc/1/environ", "/proc/sys/kernel/core_pattern", "/sys/kernel/uevent_helper"]
        {
            assert_eq!(guest.find(Path::new(path)).map(drop), Err(libc::EACCES), "{path}");
        }
        // Numbers of nodes count up: the one that the refused file would have had is not served either.
        let next = guest.create(root, "next", libc::O_RDWR, 0o600).unwrap().0;
        for guess in next - 64..next + 64 {
            let Ok(attributes) = guest.attributes(guess) else { continue };
            assert_ne!(attributes.mode & libc::S_IFMT, 0);
            let reply = guest.lookup(guess, "core_pattern");
            assert!(reply.is_err(), "{reply:?}");
        }
    });
}
