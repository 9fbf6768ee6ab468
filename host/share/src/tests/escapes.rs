//! Attempts to get out of a share: by links, by names, by directories that move, by what is at a place at another time.

use std::{
    fs,
    os::unix::fs::symlink,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::*;

/// A guest whose share lies beside a secret.
fn beside_a_secret() -> Guest {
    let guest = Guest::with(&[("share", false)]);
    fs::create_dir(guest.path("outside")).unwrap();
    fs::write(guest.path("outside/secret"), b"secret").unwrap();
    guest
}

#[test]
fn links_out_of_the_share_lead_nowhere() {
    unprivileged(|| {
        let guest = beside_a_secret();
        let share = guest.node("share");
        for (name, target) in [
            ("absolute", guest.path("outside")),
            ("relative", "../outside".into()),
            ("process", "/proc/self/root".into()),
            ("descriptor", "/proc/self/fd/0".into()),
        ] {
            symlink(target, guest.path("share").join(name)).unwrap();
            let (node, attributes) = guest.lookup(share, name).unwrap();
            assert_eq!(attributes.mode & libc::S_IFMT, libc::S_IFLNK);
            assert_eq!(guest.lookup(node, "secret"), Err(libc::ENOTDIR));
            assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::EOPNOTSUPP));
            assert_eq!(guest.call(OPENDIR, node, body().u32(0).u32(0)), Err(libc::ENOTDIR));
            assert_eq!(guest.chmod(node, 0o777), guest.attributes(node));
            let created = guest.create(share, name, libc::O_RDWR, 0o600);
            assert_eq!(created, Err(libc::EOPNOTSUPP), "{name}");
        }
        assert_eq!(fs::read_dir(guest.path("outside")).unwrap().count(), 1);
    });
}

#[test]
fn names_are_names_and_not_paths() {
    unprivileged(|| {
        let guest = beside_a_secret();
        let share = guest.node("share");
        guest.create(share, "file", libc::O_RDWR, 0o600).unwrap();
        guest.mkdir(share, "d", 0o700).unwrap();
        for name in ["", ".", "..", "../outside", "/", "/etc", "d/x", "d/../../outside/secret", "d/"] {
            let errors = [
                guest.lookup(share, name).map(drop),
                guest.create(share, name, libc::O_RDWR, 0o600).map(drop),
                guest.mkdir(share, name, 0o700).map(drop),
                guest.mknod(share, name, libc::S_IFREG | 0o600, 0).map(drop),
                guest.call(SYMLINK, share, body().name(name).name("x")).map(drop),
                guest.remove(UNLINK, share, name),
                guest.remove(RMDIR, share, name),
                guest.rename((share, "file"), (share, name), 0),
                guest.rename((share, name), (share, "new"), 0),
                guest.call(LINK, share, body().u64(guest.node("share/file")).name(name)).map(drop),
            ];
            assert_eq!(errors, [Err(libc::EINVAL); 10], "{name:?}");
        }
    });
}

#[test]
fn a_directory_that_the_host_moves_out_is_lost_and_one_that_stays_is_kept() {
    unprivileged(|| {
        let guest = beside_a_secret();
        for name in ["leaves", "stays"] {
            fs::create_dir(guest.path("share").join(name)).unwrap();
            fs::write(guest.path("share").join(name).join("file"), b"x").unwrap();
        }
        let (leaves, stays) = (guest.node("share/leaves"), guest.node("share/stays"));
        let file = guest.node("share/leaves/file");
        // A program works in it.
        guest.node("share/stays/file");
        assert!(guest.open(file, libc::O_RDONLY).is_ok());
        fs::rename(guest.path("share/leaves"), guest.path("outside/leaves")).unwrap();
        fs::rename(guest.path("share/stays"), guest.path("share/renamed")).unwrap();
        // Landlock refuses at once, and this server when it walks the way again.
        assert_ne!(guest.open(file, libc::O_RDONLY).map(drop), Ok(()));
        let deadline = Instant::now() + Duration::from_secs(10);
        while guest.attributes(leaves).is_ok() {
            assert!(Instant::now() < deadline, "a directory outside is still served");
            thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(guest.lookup(leaves, "file"), Err(libc::ESTALE));
        assert_eq!(guest.create(leaves, "new", libc::O_RDWR, 0o600), Err(libc::ESTALE));
        assert_eq!(guest.lookup(stays, "file").map(|(_, attributes)| attributes.size), Ok(1));
        assert_eq!(guest.lookup(guest.node("share"), "renamed").unwrap().0, stays);
    });
}

#[test]
fn a_race_of_directories_and_links_never_shows_what_is_outside() {
    unprivileged(|| {
        let guest = beside_a_secret();
        let inside = guest.path("share/inside");
        fs::create_dir_all(inside.join("deep")).unwrap();
        fs::write(inside.join("deep/secret"), b"public").unwrap();
        symlink(guest.path("outside"), guest.path("share/link")).unwrap();
        let ended = Arc::new(AtomicBool::new(false));
        let (flag, share) = (Arc::clone(&ended), guest.path("share"));
        // `inside` is the directory and the link by turns, as a container may arrange with RENAME_EXCHANGE.
        let racing = thread::spawn(move || {
            while !flag.load(Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                let (one, other) = (share.join("inside"), share.join("link"));
                rustix::fs::renameat_with(rustix::fs::CWD, one, rustix::fs::CWD, other, flags).unwrap();
            }
        });
        let share = guest.node("share");
        let (mut served, deadline) = (0, Instant::now() + Duration::from_secs(2));
        while Instant::now() < deadline {
            for name in ["inside", "link"] {
                let Ok((node, _)) = guest.lookup(share, name) else { continue };
                assert_eq!(guest.lookup(node, "secret").map(drop).ok(), None, "a file outside was found");
                let Ok((deep, _)) = guest.lookup(node, "deep") else { continue };
                let Ok((file, attributes)) = guest.lookup(deep, "secret") else { continue };
                assert_eq!(attributes.size, 6);
                let Ok(handle) = guest.open(file, libc::O_RDONLY) else { continue };
                assert_eq!(guest.read(file, handle, 0, 10).unwrap(), b"public");
                guest.call(RELEASE, file, body().u64(handle)).unwrap();
                served += 1;
            }
        }
        ended.store(true, Ordering::Relaxed);
        racing.join().unwrap();
        assert!(served > 0, "the race was never won by the guest");
    });
}

#[test]
fn a_directory_outside_is_not_found_by_a_link_at_its_old_place() {
    unprivileged(|| {
        let guest = beside_a_secret();
        for (name, link) in [("one", guest.path("outside/one")), ("two", "../outside/two".into())] {
            fs::create_dir(guest.path("share").join(name)).unwrap();
            let node = guest.lookup(guest.node("share"), name).unwrap().0;
            // It is the very directory that the guest knows, and no longer in the share.
            fs::rename(guest.path("share").join(name), guest.path("outside").join(name)).unwrap();
            fs::write(guest.path("outside").join(name).join("new"), b"secret").unwrap();
            symlink(link, guest.path("share").join(name)).unwrap();
            assert_eq!(guest.attributes(node), Err(libc::ESTALE));
            assert_eq!(guest.lookup(node, "new"), Err(libc::ESTALE));
            assert_eq!(guest.call(OPENDIR, node, body().u64(0)), Err(libc::ESTALE));
        }
    });
}

#[test]
fn another_directory_at_a_nodes_place_is_not_taken_for_it() {
    unprivileged(|| {
        let guest = beside_a_secret();
        fs::create_dir(guest.path("share/d")).unwrap();
        let node = guest.node("share/d");
        fs::rename(guest.path("share/d"), guest.path("share/kept")).unwrap();
        fs::rename(guest.path("outside"), guest.path("share/d")).unwrap();
        assert_eq!(guest.lookup(node, "secret"), Err(libc::ESTALE));
        assert_eq!(guest.create(node, "new", libc::O_RDWR, 0o600), Err(libc::ESTALE));
        assert_eq!(guest.lookup(guest.node("share"), "kept").unwrap().0, node);
        assert_eq!(guest.lookup(node, "secret"), Err(libc::ENOENT));
    });
}

#[test]
fn another_file_at_a_nodes_place_is_not_taken_for_it() {
    unprivileged(|| {
        let guest = beside_a_secret();
        fs::write(guest.path("share/file"), b"mine").unwrap();
        let node = guest.node("share/file");
        fs::rename(guest.path("share/file"), guest.path("share/kept")).unwrap();
        // A hard link to a file outside, or a link at its place.
        fs::hard_link(guest.path("outside/secret"), guest.path("share/file")).unwrap();
        assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::ESTALE));
        assert_eq!(guest.chmod(node, 0o777), Err(libc::ESTALE));
        assert_eq!(guest.set(node, 1 << 3, 0, 0, 0, (0, 0)), Err(libc::ESTALE));
        fs::remove_file(guest.path("share/file")).unwrap();
        symlink(guest.path("outside/secret"), guest.path("share/file")).unwrap();
        assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::ESTALE));
        assert_eq!(guest.chown(node, 0, 0), Err(libc::ESTALE));
        assert_eq!(fs::read(guest.path("outside/secret")).unwrap(), b"secret");
        // Found again by its new name.
        assert_eq!(guest.lookup(guest.node("share"), "kept").unwrap().0, node);
        assert!(guest.open(node, libc::O_RDONLY).is_ok());
    });
}

#[test]
fn handles_belong_to_their_node() {
    unprivileged(|| {
        let guest = Guest::with(&[("rw", false), ("ro", true)]);
        fs::write(guest.path("ro/file"), b"x").unwrap();
        let (mine, handle, _) = guest.create(guest.node("rw"), "mine", libc::O_RDWR, 0o600).unwrap();
        let theirs = guest.node("ro/file");
        assert_eq!(guest.write(theirs, handle, 0, b"y"), Err(libc::EBADF));
        assert_eq!(guest.read(mine, handle + 1, 0, 1), Err(libc::EBADF));
        // A handle that is not the node's does not make its file the node's.
        assert_eq!(guest.set(theirs, 1 << 3 | 1 << 6, handle, 9, 0, (0, 0)), Err(libc::EROFS));
        let listing = u64_at(&guest.call(OPENDIR, guest.node("rw"), body().u64(0)).unwrap(), 0);
        assert_eq!(guest.read(mine, listing, 0, 1), Err(libc::EBADF));
    });
}
