//! Shares: what the guest sees of the host's tree, and what it may change.

use std::{fs, path::Path};

use super::*;

#[test]
fn only_the_way_to_the_shares_is_there() {
    unprivileged(|| {
        let guest = Guest::with(&[("a/share", false)]);
        fs::create_dir(guest.path("a/secret")).unwrap();
        let a = guest.node("a");
        assert_eq!(guest.names(a), ["share"]);
        assert_eq!(guest.lookup(a, "secret"), Err(libc::ENOENT));
        assert_eq!(guest.lookup(fuse::ROOT, "etc"), Err(libc::ENOENT));
        let way = guest.attributes(a).unwrap();
        assert_eq!((way.mode, way.uid, way.gid), (libc::S_IFDIR | 0o555, 0, 0));
        assert_eq!(guest.mkdir(a, "new", 0o755), Err(libc::EROFS));
        assert_eq!(guest.create(a, "new", libc::O_RDWR, 0o755), Err(libc::EROFS));
        assert_eq!(guest.remove(RMDIR, a, "share"), Err(libc::EROFS));
        assert_eq!(guest.chmod(a, 0o777), Err(libc::EROFS));
        assert_eq!(guest.chown(a, 1, 1), Err(libc::EROFS));
    });
}

#[test]
fn nothing_changes_in_a_read_only_share() {
    unprivileged(|| {
        let guest = Guest::with(&[("ro", true), ("rw", false)]);
        fs::write(guest.path("ro/file"), b"data").unwrap();
        let (ro, rw, file) = (guest.node("ro"), guest.node("rw"), guest.node("ro/file"));
        let handle = guest.open(file, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(file, handle, 0, 9).unwrap(), b"data");
        for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
            assert_eq!(guest.open(file, flags), Err(libc::EROFS));
        }
        assert_eq!(guest.write(file, handle, 0, b"x"), Err(libc::EBADF));
        let errors = [
            guest.create(ro, "new", libc::O_RDWR, 0o600).map(drop),
            guest.create(ro, "file", libc::O_RDWR, 0o600).map(drop),
            guest.mkdir(ro, "new", 0o700).map(drop),
            guest.mknod(ro, "new", libc::S_IFREG | 0o600, 0).map(drop),
            guest.call(SYMLINK, ro, body().name("new").name("x")).map(drop),
            guest.call(LINK, ro, body().u64(file).name("new")).map(drop),
            guest.call(LINK, rw, body().u64(file).name("new")).map(drop),
            guest.remove(UNLINK, ro, "file"),
            guest.rename((ro, "file"), (ro, "new"), 0),
            guest.rename((ro, "file"), (rw, "new"), 0),
            guest.rename((rw, "x"), (ro, "new"), 0),
            guest.chmod(file, 0o777).map(drop),
            guest.chown(file, 1, 1).map(drop),
            guest.set(file, 1 << 3, handle, 0, 0, (0, 0)).map(drop),
            guest.set(file, 1 << 5 | 1 << 6, handle, 0, 0, (0, 0)).map(drop),
            guest.call(SETXATTR, file, body().u32(1).u32(0).name("user.x").bytes(b"x")).map(drop),
            guest.call(TMPFILE, ro, body().u32(libc::O_RDWR.cast_unsigned()).u32(0o600).u64(0).name("/")).map(drop),
        ];
        assert_eq!(errors, [Err(libc::EROFS); 17]);
        assert_eq!(fs::read_dir(guest.path("ro")).unwrap().count(), 1);
    });
}

#[test]
fn a_share_inside_of_another_has_its_own_rules() {
    unprivileged(|| {
        let guest = Guest::with(&[("outer", false), ("outer/a/inner", true)]);
        fs::write(guest.path("outer/a/inner/file"), b"x").unwrap();
        let (outer, a, inner) = (guest.node("outer"), guest.node("outer/a"), guest.node("outer/a/inner"));
        assert_eq!(guest.names(a), ["inner"]);
        assert_eq!(guest.names(inner), ["file"]);
        assert_eq!(guest.create(inner, "new", libc::O_RDWR, 0o600), Err(libc::EROFS));
        assert!(guest.create(a, "new", libc::O_RDWR, 0o600).is_ok());
        // The way to it cannot be moved away, nor another thing put there.
        assert_eq!(guest.rename((outer, "a"), (outer, "b"), 0), Err(libc::EBUSY));
        assert_eq!(guest.rename((a, "inner"), (a, "b"), 0), Err(libc::EBUSY));
        assert_eq!(guest.rename((a, "new"), (a, "inner"), 0), Err(libc::EBUSY));
        assert_eq!(guest.remove(RMDIR, a, "inner"), Err(libc::EBUSY));
        assert_eq!(guest.mkdir(a, "inner", 0o700), Err(libc::EEXIST));
        let plus = guest.list(a, true, 4096).unwrap();
        assert!(plus.iter().any(|entry| entry.name == b"inner" && entry.node == inner));
        // In the tree there is one of it only.
        assert_eq!(guest.lookup(a, "inner").unwrap().0, inner);
    });
}

#[test]
fn the_whole_host_is_shared_without_the_files_of_its_kernel() {
    unprivileged(|| {
        let mut guest = Guest::with(&[("", false)]);
        let share = Share { path: "/".into(), read_only: false };
        let (server, failed) = Server::new(&[share], &[], 4096, 9, &State::own().unwrap(), false);
        assert!(failed.is_empty());
        guest.serve_with(server);
        let names = guest.names(fuse::ROOT);
        assert!(names.contains(&"etc".to_owned()) && names.contains(&"tmp".to_owned()));
        let (passwd, attributes) = guest.find(Path::new("/etc/passwd")).unwrap();
        assert_eq!((attributes.uid, attributes.mode & libc::S_IFMT), (0, libc::S_IFREG));
        assert!(guest.open(passwd, libc::O_RDONLY).is_ok());
        for kernel in ["proc", "sys"] {
            assert_eq!(guest.lookup(fuse::ROOT, kernel), Err(libc::EACCES));
        }
        let root = guest.node("");
        assert!(guest.create(root, "file", libc::O_RDWR, 0o600).is_ok());
        assert!(guest.path("file").exists());
    });
}

#[test]
fn a_successor_never_takes_a_node_for_another_file() {
    unprivileged(|| {
        let mut guest = Guest::new();
        fs::write(guest.path("a"), b"a").unwrap();
        fs::write(guest.path("b"), b"b").unwrap();
        let old: Vec<_> = ["", "a", "b"].map(|path| guest.node(path)).to_vec();
        let handle = guest.open(old[1], libc::O_RDWR).unwrap();
        // It serves the connection without a handshake, and looks files up in another order.
        guest.restart(&[("", false)], 2);
        let new: Vec<_> = ["b", "a"].map(|path| guest.node(path)).to_vec();
        assert!(new.iter().all(|node| !old.contains(node)));
        for node in &old {
            assert_eq!(guest.attributes(*node), Err(libc::ESTALE));
            assert_eq!(guest.lookup(*node, "a"), Err(libc::ESTALE));
        }
        guest.open(new[0], libc::O_RDWR).unwrap();
        assert_eq!(guest.read(old[1], handle, 0, 9), Err(libc::EBADF));
        assert_eq!(guest.write(new[1], handle, 0, b"x"), Err(libc::EBADF));
        assert!(guest.attributes(fuse::ROOT).is_ok());
    });
}

#[test]
fn a_new_connection_starts_with_the_root_alone() {
    unprivileged(|| {
        let guest = Guest::new();
        let root = guest.node("");
        let (node, handle, _) = guest.create(root, "file", libc::O_RDWR, 0o600).unwrap();
        let init = |major: u32| guest.call(INIT, 0, body().u32(major).u32(41).u32(0x2_0000).u32(1 << 30).u32(1 << 8));
        assert_eq!(init(6), Err(libc::EPROTO));
        assert!(guest.attributes(node).is_ok());
        let reply = init(7).unwrap();
        // The version, and of the flags those that the guest offered.
        assert_eq!([0, 4, 8, 12, 32].map(|at| u32_at(&reply, at)), [7, 41, 0x2_0000, 1 << 30, 1 << 8]);
        assert_eq!(guest.attributes(node), Err(libc::ESTALE));
        assert_eq!(guest.read(node, handle, 0, 1), Err(libc::EBADF));
        assert_ne!(guest.node("file"), node);
    });
}

#[test]
fn a_node_is_forgotten_when_the_guest_has_returned_it_as_often_as_it_got_it() {
    unprivileged(|| {
        let guest = Guest::new();
        fs::create_dir(guest.path("d")).unwrap();
        fs::write(guest.path("d/f"), b"").unwrap();
        let (directory, file) = (guest.node("d"), guest.node("d/f"));
        assert_eq!(guest.node("d/f"), file);
        let forget = |node: u64, count: u64| guest.call(FORGET, node, body().u64(count)).unwrap();
        forget(file, 1);
        assert!(guest.attributes(file).is_ok());
        // The file is found through its directory, so that one stays.
        forget(directory, 100);
        assert!(guest.attributes(file).is_ok());
        forget(file, 1);
        assert_eq!((guest.attributes(file), guest.attributes(directory)), (Err(libc::ESTALE), Err(libc::ESTALE)));
        forget(fuse::ROOT, u64::MAX);
        forget(12345, 1);
        assert!(guest.attributes(fuse::ROOT).is_ok());
    });
}
