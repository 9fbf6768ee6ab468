//! Races: the host renames what the guest uses, all the time, so that sooner or later each name means another file in
//! the middle of a request.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    sync::atomic::AtomicBool,
};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use support::tree::files;

use super::*;

/// Requests that a guest makes while names change.
const TRIES: usize = 100_000;

/// The files below a directory: what they are, their modes, times and contents.
fn contents(directory: &Path) -> BTreeMap<PathBuf, ((u32, i64), Vec<u8>)> {
    files(directory, |stat| (stat.mode(), stat.mtime_nsec()))
}

/// Exchanges each pair of names, over and over, until the body has made its requests.
fn while_the_host_exchanges(guest: &Guest, pairs: &[(&str, &str)], mut round: impl FnMut() -> usize) {
    let ended = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&ended);
    let pairs: Vec<_> = pairs.iter().map(|(one, other)| (guest.path(one), guest.path(other))).collect();
    let racing = thread::spawn(move || {
        while !flag.load(Ordering::Relaxed) {
            for (one, other) in &pairs {
                renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
                thread::yield_now();
            }
        }
    });
    let mut tries = 0;
    while tries < TRIES && !racing.is_finished() {
        tries += round();
    }
    ended.store(true, Ordering::Relaxed);
    racing.join().unwrap();
}

/// Both outcomes of a race, so that one that nobody won or lost does not count.
#[derive(Default)]
struct Won {
    served: usize,
    refused: usize,
}

impl Won {
    fn note<T>(&mut self, result: Result<T, i32>) -> Option<T> {
        if result.is_ok() {
            self.served += 1;
        } else {
            self.refused += 1;
        }
        result.ok()
    }

    #[track_caller]
    fn judge(&self) {
        assert!(self.served > 100 && self.refused > 100, "{} served, {} refused", self.served, self.refused);
    }
}

fn read_all(guest: &Guest, node: u64) -> Result<Vec<u8>, i32> {
    let handle = guest.open(node, libc::O_RDONLY)?;
    let bytes = guest.read(node, handle, 0, 100);
    guest.call(RELEASE, node, body().u64(handle)).unwrap();
    bytes
}

#[test]
fn a_name_that_is_a_link_by_turns_never_leads_outside() {
    unprivileged(|| {
        let guest = Guest::with(&[("share", false)]);
        for (path, text) in [("outside/deep/secret", "a secret"), ("share/turn/deep/secret", "public")] {
            fs::create_dir_all(guest.path(path).parent().unwrap()).unwrap();
            fs::write(guest.path(path), text).unwrap();
        }
        fs::write(guest.path("share/file"), "public").unwrap();
        symlink(guest.path("outside"), guest.path("share/link")).unwrap();
        symlink("../outside/deep/secret", guest.path("share/file-link")).unwrap();
        let before = contents(&guest.path("outside"));
        let share = guest.node("share");
        let known = [guest.node("share/turn"), guest.node("share/turn/deep"), guest.node("share/file")];
        let mut won = Won::default();
        let pairs = [("share/turn", "share/link"), ("share/file", "share/file-link")];
        while_the_host_exchanges(&guest, &pairs, || {
            // By nodes that the guest had before, and by the names as they are now.
            let turn = won.note(guest.lookup(share, "turn")).map_or(known[0], |found| found.0);
            let deep = won.note(guest.lookup(turn, "deep")).map_or(known[1], |found| found.0);
            if let Some((secret, attributes)) = won.note(guest.lookup(deep, "secret")) {
                assert_eq!(attributes.size, 6, "a file outside was found");
                let read = won.note(read_all(&guest, secret));
                assert!(read.is_none_or(|bytes| bytes == b"public"), "a file outside was read");
            }
            for directory in [turn, deep, known[1]] {
                if won.note(guest.create(directory, "mark", libc::O_RDWR, 0o600)).is_some() {
                    let _ = guest.remove(UNLINK, directory, "mark");
                }
                if won.note(guest.mkdir(directory, "made", 0o700)).is_some() {
                    let _ = guest.rename((directory, "made"), (share, "moved"), 0);
                    let _ = guest.remove(RMDIR, share, "moved");
                }
                let _ = won.note(guest.chmod(directory, 0o755));
            }
            let is_file = |found: &(u64, Attributes)| found.1.mode & libc::S_IFMT == libc::S_IFREG;
            let file = guest.lookup(share, "file").ok().filter(is_file).map_or(known[2], |found| found.0);
            for node in [file, known[2]] {
                let read = won.note(read_all(&guest, node));
                assert!(read.is_none_or(|bytes| bytes == b"public"), "a file outside was read");
                let _ = won.note(guest.open(node, libc::O_RDWR | libc::O_TRUNC).and_then(|handle| {
                    guest.write(node, handle, 0, b"public")?;
                    guest.call(RELEASE, node, body().u64(handle))
                }));
                let _ = won.note(guest.chmod(node, 0o600));
                let _ = won.note(guest.set(node, 1 << 3, 0, 6, 0, (0, 0)));
                if guest.call(LINK, share, body().u64(node).name("hard")).is_ok() {
                    let hard = guest.path("share/hard");
                    assert_eq!(fs::read(&hard).unwrap(), b"public", "a link to another file");
                }
                let _ = guest.remove(UNLINK, share, "hard");
            }
            30
        });
        won.judge();
        assert_eq!(contents(&guest.path("outside")), before);
    });
}

#[test]
fn a_read_only_share_that_the_host_moves_all_the_time_stays_as_it_is() {
    unprivileged(|| {
        let guest = Guest::with(&[("home", false), ("home/a/fixed", true)]);
        for at in ["home/a/fixed/sub", "home/a/plain/sub", "home/b/fixed/sub", "home/b/plain/sub"] {
            fs::create_dir_all(guest.path(at)).unwrap();
            for name in ["file", "sub/file"] {
                fs::write(guest.path(at).parent().unwrap().join(name), "as it was").unwrap();
            }
        }
        let fixed = fs::canonicalize(guest.path("home/a/fixed")).unwrap();
        let inode = fs::metadata(&fixed).unwrap().ino();
        let before: Vec<_> = contents(&fixed).into_values().collect();
        let home = guest.node("home");
        let mut won = Won::default();
        let pairs = [("home/a/fixed", "home/a/plain"), ("home/a", "home/b"), ("home/a/plain", "home/b/plain")];
        while_the_host_exchanges(&guest, &pairs, || {
            for (above, name) in [("a", "fixed"), ("a", "plain"), ("b", "fixed"), ("b", "plain")] {
                let found = guest.lookup(home, above).and_then(|above| guest.lookup(above.0, name));
                let Some((directory, _)) = won.note(found) else { continue };
                let sub = guest.lookup(directory, "sub").map_or(directory, |found| found.0);
                for at in [directory, sub] {
                    if won.note(guest.create(at, "new", libc::O_RDWR, 0o600)).is_some() {
                        let _ = guest.remove(UNLINK, at, "new");
                    }
                    let _ = won.note(guest.chmod(at, 0o700)).map(|_| guest.chmod(at, 0o755));
                    let _ = guest.rename((at, "file"), (home, "taken"), 0).map(|()| {
                        let _ = guest.rename((home, "taken"), (at, "file"), 0);
                    });
                    let Ok((file, _)) = guest.lookup(at, "file") else { continue };
                    for flags in [libc::O_RDWR, libc::O_WRONLY | libc::O_TRUNC, libc::O_RDONLY | libc::O_TRUNC] {
                        let Some(handle) = won.note(guest.open(file, flags)) else { continue };
                        let _ = guest.write(file, handle, 0, b"by a guest");
                        guest.call(RELEASE, file, body().u64(handle)).unwrap();
                    }
                    if guest.call(LINK, home, body().u64(file).name("hard")).is_ok() {
                        let _ = guest.remove(UNLINK, home, "hard");
                    }
                }
            }
            80
        });
        won.judge();
        let places = ["home/a/fixed", "home/a/plain", "home/b/fixed", "home/b/plain"].map(|at| guest.path(at));
        let at = places.iter().find(|at| fs::metadata(at).unwrap().ino() == inode).unwrap();
        assert_eq!(contents(at).into_values().collect::<Vec<_>>(), before);
    });
}

#[test]
fn a_file_of_bulkheads_own_is_not_changed_when_it_takes_the_place_of_another() {
    unprivileged(|| {
        let mut guest = Guest::with(&[("home", false)]);
        fs::create_dir_all(guest.path("home/config/bulkhead")).unwrap();
        fs::write(guest.path("home/config/bulkhead/settings"), "settings").unwrap();
        fs::hard_link(guest.path("home/config/bulkhead/settings"), guest.path("home/copy")).unwrap();
        fs::write(guest.path("home/mine"), "mine").unwrap();
        guest.hidden = vec![guest.path("home/config/bulkhead")];
        guest.replace(&[("home", false)]);
        let before = contents(&guest.path("home/config"));
        let (home, known) = (guest.node("home"), guest.node("home/mine"));
        let mut won = Won::default();
        while_the_host_exchanges(&guest, &[("home/mine", "home/copy")], || {
            for name in ["mine", "copy"] {
                let node = won.note(guest.lookup(home, name)).map_or(known, |found| found.0);
                for flags in [libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC, libc::O_RDONLY | libc::O_TRUNC] {
                    let Some(handle) = won.note(guest.open(node, flags)) else { continue };
                    if flags != libc::O_RDONLY | libc::O_TRUNC {
                        guest.write(node, handle, 0, b"mine").unwrap();
                    }
                    guest.call(RELEASE, node, body().u64(handle)).unwrap();
                }
                let _ = won.note(guest.set(node, 1 << 3, 0, 2, 0, (0, 0)));
                let _ = won.note(guest.create(home, name, libc::O_RDWR | libc::O_TRUNC, 0o600));
            }
            10
        });
        won.judge();
        assert_eq!(contents(&guest.path("home/config")), before);
    });
}

#[test]
fn access_that_one_file_is_given_is_not_another_files_that_takes_its_name() {
    // The server opens a file that its owner may not write by a mode for the time of the open.
    unprivileged(|| {
        let guest = Guest::with(&[("share", false)]);
        for (name, mode) in [("one", 0o400), ("two", 0o600)] {
            fs::write(guest.path("share").join(name), name).unwrap();
            fs::set_permissions(guest.path("share").join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let nodes = ["one", "two"].map(|name| guest.node(&format!("share/{name}")));
        let mut won = Won::default();
        while_the_host_exchanges(&guest, &[("share/one", "share/two")], || {
            let _ = ["one", "two"].map(|name| guest.lookup(guest.node("share"), name));
            for (node, text) in nodes.iter().zip(["one", "two"]) {
                let read = won.note(read_all(&guest, *node));
                assert!(read.is_none_or(|bytes| bytes == text.as_bytes()));
                let _ = won.note(guest.open(*node, libc::O_RDWR).and_then(|handle| {
                    guest.write(*node, handle, 0, text.as_bytes())?;
                    guest.call(RELEASE, *node, body().u64(handle))
                }));
            }
            8
        });
        won.judge();
        let found = ["one", "two"].map(|name| {
            let path = guest.path("share").join(name);
            (fs::read_to_string(&path).unwrap(), fs::metadata(path).unwrap().mode() & 0o777)
        });
        assert!(found.contains(&("one".into(), 0o400)) && found.contains(&("two".into(), 0o600)), "{found:?}");
    });
}
