//! Files and directories: what a program of the guest does with them, and what the host has then.

use std::{
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
};

use rustix::io::ReadWriteFlags;

use super::*;
use crate::{fs::write_flags, fuse::reply};

/// `RENAME_NOREPLACE` and `RENAME_EXCHANGE`.
const NOREPLACE: u32 = 1;
const EXCHANGE: u32 = 2;

#[test]
fn a_file_is_created_written_read_and_removed() {
    unprivileged(|| {
        let guest = Guest::new();
        let root = guest.node("");
        let (node, handle, attributes) = guest.create(root, "file", libc::O_RDWR, 0o640).unwrap();
        assert_eq!((attributes.mode, attributes.links), (libc::S_IFREG | 0o640, 1));
        assert_eq!((attributes.uid, attributes.gid), own());
        assert_eq!(guest.write(node, handle, 3, b"hello"), Ok(5));
        assert_eq!(fs::read(guest.path("file")).unwrap(), b"\0\0\0hello");
        assert_eq!(guest.read(node, handle, 2, 100).unwrap(), b"\0hello");
        assert_eq!(guest.read(node, handle, 8, 100).unwrap(), b"");
        assert_eq!(guest.attributes(node).unwrap().size, 8);
        guest.remove(UNLINK, root, "file").unwrap();
        assert!(!guest.path("file").exists());
        assert_eq!(guest.lookup(root, "file"), Err(libc::ENOENT));
    });
}

#[test]
fn a_file_that_was_deleted_stays_usable_as_long_as_it_is_open() {
    unprivileged(|| {
        let guest = Guest::new();
        let root = guest.node("");
        let (node, handle, _) = guest.create(root, "file", libc::O_RDWR, 0o600).unwrap();
        guest.remove(UNLINK, root, "file").unwrap();
        assert_eq!(guest.write(node, handle, 0, b"data"), Ok(4));
        let attributes = guest.attributes(node).unwrap();
        assert_eq!((attributes.size, attributes.links), (4, 0));
        assert_eq!(guest.set(node, 1 << 3, 0, 2, 0, (0, 0)).unwrap().size, 2);
        assert_eq!(guest.chmod(node, 0o444).unwrap().mode & 0o777, 0o444);
        assert_eq!(guest.read(node, handle, 0, 9).unwrap(), b"da");
        guest.call(RELEASE, node, body().u64(handle).u32(0).u32(0).u64(0)).unwrap();
        assert_eq!(guest.attributes(node), Err(libc::ESTALE));
        assert_eq!(guest.read(node, handle, 0, 9), Err(libc::EBADF));
    });
}

#[test]
fn a_new_file_at_the_place_of_a_deleted_one_is_another_node() {
    unprivileged(|| {
        let guest = Guest::new();
        let root = guest.node("");
        fs::write(guest.path("file"), b"old").unwrap();
        let (old, _) = guest.lookup(root, "file").unwrap();
        // Most file systems give the new file the inode number of the old one.
        for _ in 0..50 {
            fs::remove_file(guest.path("file")).unwrap();
            fs::write(guest.path("file"), b"new").unwrap();
            assert_eq!(guest.attributes(old), Err(libc::ESTALE));
            assert_eq!(guest.open(old, libc::O_RDONLY), Err(libc::ESTALE));
        }
        let (new, _) = guest.lookup(root, "file").unwrap();
        assert_ne!(new, old);
        let handle = guest.open(new, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(new, handle, 0, 9).unwrap(), b"new");
    });
}

#[test]
fn a_read_only_file_is_created_and_written_through_one_descriptor() {
    unprivileged(|| {
        for caller in [own(), (0, 0), (33, 33)] {
            let guest = Guest { caller, ..Guest::new() };
            let root = guest.node("");
            let (node, handle, attributes) = guest.create(root, "object", libc::O_RDWR | libc::O_EXCL, 0o444).unwrap();
            assert_eq!((attributes.mode & 0o777, (attributes.uid, attributes.gid)), (0o444, caller));
            assert_eq!(guest.write(node, handle, 0, b"blob"), Ok(4));
            let host = fs::metadata(guest.path("object")).unwrap();
            assert_eq!((host.mode() & 0o777, host.len()), (0o444, 4));
            // chown and chmod of git, and an owner's change of such a file.
            assert_eq!(guest.chown(node, 5, 6).unwrap().uid, 5);
            assert_eq!(fs::metadata(guest.path("object")).unwrap().mode() & 0o777, 0o444);
        }
    });
}

#[test]
fn cached_data_is_kept_as_long_as_nothing_has_changed_the_file() {
    unprivileged(|| {
        let guest = Guest::new();
        fs::write(guest.path("file"), b"one").unwrap();
        let node = guest.node("file");
        let keeps = || {
            let reply = guest.call(OPEN, node, body().u64(0)).unwrap();
            u32_at(&reply, 8) == 1 << 1
        };
        assert!(!keeps() && !keeps(), "a change in the same tick of the clock would have the same time");
        std::thread::sleep(std::time::Duration::from_millis(150));
        assert!(!keeps() && keeps() && keeps());
        fs::write(guest.path("file"), b"two").unwrap();
        assert!(!keeps());
        std::thread::sleep(std::time::Duration::from_millis(150));
        assert!(!keeps() && keeps());
    });
}

#[test]
fn data_is_appended_where_the_file_ends_on_the_host() {
    unprivileged(|| {
        let guest = Guest::new();
        let root = guest.node("");
        let (node, handle, _) = guest.create(root, "log", libc::O_WRONLY | libc::O_APPEND, 0o600).unwrap();
        fs::write(guest.path("log"), b"host ").unwrap();
        assert_eq!(guest.write_with(node, handle, 0, b"guest", libc::O_APPEND, 0), Ok(5));
        assert_eq!(fs::read(guest.path("log")).unwrap(), b"host guest");
        // Pages of a mapping are written where they belong.
        assert_eq!(guest.write(node, handle, 0, b"HOST"), Ok(4));
        assert_eq!(fs::read(guest.path("log")).unwrap(), b"HOST guest");
    });
}

#[test]
fn directories_are_made_listed_renamed_and_removed() {
    unprivileged(|| {
        let guest = Guest::new();
        let root = guest.node("");
        let (a, attributes) = guest.mkdir(root, "a", 0o755).unwrap();
        assert_eq!(attributes.mode, libc::S_IFDIR | 0o755);
        let (b, _) = guest.mkdir(a, "b", 0o700).unwrap();
        let (file, handle, _) = guest.create(b, "file", libc::O_RDWR, 0o600).unwrap();
        assert_eq!(guest.remove(RMDIR, root, "a"), Err(libc::ENOTEMPTY));
        guest.rename((root, "a"), (root, "c"), 0).unwrap();
        assert_eq!(guest.names(root), ["c"]);
        assert_eq!(guest.names(a), ["b"]);
        assert_eq!(guest.attributes(file).unwrap().size, 0);
        guest.rename((b, "file"), (root, "file"), NOREPLACE).unwrap();
        assert_eq!(guest.rename((root, "file"), (root, "c"), NOREPLACE), Err(libc::EEXIST));
        guest.rename((root, "file"), (root, "c"), EXCHANGE).unwrap();
        assert!(guest.path("file/b").is_dir() && guest.path("c").is_file());
        assert_eq!(guest.names(a), ["b"]);
        guest.write(file, handle, 0, b"x").unwrap();
        assert_eq!(guest.attributes(file).unwrap().size, 1);
        assert_eq!(guest.rename((root, "c"), (root, "d"), 4), Err(libc::EINVAL), "a whiteout");
        guest.remove(RMDIR, a, "b").unwrap();
        guest.remove(RMDIR, root, "file").unwrap();
        assert_eq!(guest.attributes(b).unwrap().links, 0, "a program may still be in it");
    });
}

#[test]
fn names_of_any_bytes_and_of_full_length_are_listed() {
    unprivileged(|| {
        let guest = Guest::new();
        let root = guest.node("");
        let mut names = vec![b"\xff\xfe not UTF-8 \x01".to_vec(), vec![b'n'; 255], "ü".repeat(127).into_bytes()];
        names.extend((0..300).map(|n| format!("file-{n}").into_bytes()));
        for name in &names {
            guest.create(root, OsStr::from_bytes(name), libc::O_RDWR, 0o600).unwrap();
        }
        let (mut listed, mut with_nodes) =
            (guest.list(root, false, 512).unwrap(), guest.list(root, true, 4096).unwrap());
        listed.retain(|entry| entry.name != b"." && entry.name != b"..");
        with_nodes.retain(|entry| entry.name != b"." && entry.name != b"..");
        for (plain, plus) in listed.iter().zip(&with_nodes) {
            assert_eq!((plain.number, plain.kind, &plain.name), (plus.number, plus.kind, &plus.name));
            let (node, attributes) = guest.lookup(root, OsStr::from_bytes(&plus.name)).unwrap();
            assert_eq!((node, attributes.number), (plus.node, plus.number));
        }
        let mut found: Vec<_> = listed.into_iter().map(|entry| entry.name).collect();
        found.sort();
        names.sort();
        assert_eq!((found, with_nodes.len()), (names.clone(), names.len()));
        let long = "n".repeat(256);
        assert_eq!(guest.create(root, &long, libc::O_RDWR, 0o600), Err(libc::ENAMETOOLONG));
        assert_eq!(guest.lookup(root, &long), Err(libc::ENAMETOOLONG));
    });
}

#[test]
fn links_have_one_node_and_survive_each_other() {
    unprivileged(|| {
        let guest = Guest::new();
        let root = guest.node("");
        let (node, handle, _) = guest.create(root, "one", libc::O_RDWR, 0o600).unwrap();
        guest.call(RELEASE, node, body().u64(handle)).unwrap();
        let linked = guest.call(LINK, root, body().u64(node).name("two")).map(|reply| entry(&reply)).unwrap();
        assert_eq!((linked.0, linked.1.links), (node, 2));
        guest.remove(UNLINK, root, "two").unwrap();
        assert_eq!(guest.attributes(node).unwrap().links, 1);
        guest.call(LINK, root, body().u64(node).name("three")).unwrap();
        guest.remove(UNLINK, root, "one").unwrap();
        assert_eq!(guest.attributes(node).unwrap().links, 1);
        // Renamed on the host: found by its new name, and the node stays the same.
        fs::rename(guest.path("three"), guest.path("four")).unwrap();
        assert_eq!(guest.attributes(node), Err(libc::ESTALE));
        assert_eq!(guest.lookup(root, "four").unwrap().0, node);
        assert!(guest.attributes(node).is_ok());
        let directory = guest.mkdir(root, "directory", 0o700).unwrap().0;
        assert_eq!(guest.call(LINK, root, body().u64(directory).name("x")), Err(libc::EPERM));
    });
}

#[test]
fn a_file_without_a_name_gets_one() {
    unprivileged(|| {
        let guest = Guest { caller: (7, 8), ..Guest::new() };
        let root = guest.node("");
        let whole =
            body().u32((libc::O_RDWR | libc::O_TMPFILE).cast_unsigned()).u32(libc::S_IFREG | 0o640).u64(0).name("/");
        let reply = guest.call(TMPFILE, root, whole).unwrap();
        let ((node, attributes), handle) = (entry(&reply), u64_at(&reply, 128));
        assert_eq!((attributes.links, attributes.uid, attributes.gid), (0, 7, 8));
        guest.write(node, handle, 0, b"text").unwrap();
        let linked = guest.call(LINK, root, body().u64(node).name("file")).map(|reply| entry(&reply)).unwrap();
        assert_eq!((linked.0, linked.1.links, linked.1.uid), (node, 1, 7));
        assert_eq!(fs::read(guest.path("file")).unwrap(), b"text");
    });
}

#[test]
fn times_and_sizes_are_the_hosts() {
    unprivileged(|| {
        let guest = Guest::new();
        let root = guest.node("");
        let (node, ..) = guest.create(root, "file", libc::O_RDWR, 0o600).unwrap();
        assert_eq!(guest.set(node, 1 << 3, 0, 5000, 0, (0, 0)).unwrap().size, 5000);
        guest.set(node, 1 << 4 | 1 << 5, 0, 0, 0, (0, 0)).unwrap();
        let host = fs::metadata(guest.path("file")).unwrap();
        assert_eq!((host.len(), host.atime(), host.atime_nsec(), host.mtime(), host.mtime_nsec()), (5000, 1, 3, 2, 4));
        // O_TRUNC comes with OPEN.
        guest.open(node, libc::O_WRONLY | libc::O_TRUNC).unwrap();
        assert_eq!(guest.attributes(node).unwrap().size, 0);
        assert_eq!(guest.set(guest.mkdir(root, "d", 0o700).unwrap().0, 1 << 3, 0, 1, 0, (0, 0)), Err(libc::EINVAL));
    });
}

#[test]
fn holes_are_found_and_ranges_copied() {
    unprivileged(|| {
        let guest = Guest::new();
        let root = guest.node("");
        let (from, from_handle, _) = guest.create(root, "from", libc::O_RDWR, 0o600).unwrap();
        let (to, to_handle, _) = guest.create(root, "to", libc::O_RDWR, 0o600).unwrap();
        guest.write(from, from_handle, 1 << 20, b"data").unwrap();
        let seek = |whence: i32| {
            let whole = body().u64(from_handle).u64(0).u32(whence.cast_unsigned()).u32(0);
            guest.call(LSEEK, from, whole).map(|reply| u64_at(&reply, 0))
        };
        assert_eq!(seek(libc::SEEK_DATA), Ok(1 << 20));
        assert_eq!(seek(libc::SEEK_HOLE), Ok(0));
        assert_eq!(seek(libc::SEEK_SET), Err(libc::EINVAL));
        let range = body().u64(from_handle).u64(1 << 20).u64(to).u64(to_handle).u64(1).u64(100).u64(0);
        assert_eq!(guest.call(COPY_FILE_RANGE, from, range).map(|reply| u32_at(&reply, 0)), Ok(4));
        assert_eq!(fs::read(guest.path("to")).unwrap(), b"\0data");
    });
}

#[test]
fn attributes_of_users_are_passed_on_and_others_do_not_exist() {
    unprivileged(|| {
        let guest = Guest { caller: (3, 4), ..Guest::new() };
        let root = guest.node("");
        let (node, ..) = guest.create(root, "file", libc::O_RDWR, 0o600).unwrap();
        let set = |name: &str, value: &[u8]| {
            guest.call(SETXATTR, node, body().u32(value.len() as u32).u32(0).name(name).bytes(value)).map(drop)
        };
        let get = |name: &str, size: u32| guest.call(GETXATTR, node, body().u32(size).u32(0).name(name));
        assert_eq!(set("user.mime", b"text"), Ok(()));
        assert_eq!(get("user.mime", 100).unwrap(), b"text");
        assert_eq!(get("user.mime", 0).map(|reply| u32_at(&reply, 0)), Ok(4));
        assert_eq!(get("user.mime", 3), Err(libc::ERANGE));
        assert_eq!(get("user.none", 3), Err(libc::ENODATA));
        let list = guest.call(LISTXATTR, node, body().u32(100).u32(0)).unwrap();
        assert_eq!(list, b"user.mime\0", "the record of the owner is there, too");
        for name in ["user.bulkhead.owner", "security.capability", "trusted.x", "system.posix_acl_access"] {
            assert_eq!((set(name, b"x"), get(name, 100)), (Err(libc::EOPNOTSUPP), Err(libc::EOPNOTSUPP)), "{name}");
        }
    });
}

#[test]
fn a_file_that_is_opened_past_the_cache_takes_several_writes_at_a_time() {
    let guest = Guest::new();
    let root = guest.node("");
    let flags = |open: &[u8]| u32_at(open, 8);
    for (asked, expected) in [(0, 0), (libc::O_DIRECT, reply::DIRECT_IO | reply::PARALLEL_WRITES)] {
        let name = format!("file{asked}");
        let create = body().u32((libc::O_RDWR | asked).cast_unsigned()).u32(0o100_644).u32(0).u32(0).name(&name);
        let created = guest.call(CREATE, root, create).unwrap();
        assert_eq!(flags(&created[128..]), expected);
        let open = body().u32((libc::O_RDWR | asked).cast_unsigned()).u32(0);
        let opened = guest.call(OPEN, u64_at(&created, 0), open).unwrap();
        assert_eq!(flags(&opened) & !reply::KEEP_CACHE, expected);
    }
}

#[test]
fn a_write_is_as_synchronous_as_the_program_asked_for() {
    let flags = |flags: i32| write_flags(flags.cast_unsigned());
    assert_eq!(flags(libc::O_RDWR | libc::O_NONBLOCK | libc::O_DIRECT), ReadWriteFlags::empty());
    assert_eq!(flags(libc::O_APPEND), ReadWriteFlags::APPEND);
    assert_eq!(flags(libc::O_DSYNC), ReadWriteFlags::DSYNC);
    assert_eq!(flags(libc::O_SYNC), ReadWriteFlags::DSYNC | ReadWriteFlags::SYNC);
    assert_eq!(flags(-1), ReadWriteFlags::APPEND | ReadWriteFlags::DSYNC | ReadWriteFlags::SYNC, "nothing else passes");
}
