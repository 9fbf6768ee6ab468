//! Behaviour that programs rely on beyond single calls: names of any bytes, mappings, holes, large trees, locks.

use std::{fs, os::unix::ffi::OsStrExt};

use super::{kernel::mounted, *};

#[test]
#[ignore = "needs root and /dev/fuse"]
fn names_of_any_bytes_pass_in_both_directions() {
    mounted(|mount| {
        let names = [
            b"new\nline".to_vec(),
            b"\xff\xfe".to_vec(),
            vec![b'n'; 255],
            b"  ".to_vec(),
            b"-rf".to_vec(),
            b"*".to_vec(),
        ];
        let host = mount.directory.path().join("share");
        for name in &names {
            fs::write(host.join(OsStr::from_bytes(name)), b"x").unwrap();
        }
        let script = r#"/usr/bin/python3 - <<'END'
import os
names = sorted(os.listdir(b"."))
for name in names:
    assert open(b"./" + name).read() == "x"
    os.mkdir(b"d" + name[1:])
    os.rename(name, b"d" + name[1:] + b"/" + name)
    os.symlink(name, b"d" + name[1:] + b"/l")
try:
    open(b"n" * 256, "w")
except OSError as error:
    print(error.strerror)
print(len(names))
END"#;
        assert_eq!(mount.output(0, script), "File name too long\n6");
        for name in &names {
            let directory = host.join(OsStr::from_bytes(&[b"d", &name[1..]].concat()));
            assert_eq!(fs::read(directory.join(OsStr::from_bytes(name))).unwrap(), b"x");
        }
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn a_mapping_is_shared_by_two_programs_and_reaches_the_host() {
    mounted(|mount| {
        let script = r#"/usr/bin/python3 - <<'END'
import mmap, os
open("m", "wb").write(b"\0" * 8192)
fds = [os.open("m", os.O_RDWR) for _ in range(2)]
one, two = [mmap.mmap(fd, 8192) for fd in fds]
one[4096:4101] = b"hello"
assert two[4096:4101] == b"hello"
if os.fork() == 0:
    two[0:2] = b"hi"
    os._exit(0)
os.wait()
assert one[0:2] == b"hi"
assert os.pread(fds[1], 5, 4096) == b"hello"
os.pwrite(fds[0], b"H", 4096)
assert two[4096:4101] == b"Hello"
one.flush()
[os.close(fd) for fd in fds]
two[4100:4101] = b"O"
one.close(); two.close()
END"#;
        mount.output(0, script);
        let host = fs::read(mount.directory.path().join("share/m")).unwrap();
        assert_eq!((&host[..2], &host[4096..4101]), (&b"hi"[..], &b"HellO"[..]));
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn direct_requests_holes_copies_and_unnamed_files_work() {
    mounted(|mount| {
        let script = r#"/usr/bin/python3 - <<'END'
import mmap, os
block = mmap.mmap(-1, 4096); block.write(b"d" * 4096)
fd = os.open("direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o644)
assert os.writev(fd, [block]) == 4096
block.seek(0); block.write(b"\0" * 4096)
os.lseek(fd, 0, 0)
assert os.readv(fd, [block]) == 4096 and block[:] == b"d" * 4096
# A change of another program is seen past the cache, and one past the cache by programs that use it.
assert open("direct", "rb").read(1) == b"d"
block.seek(0); block.write(b"e" * 4096)
os.lseek(fd, 0, 0); os.writev(fd, [block])
assert open("direct", "rb").read() == b"e" * 4096
# As on a disk, the file can be mapped, and each of mapping, direct requests and cached ones sees the others' changes.
shared = mmap.mmap(fd, 4096)
assert shared[:4] == b"eeee"
shared[:4] = b"mmmm"
os.lseek(fd, 0, 0)
assert os.readv(fd, [block]) == 4096 and block[:5] == b"mmmme"
block.seek(0); block.write(b"e" * 4096)
os.lseek(fd, 0, 0); os.writev(fd, [block])
assert shared[:4] == b"eeee" and open("direct", "rb").read() == b"e" * 4096
shared.close()
# Past the end, and to the end, from a second descriptor that is in step with the first.
end = os.open("end", os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_APPEND | os.O_DSYNC, 0o644)
for size in (4096, 8192):
    assert os.writev(end, [block]) == 4096 and os.stat("end").st_size == size
assert os.pwritev(fd, [block], 8192, os.RWF_DSYNC) == 4096 and os.fstat(fd).st_size == 12288
os.ftruncate(fd, 4096)
os.unlink("end")
sparse = os.open("sparse", os.O_RDWR | os.O_CREAT, 0o644)
os.pwrite(sparse, b"x", 1 << 30)
assert os.lseek(sparse, 0, os.SEEK_DATA) == 1 << 30
assert os.lseek(sparse, 0, os.SEEK_HOLE) == 0
try:
    os.lseek(sparse, (1 << 30) + 4096, os.SEEK_DATA); assert False
except OSError as error:
    assert error.errno == 6
assert os.fstat(sparse).st_blocks < 100
os.posix_fallocate(sparse, 0, 1 << 20)
assert os.fstat(sparse).st_blocks >= 2048
copy = os.open("copy", os.O_RDWR | os.O_CREAT, 0o644)
assert os.copy_file_range(fd, copy, 4096, 0, 4096) == 4096
assert os.pread(copy, 9000, 0) == b"\0" * 4096 + b"e" * 4096
unnamed = os.open(".", os.O_RDWR | os.O_TMPFILE, 0o600)
os.write(unnamed, b"text")
assert os.pread(unnamed, 9, 0) == b"text"
os.link(f"/proc/self/fd/{unnamed}", "named", src_dir_fd=unnamed, follow_symlinks=True)
assert open("named").read() == "text"
os.rename("named", "copy")
assert os.fstat(copy).st_nlink == 0 and open("copy").read() == "text"
assert os.pread(copy, 1, 5000) == b"e"
END
fallocate -p -o 0 -l 4096 direct; od -An -tx1 -N2 direct; ls"#;
        assert_eq!(mount.output(0, script), "00 00\ncopy\ndirect\nsparse");
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn locks_hold_between_programs() {
    mounted(|mount| {
        let script = r#"/usr/bin/python3 - <<'END'
import fcntl, os
fd = os.open("l", os.O_RDWR | os.O_CREAT)
for lock in (fcntl.flock, fcntl.lockf):
    lock(fd, fcntl.LOCK_EX)
    if os.fork() == 0:
        other = os.open("l", os.O_RDWR)
        try:
            lock(other, fcntl.LOCK_EX | fcntl.LOCK_NB); os._exit(1)
        except BlockingIOError:
            os._exit(0)
    assert os.wait()[1] == 0
END"#;
        mount.output(0, script);
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn files_have_more_names_than_the_server_remembers() {
    mounted(|mount| {
        let script = "echo x > n0; for n in $(seq 30); do ln n0 n$n; done; stat -c %h n30
             for n in $(seq 30 -1 1); do rm n$n; cat n0; done | sort | uniq -c | tr -s ' '; stat -c %h n0";
        assert_eq!(mount.output(NOBODY, script), "31\n 30 x\n1");
    });
}

#[test]
fn a_directory_of_50_000_files_is_listed_and_looked_up_whole() {
    unprivileged(|| {
        let guest = Guest::new();
        fs::create_dir(guest.path("d")).unwrap();
        for n in 0..50_000 {
            fs::write(guest.path("d").join(n.to_string()), b"").unwrap();
        }
        let directory = guest.node("d");
        for (plus, room) in [(false, 4096), (true, 1 << 16)] {
            let mut names: Vec<_> =
                guest.list(directory, plus, room).unwrap().into_iter().map(|entry| entry.name).collect();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), 50_002, "with `.` and `..`");
        }
        let (node, _) = guest.lookup(directory, "49999").unwrap();
        assert!(guest.open(node, libc::O_RDONLY).is_ok());
    });
}

#[test]
fn a_read_only_directory_is_moved_by_a_user_who_may() {
    // Root of the guest, as it is on a disk; the guest's kernel refuses others before it asks.
    unprivileged(|| {
        let guest = Guest { caller: (0, 0), ..Guest::new() };
        let root = guest.node("");
        let (to, _) = guest.mkdir(root, "to", 0o755).unwrap();
        let (module, _) = guest.mkdir(root, "module", 0o755).unwrap();
        guest.mkdir(module, "inner", 0o755).unwrap();
        guest.chmod(module, 0o555).unwrap();
        guest.rename((root, "module"), (to, "module"), 0).unwrap();
        assert_eq!(guest.names(to), ["module"]);
        assert_eq!(guest.attributes(module).unwrap().mode & 0o7777, 0o555);
        // By turns with another one, which is read-only as well.
        let (other, _) = guest.mkdir(root, "other", 0o555).unwrap();
        guest.rename((root, "other"), (to, "module"), 2).unwrap();
        assert_eq!((guest.names(other).len(), guest.names(module)), (0, vec!["inner".to_owned()]));
        assert_eq!(guest.attributes(other).unwrap().mode & 0o7777, 0o555);
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn every_call_and_every_error_is_as_on_a_disk() {
    let disk = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(disk.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    mounted(move |mount| {
        rustix::process::umask(rustix::fs::Mode::empty());
        for (place, directory) in [("disk", disk.path().to_owned()), ("share", mount.place())] {
            let (differing, rows) = posix_table::run(&directory);
            assert!(differing.is_empty() && rows > 120, "{place}: {rows} rows\n{}", differing.join("\n"));
        }
    });
}
