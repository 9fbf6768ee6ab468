//! Locks that the host keeps, against other programs of the host and among the guest's own.

use std::{
    io::{BufRead, BufReader},
    process::{Child, ChildStdin, Command, Stdio},
};

use super::*;

const INIT_LOCKS: u64 = 1 << 1 | 1 << 10;
const FLUSH: u32 = 25;
const GETLK: u32 = 31;
const SETLK: u32 = 32;
pub(super) const SETLKW: u32 = 33;

pub(super) const READ_LOCK: u32 = libc::F_RDLCK as u32;
pub(super) const WRITE_LOCK: u32 = libc::F_WRLCK as u32;
pub(super) const UNLOCK: u32 = libc::F_UNLCK as u32;
pub(super) const LAST: u64 = i64::MAX as u64;
pub(super) const ALL: (u64, u64) = (0, LAST);

/// Kinds of locks of host programs.
const KINDS: [&str; 3] = ["flock", "posix", "ofd"];

/// `struct fuse_lk_in`.
pub(super) fn lock(handle: u64, owner: u64, range: (u64, u64), kind: u32, flags: u32) -> Request {
    body().u64(handle).u64(owner).u64(range.0).u64(range.1).u32(kind).u32(100 + owner as u32).u32(flags).u32(0)
}

impl Guest {
    /// A guest of one share whose locks the host keeps.
    pub(super) fn locking() -> Self {
        Self::with_locks(&[("", false)], true)
    }

    fn set_lock(&self, node: u64, handle: u64, owner: u64, range: (u64, u64), kind: u32) -> Result<(), i32> {
        self.call(SETLK, node, lock(handle, owner, range, kind, 0)).map(drop)
    }

    /// flock(2).
    fn flock(&self, node: u64, handle: u64, kind: u32) -> Result<(), i32> {
        self.call(SETLK, node, lock(handle, 9, ALL, kind, 1)).map(drop)
    }

    /// First and last byte, kind and process of a lock in the way.
    fn get_lock(&self, node: u64, handle: u64, owner: u64, range: (u64, u64), kind: u32) -> Result<Found, i32> {
        let reply = self.call(GETLK, node, lock(handle, owner, range, kind, 0))?;
        Ok((u64_at(&reply, 0), u64_at(&reply, 8), u32_at(&reply, 16), u32_at(&reply, 20)))
    }

    fn release(&self, node: u64, handle: u64) {
        self.call(RELEASE, node, body().u64(handle).u32(0).u32(2).u64(9)).unwrap();
    }

    fn flush(&self, node: u64, handle: u64, owner: u64) -> Result<(), i32> {
        self.call(FLUSH, node, body().u64(handle).u64(0).u64(owner)).map(drop)
    }

    /// Makes a file and opens it for reading and writing.
    pub(super) fn file(&self, name: &str) -> (u64, u64) {
        std::fs::write(self.path(name), b"contents").unwrap();
        let node = self.node(name);
        (node, self.open(node, libc::O_RDWR).unwrap())
    }
}

type Found = (u64, u64, u32, u32);

/// A program of the host that has locked bytes 10 to 19 of a file, or all of it by flock(2).
struct HostProgram {
    child: Child,
    input: ChildStdin,
}

impl HostProgram {
    /// Tries to lock; `None` if another lock excludes that.
    fn lock(kind: &str, path: &Path, exclusive: bool) -> Option<Self> {
        let script = r#"
import fcntl, struct, sys
kind, path, exclusive = sys.argv[1], sys.argv[2], sys.argv[3] == "true"
file = open(path, "r+b")
try:
    if kind == "ofd":
        what = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
        fcntl.fcntl(file, 37, struct.pack("hhqqixxxx", what, 0, 10, 10, 0))
    else:
        how = (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB
        fcntl.flock(file, how) if kind == "flock" else fcntl.lockf(file, how, 10, 10)
except BlockingIOError:
    print("refused", flush=True); sys.exit(0)
print("locked", flush=True)
sys.stdin.readline()"#;
        let mut command = Command::new("python3");
        command.args(["-c", script, kind, path.to_str().unwrap(), &exclusive.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let input = child.stdin.take().unwrap();
        let program = Self { child, input };
        match line.trim() {
            "locked" => Some(program),
            "refused" => {
                program.end();
                None
            }
            other => panic!("the host program said {other:?}"),
        }
    }

    fn end(mut self) {
        // The end of its input, not a line: one that was refused may have ended by itself.
        drop(self.input);
        self.child.wait().unwrap();
    }
}

#[test]
fn locks_of_the_guest_and_of_host_programs_exclude_each_other() {
    let guest = Guest::locking();
    let (node, handle) = guest.file("file");
    let path = guest.path("file");
    for kind in KINDS {
        let set = |what| match kind {
            "flock" => guest.flock(node, handle, what),
            _ => guest.set_lock(node, handle, 1, (15, 30), what),
        };
        // The host's program first.
        let program = HostProgram::lock(kind, &path, true).unwrap();
        assert_eq!((set(WRITE_LOCK), set(READ_LOCK)), (Err(libc::EAGAIN), Err(libc::EAGAIN)), "{kind}");
        program.end();
        assert_eq!(set(WRITE_LOCK), Ok(()), "{kind}");
        // The guest first.
        assert!(HostProgram::lock(kind, &path, false).is_none(), "{kind}");
        assert_eq!(set(READ_LOCK), Ok(()), "{kind}");
        assert!(HostProgram::lock(kind, &path, true).is_none(), "{kind}");
        HostProgram::lock(kind, &path, false).unwrap().end();
        assert_eq!(set(UNLOCK), Ok(()), "{kind}");
        HostProgram::lock(kind, &path, true).unwrap().end();
    }
    // Bytes beside those of the host's program are free.
    let program = HostProgram::lock("posix", &path, true).unwrap();
    assert_eq!(guest.set_lock(node, handle, 1, (20, LAST), WRITE_LOCK), Ok(()));
    assert_eq!(guest.set_lock(node, handle, 1, (0, 9), WRITE_LOCK), Ok(()));
    program.end();
}

#[test]
fn owners_exclude_each_other_and_an_owner_has_its_locks_by_any_handle() {
    let guest = Guest::locking();
    let (node, first) = guest.file("file");
    let second = guest.open(node, libc::O_RDWR).unwrap();
    assert_eq!(guest.set_lock(node, first, 1, (0, 9), WRITE_LOCK), Ok(()));
    assert_eq!(guest.set_lock(node, first, 2, (9, 12), READ_LOCK), Err(libc::EAGAIN));
    assert_eq!(guest.set_lock(node, second, 1, (5, 12), WRITE_LOCK), Ok(()));
    assert_eq!(guest.set_lock(node, second, 1, (0, 3), UNLOCK), Ok(()));
    assert_eq!(guest.set_lock(node, first, 2, (0, 3), WRITE_LOCK), Ok(()));
    assert_eq!(guest.set_lock(node, first, 2, (4, 4), WRITE_LOCK), Err(libc::EAGAIN));
    // Each open file has its own lock by flock(2).
    assert_eq!(guest.flock(node, first, WRITE_LOCK), Ok(()));
    assert_eq!(guest.flock(node, second, READ_LOCK), Err(libc::EAGAIN));
    assert_eq!(guest.flock(node, first, READ_LOCK), Ok(()));
    assert_eq!(guest.flock(node, second, READ_LOCK), Ok(()));
}

#[test]
fn the_lock_in_the_way_is_described() {
    let guest = Guest::locking();
    let (node, handle) = guest.file("file");
    let get = |owner, range, kind| guest.get_lock(node, handle, owner, range, kind).unwrap();
    assert_eq!(get(1, ALL, WRITE_LOCK).2, UNLOCK);
    guest.set_lock(node, handle, 1, (5, LAST), READ_LOCK).unwrap();
    // An owner's own locks are not in its way.
    assert_eq!(get(1, ALL, WRITE_LOCK).2, UNLOCK);
    assert_eq!(get(2, ALL, READ_LOCK).2, UNLOCK);
    assert_eq!(get(2, ALL, WRITE_LOCK), (5, LAST, READ_LOCK, 101));
    guest.set_lock(node, handle, 1, ALL, UNLOCK).unwrap();
    // A process of the host has no number in the guest.
    for kind in ["posix", "ofd"] {
        let program = HostProgram::lock(kind, &guest.path("file"), true).unwrap();
        assert_eq!(get(1, ALL, READ_LOCK), (10, 19, WRITE_LOCK, 0), "{kind}");
        assert_eq!(get(1, (0, 9), READ_LOCK).2, UNLOCK, "{kind}");
        program.end();
    }
}

#[test]
fn locks_end_with_a_descriptor_of_their_process_and_with_their_open_file() {
    let guest = Guest::locking();
    let (node, first) = guest.file("file");
    let path = guest.path("file");
    let second = guest.open(node, libc::O_RDWR).unwrap();
    let is_free = || HostProgram::lock("posix", &path, true).map(HostProgram::end).is_some();
    // A process closes any of its descriptors of the file.
    guest.set_lock(node, first, 1, ALL, WRITE_LOCK).unwrap();
    guest.flush(node, second, 2).unwrap();
    assert!(!is_free());
    guest.flush(node, second, 1).unwrap();
    assert!(is_free());
    // The owner is an open file (`F_OFD_SETLK` in the guest).
    guest.set_lock(node, first, 7, ALL, WRITE_LOCK).unwrap();
    guest.flock(node, first, WRITE_LOCK).unwrap();
    guest.flush(node, first, 1).unwrap();
    assert!(!is_free() && HostProgram::lock("flock", &path, false).is_none());
    guest.release(node, second);
    assert!(!is_free() && HostProgram::lock("flock", &path, false).is_none());
    guest.release(node, first);
    assert!(is_free());
    HostProgram::lock("flock", &path, true).unwrap().end();
    // A new connection of the guest has none of the old one's.
    let third = guest.open(node, libc::O_RDWR).unwrap();
    guest.set_lock(node, third, 1, ALL, WRITE_LOCK).unwrap();
    guest.call(INIT, 0, body().u32(7).u32(41).u32(0).u32(u32::MAX).u32(u32::MAX)).unwrap();
    assert!(is_free());
}

#[test]
fn the_kernel_leaves_locks_to_the_server_only_if_it_is_to_have_them() {
    for (guest, expected) in [(Guest::locking(), INIT_LOCKS), (Guest::new(), 0)] {
        let reply = guest.call(INIT, 0, body().u32(7).u32(41).u32(0).u32(u32::MAX).u32(u32::MAX)).unwrap();
        assert_eq!(u64::from(u32_at(&reply, 12)) & INIT_LOCKS, expected);
        let (node, handle) = guest.file("file");
        let error = if expected == 0 { Err(libc::ENOSYS) } else { Ok(()) };
        assert_eq!(guest.set_lock(node, handle, 1, ALL, READ_LOCK), error);
        assert_eq!(guest.get_lock(node, handle, 1, ALL, READ_LOCK).map(drop), error);
        assert_eq!(guest.flush(node, handle, 1), error);
    }
}

#[test]
fn what_a_lock_protects_is_read_again() {
    for (guest, valid) in [(Guest::locking(), 0), (Guest::new(), 1)] {
        let (file, _) = guest.file("file");
        let directory = guest.node("");
        let time = |node| u64_at(&guest.call(GETATTR, node, body().u64(0).u64(0)).unwrap(), 0);
        assert_eq!((time(file), time(directory)), (valid, 1));
        // Of an entry the name, and its attributes.
        let entry = guest.call(LOOKUP, directory, body().name("file")).unwrap();
        assert_eq!((u64_at(&entry, 16), u64_at(&entry, 24)), (1, valid));
    }
}

#[test]
fn a_request_that_makes_no_sense_is_refused() {
    let guest = Guest::locking();
    let (node, handle) = guest.file("file");
    let other = guest.file("other");
    for (at, range, kind, flags, error) in [
        (handle, (1, 0), READ_LOCK, 0, libc::EINVAL),
        (handle, (0, LAST + 1), READ_LOCK, 0, libc::EINVAL),
        (handle, (u64::MAX, u64::MAX), READ_LOCK, 0, libc::EINVAL),
        (handle, ALL, 3, 0, libc::EINVAL),
        (handle, ALL, u32::MAX, 0, libc::EINVAL),
        (handle, ALL, READ_LOCK | 1 << 16, 0, libc::EINVAL),
        (handle, ALL, READ_LOCK, 2, libc::EINVAL),
        (other.1, ALL, READ_LOCK, 0, libc::EBADF),
        (77, ALL, READ_LOCK, 0, libc::EBADF),
    ] {
        for opcode in [SETLK, SETLKW, GETLK] {
            let result = guest.call(opcode, node, lock(at, 1, range, kind, flags)).map(drop);
            assert_eq!(result, Err(error), "{opcode} {range:?} {kind:x} {flags}");
        }
    }
    assert_eq!(guest.get_lock(node, handle, 1, ALL, UNLOCK), Err(libc::EINVAL));
    assert_eq!(guest.call(SETLK, node, body().u64(handle)), Err(libc::EINVAL));
    let (directory, _) = guest.mkdir(guest.node(""), "directory", 0o755).unwrap();
    let listing = u64_at(&guest.call(OPENDIR, directory, body().u32(0).u32(0)).unwrap(), 0);
    assert_eq!(guest.flock(directory, listing, WRITE_LOCK), Err(libc::EBADF));
}

#[test]
fn there_is_an_end_to_ranges_and_owners() {
    let guest = Guest::locking();
    let (node, handle) = guest.file("file");
    let locked =
        (0..5000).take_while(|at| guest.set_lock(node, handle, 1, (2 * at, 2 * at), READ_LOCK).is_ok()).count();
    assert_eq!(locked, 1024);
    assert_eq!(guest.set_lock(node, handle, 1, (1 << 40, 1 << 40), READ_LOCK), Err(libc::ENOLCK));
    // A lock that needs no further range is granted, and so is one in the place of those that it has made one.
    guest.set_lock(node, handle, 1, (0, 1000), READ_LOCK).unwrap();
    guest.set_lock(node, handle, 1, (1 << 40, 1 << 40), READ_LOCK).unwrap();
    let owners = (2..5000).take_while(|owner| guest.set_lock(node, handle, *owner, (0, 0), READ_LOCK).is_ok()).count();
    assert_eq!(owners, 1023);
    guest.flush(node, handle, 2).unwrap();
    assert_eq!(guest.set_lock(node, handle, 5000, (0, 0), READ_LOCK), Ok(()));
}

#[test]
fn any_file_that_is_open_can_be_locked() {
    unprivileged(|| {
        let guest = Guest::locking();
        let root = guest.node("");
        // Without a name, and with a mode that lets the user open it no more.
        for (mode, removed) in [(0o644, true), (0o444, false), (0o400, false)] {
            let name = format!("f{mode:o}");
            let (node, handle, _) = guest.create(root, &name, libc::O_RDWR, mode).unwrap();
            if removed {
                guest.remove(UNLINK, root, &name).unwrap();
            }
            assert_eq!(guest.set_lock(node, handle, 1, ALL, WRITE_LOCK), Ok(()), "{name}");
            assert_eq!(guest.set_lock(node, handle, 2, ALL, READ_LOCK), Err(libc::EAGAIN), "{name}");
            assert_eq!(guest.flock(node, handle, WRITE_LOCK), Ok(()), "{name}");
        }
        // By an owner that reads first and writes later: its shared lock stays.
        let (node, writing) = guest.file("both");
        let reading = guest.open(node, libc::O_RDONLY).unwrap();
        assert_eq!(guest.set_lock(node, reading, 1, (0, 9), WRITE_LOCK), Err(libc::EBADF));
        guest.set_lock(node, reading, 1, (0, 9), READ_LOCK).unwrap();
        guest.set_lock(node, writing, 1, (20, 29), WRITE_LOCK).unwrap();
        assert_eq!(guest.set_lock(node, writing, 2, (5, 5), WRITE_LOCK), Err(libc::EAGAIN));
        assert_eq!(guest.set_lock(node, writing, 2, (25, 25), READ_LOCK), Err(libc::EAGAIN));
    });
}

#[test]
fn a_successor_has_no_locks_and_says_so() {
    let shares = [("", false)];
    let mut guest = Guest::with_locks(&shares, true);
    let (node, ranged) = guest.file("file");
    let [whole, freed, plain] = [0; 3].map(|_| guest.open(node, libc::O_RDWR).unwrap());
    guest.set_lock(node, ranged, 1, (0, 0), READ_LOCK).unwrap();
    guest.set_lock(node, freed, 2, (0, 9), READ_LOCK).unwrap();
    guest.set_lock(node, freed, 2, (0, 9), UNLOCK).unwrap();
    guest.flock(node, whole, READ_LOCK).unwrap();
    guest.replace(&shares);
    for lost in [ranged, whole] {
        assert_eq!(guest.read(node, lost, 0, 9), Err(libc::EIO));
        assert_eq!(guest.write(node, lost, 0, b"x"), Err(libc::EIO));
        assert_eq!(guest.set_lock(node, lost, 1, ALL, UNLOCK), Err(libc::EIO));
        assert_eq!(guest.flock(node, lost, READ_LOCK), Err(libc::EIO));
        guest.flush(node, lost, 1).unwrap();
        guest.release(node, lost);
        assert_eq!(guest.read(node, lost, 0, 9), Err(libc::EBADF));
    }
    for good in [freed, plain, guest.open(node, libc::O_RDWR).unwrap()] {
        assert_eq!(guest.read(node, good, 0, 9).unwrap(), b"contents");
        guest.set_lock(node, good, good, (0, 9), READ_LOCK).unwrap();
    }
}
