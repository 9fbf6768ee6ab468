//! Successors that have what their predecessors left, and get unanswered requests once more.

use std::{fs, os::unix::fs::MetadataExt};

use super::*;

const SHARE: [(&str, bool); 1] = [("", false)];
const APPEND: i32 = libc::O_WRONLY | libc::O_APPEND;

#[test]
fn nodes_and_open_files_go_on_and_never_lead_to_another_file() {
    let mut guest = Guest::new();
    fs::create_dir_all(guest.path("dir/inner")).unwrap();
    for name in ["dir/inner/file", "moved", "replaced", "gone"] {
        fs::write(guest.path(name), name).unwrap();
    }
    let nodes = ["dir", "dir/inner", "dir/inner/file", "moved", "replaced", "gone"].map(|path| guest.node(path));
    let before = nodes.map(|node| guest.attributes(node).unwrap());
    let [handle, lost] = [nodes[2], nodes[5]].map(|node| guest.open(node, libc::O_RDWR).unwrap());
    let (new, own, _) = guest.create(nodes[1], "new", libc::O_RDWR, 0o400).unwrap();
    fs::remove_file(guest.path("gone")).unwrap();
    fs::rename(guest.path("moved"), guest.path("elsewhere")).unwrap();
    fs::write(guest.path("other"), "other").unwrap();
    fs::rename(guest.path("other"), guest.path("replaced")).unwrap();
    guest.replace(&SHARE);

    for at in 0..3 {
        let now = guest.attributes(nodes[at]).unwrap();
        assert_eq!((now.number, now.mode), (before[at].number, before[at].mode));
    }
    for node in &nodes[3..] {
        assert_eq!(guest.attributes(*node), Err(libc::ESTALE), "not at its name");
    }
    assert_eq!(guest.read(nodes[2], handle, 4, 100).unwrap(), b"inner/file");
    assert_eq!(guest.write(nodes[2], handle, 0, b"DIR"), Ok(3));
    assert_eq!(guest.write(new, own, 0, b"x"), Ok(1), "open for writing, of a mode without");
    assert_eq!(guest.read(nodes[5], lost, 0, 1), Err(libc::ESTALE));
    assert_eq!(fs::read(guest.path("dir/inner/file")).unwrap(), b"DIR/inner/file");
    // The same number for the same file, and a new one for another.
    assert_eq!(guest.node("dir/inner/file"), nodes[2]);
    assert_eq!(guest.node("elsewhere"), nodes[3]);
    assert!(!nodes.contains(&guest.node("replaced")));
    // A handle of one node is none of another, and one that was closed is gone.
    assert_eq!(guest.read(nodes[0], handle, 0, 1), Err(libc::EBADF));
    guest.call(RELEASE, nodes[2], body().u64(handle).u64(0).u64(0)).unwrap();
    guest.replace(&SHARE);
    assert_eq!(guest.read(nodes[2], handle, 0, 1), Err(libc::EBADF));
}

#[test]
fn the_list_of_shares_may_change_under_a_running_guest() {
    let mut guest = Guest::with(&[("home/me", false), ("old", false)]);
    for name in ["home/me/file", "old/file"] {
        fs::write(guest.path(name), name).unwrap();
    }
    fs::create_dir_all(guest.path("new")).unwrap();
    fs::write(guest.path("new/other"), "other").unwrap();
    let [own, file, old] = ["home/me", "home/me/file", "old/file"].map(|path| guest.node(path));
    let handle = guest.open(file, libc::O_RDWR).unwrap();
    let lost = guest.open(old, libc::O_RDWR).unwrap();
    guest.replace(&[("home", false), ("home/me", false), ("new", true)]);
    assert_eq!((guest.node("home/me"), guest.node("home/me/file")), (own, file));
    assert_eq!(guest.write(file, handle, 0, b"HOME"), Ok(4));
    assert_eq!(fs::read(guest.path("home/me/file")).unwrap(), b"HOME/me/file");
    let other = guest.node("new/other");
    assert!(guest.open(other, libc::O_RDONLY).is_ok());
    assert_eq!(guest.open(other, libc::O_RDWR), Err(libc::EROFS));
    assert_eq!(guest.attributes(old), Err(libc::ESTALE));
    assert_eq!(guest.write(old, lost, 0, b"x"), Err(libc::ESTALE));
    assert_eq!(fs::read(guest.path("old/file")).unwrap(), b"old/file");
    // It is the same file again when it is shared again.
    guest.replace(&[("home/me", false), ("old", false)]);
    assert_eq!(guest.attributes(guest.node("old/file")).map(|file| file.size).unwrap(), 8);
}

#[test]
fn a_list_goes_on_where_it_was() {
    let mut guest = Guest::new();
    for at in 0..300 {
        fs::write(guest.path(&format!("file-{at:03}")), b"").unwrap();
    }
    let root = guest.node("");
    let handle = u64_at(&guest.call(OPENDIR, root, body().u32(0).u32(0)).unwrap(), 0);
    let (mut names, mut offset) = (Vec::new(), 0);
    loop {
        let whole = body().u64(handle).u64(offset).u32(1024).u32(0).u64(0).u32(0).u32(0);
        let reply = guest.call_with(READDIR, root, whole, 16 + 1024).unwrap();
        if reply.is_empty() {
            break;
        }
        let mut rest = &reply[..];
        while !rest.is_empty() {
            let len = u32_at(rest, 16) as usize;
            offset = u64_at(rest, 8);
            names.push(rest[24..24 + len].to_vec());
            rest = &rest[(24 + len).next_multiple_of(8)..];
        }
        guest.replace(&SHARE);
    }
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 302);
}

#[test]
fn nodes_that_the_guest_returns_make_room_in_every_process() {
    let mut guest = Guest::new();
    let root = guest.node("");
    for round in 0..4 {
        for at in 0..50 {
            let (node, handle, _) = guest.create(root, format!("{round}-{at}"), libc::O_RDWR, 0o644).unwrap();
            guest.call(RELEASE, node, body().u64(handle).u64(0).u64(0)).unwrap();
            guest.call(FORGET, node, body().u64(1)).unwrap();
        }
        guest.replace(&SHARE);
    }
    let (nodes, names, handles) = guest.state.in_use();
    // Those on the way to the share, and one at a time.
    assert!(nodes < 20 && names < 20 && handles == 0, "{nodes} {names} {handles}");
}

#[test]
fn another_list_of_shares_takes_away_what_is_not_in_it_and_nothing_else() {
    let mut guest = Guest::with(&[("a", false), ("b", false), ("c", false)]);
    for name in ["a/file", "a/sub/file", "b/file", "c/file"] {
        fs::create_dir_all(guest.path(name).parent().unwrap()).unwrap();
        fs::write(guest.path(name), name).unwrap();
    }
    let [a, below, b, c] = ["a/file", "a/sub/file", "b/file", "c/file"].map(|path| guest.node(path));
    let [in_a, in_b, in_c] = [a, b, c].map(|node| guest.open(node, libc::O_RDWR).unwrap());
    // Without b, with c for reading only, with a part of a for reading only, and with d.
    fs::create_dir(guest.path("d")).unwrap();
    guest.replace(&[("d", false), ("a", false), ("a/sub", true), ("c", true)]);
    assert_eq!(guest.read(a, in_a, 0, 10).unwrap(), b"a/file");
    assert_eq!(guest.write(a, in_a, 0, b"A"), Ok(1));
    assert_eq!(guest.attributes(b), Err(libc::ESTALE));
    assert_eq!(guest.read(b, in_b, 0, 10), Err(libc::ESTALE));
    assert_eq!(guest.write(c, in_c, 0, b"C"), Err(libc::EROFS));
    assert_eq!(guest.chmod(c, 0o600), Err(libc::EROFS));
    assert_eq!(guest.attributes(below), Err(libc::ESTALE), "the part of a is another share now");
    assert_eq!(guest.find(&guest.path("b")), Err(libc::ENOENT));
    assert!(guest.create(guest.node("d"), "new", libc::O_RDWR, 0o644).is_ok());
    // A directory that was on the way to shares is one now.
    let root = guest.node("");
    guest.replace(&SHARE);
    assert_eq!(guest.attributes(root).unwrap().mode, guest.attributes(guest.node("")).unwrap().mode);
    assert!(guest.mkdir(root, "new", 0o755).is_ok());
}

#[test]
fn a_request_that_comes_again_makes_one_thing() {
    let mut guest = Guest::new();
    let root = guest.node("");
    fs::write(guest.path("file"), b"x").unwrap();
    let file = guest.node("file");
    guest.mkdir(root, "dir", 0o750).unwrap();
    guest.replace(&SHARE);
    let (dir, attributes) = entry(&guest.again().unwrap());
    assert_eq!((attributes.mode, guest.attributes(dir).is_ok()), (libc::S_IFDIR | 0o750, true));

    guest.create(root, "new", libc::O_RDWR | libc::O_EXCL, 0o640).unwrap();
    guest.replace(&SHARE);
    let reply = guest.again().unwrap();
    assert_eq!(guest.write(entry(&reply).0, u64_at(&reply, 128), 0, b"y"), Ok(1));
    guest.mknod(root, "device", libc::S_IFCHR | 0o600, 0x103).unwrap();
    guest.replace(&SHARE);
    assert_eq!(entry(&guest.again().unwrap()).1.device, 0x103);
    guest.call(SYMLINK, root, body().name("link").name("target")).unwrap();
    guest.replace(&SHARE);
    guest.again().unwrap();
    guest.call(LINK, root, body().u64(file).name("hard")).unwrap();
    guest.replace(&SHARE);
    assert_eq!(entry(&guest.again().unwrap()).1.links, 2);

    // A directory of somebody else stays, and the error too.
    fs::create_dir(guest.path("theirs")).unwrap();
    fs::write(guest.path("theirs/contents"), b"").unwrap();
    assert_eq!(guest.mkdir(root, "theirs", 0o755), Err(libc::EEXIST));
    guest.replace(&SHARE);
    assert_eq!(guest.again(), Err(libc::EEXIST));
}

#[test]
fn a_request_that_comes_again_moves_and_removes_one_thing() {
    let mut guest = Guest::new();
    let root = guest.node("");
    for name in ["a", "b", "c"] {
        fs::write(guest.path(name), name).unwrap();
    }
    fs::create_dir(guest.path("dir")).unwrap();
    let (a, dir) = (guest.node("a"), guest.node("dir"));
    guest.rename((root, "a"), (dir, "a"), 0).unwrap();
    guest.replace(&SHARE);
    assert!(guest.again().is_ok() && guest.attributes(a).is_ok());
    assert_eq!(guest.rename((root, "none"), (dir, "none"), 0), Err(libc::ENOENT));
    guest.rename((root, "b"), (root, "c"), libc::RENAME_EXCHANGE).unwrap();
    guest.replace(&SHARE);
    guest.again().unwrap();
    assert_eq!(
        (fs::read(guest.path("b")).unwrap(), fs::read(guest.path("c")).unwrap()),
        (b"c".to_vec(), b"b".to_vec())
    );
    guest.remove(UNLINK, root, "b").unwrap();
    guest.replace(&SHARE);
    assert!(guest.again().is_ok());
    assert_eq!(guest.remove(UNLINK, root, "b"), Err(libc::ENOENT));
    guest.remove(UNLINK, dir, "a").unwrap();
    guest.remove(RMDIR, root, "dir").unwrap();
    guest.replace(&SHARE);
    assert!(guest.again().is_ok());
    // A node is not returned twice.
    let c = guest.node("c");
    guest.node("c");
    guest.call(FORGET, c, body().u64(1)).unwrap();
    guest.replace(&SHARE);
    guest.again().unwrap();
    assert!(guest.attributes(c).is_ok());
}

#[test]
fn an_append_that_comes_again_is_there_once_however_far_it_came() {
    let mut guest = Guest::new();
    fs::write(guest.path("log"), b"start,").unwrap();
    let log = guest.node("log");
    let handle = guest.open(log, APPEND).unwrap();
    for kept in [0, 3, 7] {
        let size = fs::metadata(guest.path("log")).unwrap().size();
        assert_eq!(guest.write_with(log, handle, 0, b"1234567", APPEND, 0), Ok(7));
        fs::File::options().write(true).open(guest.path("log")).unwrap().set_len(size + kept).unwrap();
        guest.replace(&SHARE);
        assert_eq!(u32_at(&guest.again().unwrap(), 0), 7);
    }
    assert_eq!(fs::read(guest.path("log")).unwrap(), b"start,123456712345671234567");
    // Somebody else wrote in between.
    guest.write_with(log, handle, 0, b"mine", APPEND, 0).unwrap();
    fs::write(guest.path("log"), b"start,123456712345671234567theirs").unwrap();
    guest.replace(&SHARE);
    guest.again().unwrap();
    assert!(fs::read(guest.path("log")).unwrap().ends_with(b"theirsmine"));
}
