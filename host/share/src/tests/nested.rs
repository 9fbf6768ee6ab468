//! A read-only share inside of a writable one, in the face of names that change.

use std::fs;

use super::*;

const SHARES: [(&str, bool); 2] = [("home", false), ("home/a/fixed", true)];

fn nested() -> Guest {
    let guest = Guest::with(&SHARES);
    fs::create_dir(guest.path("home/a/fixed/sub")).unwrap();
    for name in ["home/a/fixed/file", "home/a/fixed/sub/file", "home/a/other"] {
        fs::write(guest.path(name), name).unwrap();
    }
    guest
}

/// Every way to change something in the read-only share whose root is this node.
#[track_caller]
fn assert_fixed(guest: &Guest, fixed: u64) {
    let home = guest.node("home");
    let (file, sub) = (guest.lookup(fixed, "file").unwrap().0, guest.lookup(fixed, "sub").unwrap().0);
    for directory in [fixed, sub] {
        assert_eq!(guest.create(directory, "new", libc::O_RDWR, 0o644).map(drop), Err(libc::EROFS));
        assert_eq!(guest.mkdir(directory, "new", 0o755).map(drop), Err(libc::EROFS));
        assert_eq!(guest.remove(UNLINK, directory, "file"), Err(libc::EROFS));
        assert_eq!(guest.rename((directory, "file"), (home, "file"), 0), Err(libc::EROFS));
        assert_eq!(guest.chmod(directory, 0o777).map(drop), Err(libc::EROFS));
    }
    assert_eq!(guest.rename((fixed, "sub"), (home, "sub"), libc::RENAME_EXCHANGE), Err(libc::EROFS));
    assert_eq!(guest.open(file, libc::O_RDWR), Err(libc::EROFS));
    assert_eq!(guest.open(file, libc::O_RDONLY | libc::O_TRUNC), Err(libc::EROFS));
    assert_eq!(guest.set(file, 1 << 3, 0, 0, 0, (0, 0)).map(drop), Err(libc::EROFS));
    assert_eq!(guest.call(LINK, home, body().u64(file).name("hard")).map(drop), Err(libc::EROFS));
    let handle = guest.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(guest.write(file, handle, 0, b"x"), Err(libc::EBADF));
}

#[test]
fn the_guest_moves_nothing_that_is_above_a_share() {
    let guest = nested();
    let (home, a) = (guest.node("home"), guest.node("home/a"));
    guest.mkdir(home, "mine", 0o755).unwrap();
    for flags in [0, libc::RENAME_EXCHANGE] {
        assert_eq!(guest.rename((home, "a"), (home, "mine"), flags), Err(libc::EBUSY));
        assert_eq!(guest.rename((home, "mine"), (home, "a"), flags), Err(libc::EBUSY));
        assert_eq!(guest.rename((a, "fixed"), (home, "mine"), flags), Err(libc::EBUSY));
        assert_eq!(guest.rename((home, "mine"), (a, "fixed"), flags), Err(libc::EBUSY));
    }
    assert_eq!(guest.remove(RMDIR, a, "fixed"), Err(libc::EBUSY));
    guest.rename((a, "other"), (home, "other"), 0).unwrap();
    assert_fixed(&guest, guest.node("home/a/fixed"));
}

#[test]
fn what_is_read_only_stays_so_wherever_the_host_moves_it() {
    let mut guest = nested();
    let (home, known) = (guest.node("home"), guest.node("home/a/fixed/file"));
    let handle = guest.open(known, libc::O_RDONLY).unwrap();
    fs::rename(guest.path("home/a"), guest.path("home/b")).unwrap();
    assert_fixed(&guest, guest.node("home/b/fixed"));
    // By a list, and after a rename that the guest may make.
    guest.rename((home, "b"), (home, "c"), 0).unwrap();
    let listed = guest.list(guest.node("home/c"), true, 4096).unwrap();
    assert_fixed(&guest, listed.iter().find(|entry| entry.name == b"fixed").unwrap().node);
    fs::rename(guest.path("home/c/fixed"), guest.path("home/direct")).unwrap();
    assert_fixed(&guest, guest.node("home/direct"));
    assert_eq!(guest.read(known, handle, 0, 4).unwrap(), b"home");
    assert!(guest.attributes(known).is_ok());
    // A successor does not find the share at its path any more: what was in it is gone, or as it was before.
    let moved = guest.node("home/direct");
    guest.replace(&SHARES);
    for node in [known, moved] {
        assert!(guest.attributes(node).is_err() && guest.mkdir(node, "new", 0o755).is_err());
    }
}

#[test]
fn a_directory_that_becomes_a_read_only_share_is_so_for_who_has_it_open() {
    let mut guest = nested();
    guest.restart(&[("home", false)], 9);
    let (fixed, file) = (guest.node("home/a/fixed"), guest.node("home/a/fixed/file"));
    let handle = guest.open(file, libc::O_RDWR).unwrap();
    assert_eq!(guest.write(file, handle, 0, b"x"), Ok(1));
    guest.replace(&SHARES);
    assert_eq!(guest.write(file, handle, 0, b"x"), Err(libc::ESTALE));
    assert_eq!(guest.mkdir(fixed, "new", 0o755).map(drop), Err(libc::ESTALE));
    assert_fixed(&guest, guest.node("home/a/fixed"));
}
