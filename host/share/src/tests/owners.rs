//! Owners, modes and devices of the guest that the host's files cannot have.

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
};

use super::*;

/// The record's name on the host.
const RECORD: &str = "user.bulkhead.owner";

fn has_record(path: &Path) -> bool {
    rustix::fs::lgetxattr(path, RECORD, &mut [0; 64]).is_ok()
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn files_of_other_users_are_theirs_in_the_guest_and_the_users_on_the_host() {
    unprivileged(|| {
        let guest = Guest { caller: (0, 0), ..Guest::new() };
        let root = guest.node("");
        let (file, _, attributes) = guest.create(root, "file", libc::O_RDWR, 0o644).unwrap();
        assert_eq!((attributes.uid, attributes.gid, attributes.mode), (0, 0, libc::S_IFREG | 0o644));
        let (directory, attributes) = guest.mkdir(root, "directory", 0o755).unwrap();
        assert_eq!((attributes.uid, attributes.gid, attributes.mode), (0, 0, libc::S_IFDIR | 0o755));
        for name in ["file", "directory"] {
            let host = fs::metadata(guest.path(name)).unwrap();
            assert_eq!((host.uid(), host.gid()), own());
            assert!(has_record(&guest.path(name)));
        }
        // The record stays with the file, and goes when it says nothing more.
        guest.rename((root, "file"), (directory, "moved"), 0).unwrap();
        assert_eq!(guest.lookup(directory, "moved").unwrap().1.uid, 0);
        guest.chown(file, own().0, own().1).unwrap();
        assert!(!has_record(&guest.path("directory/moved")));
        assert_eq!(guest.attributes(file).unwrap().uid, own().0);
    });
}

#[test]
fn a_users_own_files_have_no_record() {
    unprivileged(|| {
        let guest = Guest::new();
        let root = guest.node("");
        for (name, mode) in [("a", 0o644), ("b", 0o600), ("c", 0o444), ("d", 0o777)] {
            let (_, _, attributes) = guest.create(root, name, libc::O_RDWR, mode).unwrap();
            assert_eq!((attributes.mode & 0o7777, has_record(&guest.path(name))), (mode, false));
            assert_eq!(self::mode(&guest.path(name)), mode);
        }
    });
}

#[test]
fn chown_holds_for_the_guest_in_this_process_and_the_next() {
    unprivileged(|| {
        let mut guest = Guest::new();
        fs::write(guest.path("file"), b"").unwrap();
        let node = guest.node("file");
        let changed = guest.chown(node, 999, 998).unwrap();
        assert_eq!((changed.uid, changed.gid), (999, 998));
        let one = guest.set(node, 1 << 1, 0, 0, 0, (5, 0)).unwrap();
        assert_eq!((one.uid, one.gid), (5, 998));
        guest.restart(&[("", false)], 2);
        let attributes = guest.find(&guest.path("file")).unwrap().1;
        assert_eq!((attributes.uid, attributes.gid), (5, 998));
        assert_eq!(fs::metadata(guest.path("file")).unwrap().uid(), own().0);
    });
}

#[test]
fn a_set_user_id_bit_is_the_guests_alone_and_ends_with_a_write_or_a_chown() {
    unprivileged(|| {
        let guest = Guest::new();
        let root = guest.node("");
        let (node, handle, _) = guest.create(root, "tool", libc::O_RDWR, 0o755).unwrap();
        let shown = || guest.attributes(node).unwrap().mode & 0o7777;
        assert_eq!(guest.chmod(node, 0o6755).unwrap().mode & 0o7777, 0o6755);
        assert_eq!(mode(&guest.path("tool")), 0o755);
        guest.write(node, handle, 0, b"x").unwrap();
        assert_eq!(shown(), 0o6755, "root may write and keep it");
        guest.write_with(node, handle, 0, b"x", 0, 1 << 2).unwrap();
        assert_eq!(shown(), 0o755);
        guest.chmod(node, 0o4711).unwrap();
        guest.chown(node, 3, 4).unwrap();
        assert_eq!(shown(), 0o711);
        guest.chmod(node, 0o4711).unwrap();
        guest.set(node, 1 << 3 | 1 << 11, 0, 0, 0, (0, 0)).unwrap();
        assert_eq!(shown(), 0o711);
        guest.chmod(node, 0o4711).unwrap();
        guest.call(OPEN, node, body().u32((libc::O_WRONLY | libc::O_TRUNC).cast_unsigned()).u32(1)).unwrap();
        assert_eq!(shown(), 0o711);
        // One that the host's user made is left.
        fs::set_permissions(guest.path("tool"), fs::Permissions::from_mode(0o4755)).unwrap();
        assert_eq!(guest.chmod(node, 0o4700).unwrap().mode & 0o7777, 0o4700);
        assert_eq!(mode(&guest.path("tool")), 0o4700);
    });
}

#[test]
fn a_chmod_of_the_host_is_seen_beside_a_record() {
    unprivileged(|| {
        let guest = Guest { caller: (0, 0), ..Guest::new() };
        let root = guest.node("");
        let (node, ..) = guest.create(root, "file", libc::O_RDWR, 0o644).unwrap();
        guest.chmod(node, 0o4755).unwrap();
        fs::set_permissions(guest.path("file"), fs::Permissions::from_mode(0o700)).unwrap();
        let attributes = guest.attributes(node).unwrap();
        assert_eq!((attributes.mode & 0o7777, attributes.uid), (0o700, 0));
    });
}

#[test]
fn a_mode_without_access_for_the_owner_is_kept_for_the_guest_and_can_be_undone() {
    unprivileged(|| {
        let guest = Guest { caller: (0, 0), ..Guest::new() };
        let root = guest.node("");
        let (file, ..) = guest.create(root, "file", libc::O_RDWR, 0o000).unwrap();
        let (directory, attributes) = guest.mkdir(root, "directory", 0o000).unwrap();
        assert_eq!(attributes.mode & 0o7777, 0);
        for node in [file, directory] {
            assert_eq!(guest.attributes(node).unwrap().mode & 0o7777, 0);
            assert_eq!(guest.chown(node, 7, 7).unwrap().uid, 7);
            assert_eq!(guest.chmod(node, 0o200).unwrap().mode & 0o7777, 0o200);
            assert_eq!(guest.chmod(node, 0o755).unwrap().mode & 0o7777, 0o755);
        }
        // The root of the guest goes into a directory whatever its mode.
        guest.chmod(directory, 0o000).unwrap();
        assert_eq!(guest.lookup(directory, "none"), Err(libc::ENOENT));
    });
}

#[test]
fn set_group_id_directories_give_their_group() {
    unprivileged(|| {
        let guest = Guest { caller: (1, 1), ..Guest::new() };
        let root = guest.node("");
        let (directory, _) = guest.mkdir(root, "shared", 0o775).unwrap();
        guest.chown(directory, 1, 50).unwrap();
        guest.chmod(directory, 0o2775).unwrap();
        assert_eq!(mode(&guest.path("shared")) & 0o6000, 0);
        let (_, _, file) = guest.create(directory, "file", libc::O_RDWR, 0o644).unwrap();
        let (_, below) = guest.mkdir(directory, "below", 0o755).unwrap();
        assert_eq!((file.uid, file.gid, file.mode & 0o7777), (1, 50, 0o644));
        assert_eq!((below.uid, below.gid, below.mode & 0o7777), (1, 50, 0o2755));
    });
}

#[test]
fn devices_stand_in_empty_files() {
    unprivileged(|| {
        let guest = Guest { caller: (0, 0), ..Guest::new() };
        let root = guest.node("");
        let null = 1 << 8 | 3;
        let (node, attributes) = guest.mknod(root, "null", libc::S_IFCHR | 0o666, null).unwrap();
        assert_eq!((attributes.mode, attributes.device), (libc::S_IFCHR | 0o666, null));
        let host = fs::metadata(guest.path("null")).unwrap();
        assert!(host.is_file() && host.len() == 0);
        assert_eq!(guest.open(node, libc::O_RDWR), Err(libc::EOPNOTSUPP));
        assert_eq!(guest.chmod(node, 0o600).unwrap().mode, libc::S_IFCHR | 0o600);
        assert_eq!(guest.chown(node, 5, 6).unwrap().mode, libc::S_IFCHR | 0o600);
        let listed = guest.list(root, true, 4096).unwrap();
        assert!(listed.iter().any(|entry| entry.name == b"null" && entry.kind == u32::from(libc::DT_CHR)));
        guest.rename((root, "null"), (root, "zero"), 0).unwrap();
        assert_eq!(guest.lookup(root, "zero").unwrap().1.device, null);
        guest.remove(UNLINK, root, "zero").unwrap();
        assert_eq!(guest.mknod(root, "x", libc::S_IFDIR | 0o600, 0), Err(libc::EINVAL));
    });
}

#[test]
fn pipes_and_sockets_have_owners_and_modes_and_those_of_the_host_are_left() {
    unprivileged(|| {
        let guest = Guest { caller: (999, 999), ..Guest::new() };
        let root = guest.node("");
        for (name, kind) in [("pipe", libc::S_IFIFO), ("socket", libc::S_IFSOCK)] {
            let (node, attributes) = guest.mknod(root, name, kind | 0o640, 0).unwrap();
            assert_eq!((attributes.mode, attributes.uid), (kind | 0o640, 999));
            assert_eq!(guest.chmod(node, 0o777).unwrap().mode, kind | 0o777);
            assert_eq!(guest.chown(node, 5, 6).unwrap().uid, 5);
            assert!(fs::metadata(guest.path(name)).unwrap().is_file());
        }
        let kind = rustix::fs::FileType::Fifo;
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, guest.path("real"), kind, mode, 0).unwrap();
        assert!(fs::symlink_metadata(guest.path("real")).unwrap().file_type().is_fifo());
        let (node, attributes) = guest.lookup(root, "real").unwrap();
        assert_eq!((attributes.mode, attributes.uid), (libc::S_IFIFO | 0o600, own().0));
        // It is never opened, where that would wait, and has no record.
        assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::EOPNOTSUPP));
        assert_eq!(guest.chmod(node, 0o777), Err(libc::EPERM));
        assert_eq!(guest.chown(node, 1, 1), Err(libc::EPERM));
        assert_eq!(guest.chmod(node, 0o600).unwrap().mode, libc::S_IFIFO | 0o600);
        guest.remove(UNLINK, root, "real").unwrap();
    });
}

#[test]
fn attributes_of_a_read_only_file_can_be_set_and_its_mode_stays() {
    unprivileged(|| {
        let guest = Guest { caller: (0, 0), ..Guest::new() };
        let root = guest.node("");
        let (node, ..) = guest.create(root, "file", libc::O_RDWR, 0o444).unwrap();
        guest.call(SETXATTR, node, body().u32(1).u32(0).name("user.x").bytes(b"y")).unwrap();
        assert_eq!(guest.call(GETXATTR, node, body().u32(9).u32(0).name("user.x")).unwrap(), b"y");
        assert_eq!((mode(&guest.path("file")), guest.attributes(node).unwrap().mode & 0o7777), (0o444, 0o444));
    });
}

#[test]
fn links_keep_their_target_and_take_any_owner() {
    unprivileged(|| {
        let guest = Guest { caller: (0, 0), ..Guest::new() };
        let root = guest.node("");
        let reply = guest.call(SYMLINK, root, body().name("link").name("/etc/shadow")).unwrap();
        let (node, attributes) = entry(&reply);
        assert_eq!(attributes.mode, libc::S_IFLNK | 0o777);
        assert_eq!(guest.call(READLINK, node, body()).unwrap(), b"/etc/shadow");
        assert_eq!(guest.lookup(root, "link").unwrap().0, node);
        assert!(guest.chown(node, 0, 0).is_ok());
        assert!(guest.set(node, 1 << 4 | 1 << 5, 0, 0, 0, (0, 0)).is_ok());
        assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::EOPNOTSUPP));
        guest.remove(UNLINK, root, "link").unwrap();
    });
}

#[test]
fn a_record_on_a_file_of_somebody_else_does_not_count() {
    // Needs a file of another user: root makes one, and the server has no privileges.
    if rustix::process::geteuid().is_root() {
        let directory = tempfile::tempdir_in("/tmp").unwrap();
        let path = directory.path().join("theirs");
        fs::write(&path, b"").unwrap();
        let mut record = [0; 24];
        record[..2].copy_from_slice(&[1, 1]);
        record[4..8].copy_from_slice(&4_u32.to_le_bytes());
        rustix::fs::setxattr(&path, RECORD, &record, rustix::fs::XattrFlags::empty()).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        unprivileged(move || {
            let guest = Guest { directory, ..Guest::new() };
            let mut guest = guest;
            guest.restart(&[("", false)], 3);
            let node = guest.node("theirs");
            assert_eq!(guest.attributes(node).unwrap().uid, 0);
            assert_eq!(guest.chown(node, 5, 5), Err(libc::EPERM));
            assert_eq!(guest.chmod(node, 0o600), Err(libc::EPERM));
            std::mem::forget(guest.directory);
        });
        fs::remove_dir_all(path.parent().unwrap()).unwrap();
    }
}
