//! Events of what the host's programs change, and none of what the guest does.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, OpenOptions, Permissions},
    io::Write as _,
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant},
};

use libc::{
    IN_ATTRIB, IN_CLOSE_WRITE, IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_ISDIR, IN_MODIFY, IN_MOVE_SELF, IN_MOVED_FROM,
    IN_MOVED_TO,
};
use proptest::{collection::vec, prelude::*};

use super::{
    device::{Driver, device},
    *,
};
use crate::events::{self, Event};

/// All events that a watcher can ask for.
const ALL: u32 = IN_CREATE
    | IN_DELETE
    | IN_MODIFY
    | IN_ATTRIB
    | IN_CLOSE_WRITE
    | IN_MOVED_FROM
    | IN_MOVED_TO
    | IN_DELETE_SELF
    | IN_MOVE_SELF;

/// Mask and name of an event.
type Seen = (u32, Vec<u8>);

fn seen(mask: u32, name: &str) -> Seen {
    (mask, name.into())
}

impl Guest {
    fn watch(&self, node: u64, mask: u32, sequence: u64) -> Result<(), i32> {
        self.call(fuse::WATCH, node, body().u32(mask).u32(0).u64(sequence)).map(drop)
    }

    /// A guest that watches its share.
    fn watching(mask: u32) -> (Self, u64) {
        let guest = Self::new();
        let node = guest.node("");
        guest.watch(node, mask, 1).unwrap();
        (guest, node)
    }

    /// The events that are ready.
    fn ready(&self) -> Vec<Event> {
        let events = &self.serving.as_ref().unwrap().events;
        std::iter::from_fn(|| events.next()).collect()
    }

    fn seen(&self) -> Vec<Seen> {
        self.ready().into_iter().map(|event| (event.mask, event.name)).collect()
    }
}

#[test]
fn changes_of_the_host_are_reported_with_their_masks_and_names() {
    let (guest, node) = Guest::watching(ALL);
    fs::write(guest.path("file"), b"x").unwrap();
    let written = [seen(IN_CREATE, "file"), seen(IN_MODIFY, "file"), seen(IN_CLOSE_WRITE, "file")];
    assert_eq!(guest.seen(), written);
    fs::set_permissions(guest.path("file"), Permissions::from_mode(0o600)).unwrap();
    assert_eq!(guest.seen(), [seen(IN_ATTRIB, "file")]);
    fs::create_dir(guest.path("directory")).unwrap();
    assert_eq!(guest.seen(), [seen(IN_CREATE | IN_ISDIR, "directory")]);
    fs::rename(guest.path("file"), guest.path("new")).unwrap();
    let moved = guest.ready();
    let kinds: Vec<_> = moved.iter().map(|event| (event.node, event.mask, &event.name[..])).collect();
    assert_eq!(kinds, [(node, IN_MOVED_FROM, &b"file"[..]), (node, IN_MOVED_TO, b"new")]);
    assert!(moved[0].cookie != 0 && moved[0].cookie == moved[1].cookie);
    fs::remove_file(guest.path("new")).unwrap();
    assert_eq!(guest.seen(), [seen(IN_DELETE, "new")]);
}

#[test]
fn a_file_has_events_of_its_own_and_its_watch_ends_with_it() {
    let guest = Guest::new();
    fs::write(guest.path("file"), b"x").unwrap();
    let node = guest.node("file");
    guest.watch(node, ALL, 1).unwrap();
    OpenOptions::new().append(true).open(guest.path("file")).unwrap().write_all(b"y").unwrap();
    assert_eq!(guest.seen(), [seen(IN_MODIFY, ""), seen(IN_CLOSE_WRITE, "")]);
    fs::rename(guest.path("file"), guest.path("new")).unwrap();
    assert_eq!(guest.seen(), [seen(IN_MOVE_SELF, "")]);
    fs::remove_file(guest.path("new")).unwrap();
    assert_eq!(guest.seen(), [seen(IN_ATTRIB, ""), seen(IN_DELETE_SELF, "")]);
    assert!(!guest.serving.as_ref().unwrap().events.any());
}

#[test]
fn only_what_is_watched_is_reported_as_long_as_it_is() {
    let guest = Guest::with(&[("share", false)]);
    fs::create_dir(guest.path("share/inner")).unwrap();
    let (node, events) = (guest.node("share"), &guest.serving.as_ref().unwrap().events);
    fs::write(guest.path("share/a"), b"").unwrap();
    guest.watch(node, IN_CREATE, 5).unwrap();
    fs::write(guest.path("share/b"), b"x").unwrap();
    fs::write(guest.path("share/inner/c"), b"x").unwrap();
    assert_eq!(guest.seen(), [seen(IN_CREATE, "b")]);
    // A request that was overtaken, and one that was not.
    guest.watch(node, 0, 4).unwrap();
    assert!(events.any());
    guest.watch(node, 0, 6).unwrap();
    fs::write(guest.path("share/d"), b"x").unwrap();
    assert!(guest.seen().is_empty() && !events.any());
    // Nodes that the guest returns are not watched any more.
    let inner = guest.node("share/inner");
    guest.watch(inner, ALL, 1).unwrap();
    guest.call(FORGET, inner, body().u64(1)).unwrap();
    assert!(!events.any());
    guest.watch(node, ALL, 7).unwrap();
    guest.call(INIT, 0, body().u32(7).u32(41).u32(0).u32(0)).unwrap();
    assert!(!events.any());
}

#[test]
fn nothing_is_reported_that_the_guest_does() {
    unprivileged(|| {
        let (guest, root) = Guest::watching(ALL);
        let (file, handle, _) = guest.create(root, "file", libc::O_RDWR, 0o644).unwrap();
        guest.watch(file, ALL, 1).unwrap();
        guest.write(file, handle, 0, b"contents").unwrap();
        guest.chmod(file, 0o755).unwrap();
        guest.chown(file, 999, 999).unwrap();
        guest.set(file, 1 << 3, 0, 3, 0, (0, 0)).unwrap();
        guest.set(file, 1 << 4 | 1 << 5, 0, 0, 0, (0, 0)).unwrap();
        let (name, value) = (body().u32(1).u32(0).name("user.x").bytes(b"1"), body().name("user.x"));
        guest.call(SETXATTR, file, name).unwrap();
        guest.call(24, file, value).unwrap();
        guest.call(LINK, root, body().u64(file).name("link")).unwrap();
        guest.call(SYMLINK, root, body().name("symlink").name("file")).unwrap();
        guest.mknod(root, "pipe", libc::S_IFIFO | 0o644, 0).unwrap();
        let (directory, _) = guest.mkdir(root, "directory", 0o755).unwrap();
        guest.watch(directory, ALL, 1).unwrap();
        guest.chmod(directory, 0o555).unwrap();
        guest.create(directory, "inner", libc::O_RDWR, 0o400).unwrap();
        guest.rename((root, "file"), (directory, "moved"), 0).unwrap();
        guest.rename((directory, "moved"), (root, "symlink"), libc::RENAME_EXCHANGE).unwrap();
        guest.rename((root, "link"), (root, "pipe"), 0).unwrap();
        guest.call(RELEASE, file, body().u64(handle).u64(0).u64(0)).unwrap();
        let handle = guest.open(file, libc::O_RDWR | libc::O_TRUNC).unwrap();
        guest.call(RELEASE, file, body().u64(handle).u64(0).u64(0)).unwrap();
        for (directory, name) in [(root, "symlink"), (root, "pipe"), (directory, "inner"), (directory, "moved")] {
            guest.remove(UNLINK, directory, name).unwrap();
        }
        guest.remove(RMDIR, root, "directory").unwrap();
        assert_eq!(guest.seen(), []);
        fs::write(guest.path("after"), b"").unwrap();
        assert_eq!(guest.seen()[0], seen(IN_CREATE, "after"));
    });
}

#[test]
fn the_hosts_change_is_reported_when_the_guests_fails() {
    let (guest, root) = Guest::watching(ALL);
    fs::create_dir(guest.path("taken")).unwrap();
    assert_eq!(guest.mkdir(root, "taken", 0o755).unwrap_err(), libc::EEXIST);
    assert_eq!(guest.remove(UNLINK, root, "none").unwrap_err(), libc::ENOENT);
    assert_eq!(guest.seen(), [seen(IN_CREATE | IN_ISDIR, "taken")]);
}

#[test]
fn names_are_any_bytes_and_requests_for_what_is_not_there_are_refused() {
    let (guest, root) = Guest::watching(IN_CREATE);
    let names: [Vec<u8>; 3] = [b"\xff\xfe".to_vec(), b"a\nb".to_vec(), vec![b'x'; 255]];
    for name in &names {
        fs::write(guest.path("").join(OsStr::from_bytes(name)), b"").unwrap();
    }
    let expected: Vec<_> = names.into_iter().map(|name| (IN_CREATE, name)).collect();
    assert_eq!(guest.seen(), expected);
    assert_eq!(guest.watch(1 << 50, ALL, 1), Err(libc::ESTALE));
    assert_eq!(guest.watch(fuse::ROOT, ALL, 1), Ok(()));
    // A request without its fields, and one with bits that no watcher can set.
    assert_eq!(guest.call(fuse::WATCH, root, body().u32(ALL)), Err(libc::EINVAL));
    guest.watch(root, !0, 2).unwrap();
    fs::write(guest.path("file"), b"").unwrap();
    assert_eq!(guest.seen(), [seen(IN_CREATE, "file"), seen(IN_CLOSE_WRITE, "file")]);
}

#[test]
fn the_number_of_watched_nodes_is_bounded() {
    let directory = tempfile::tempdir().unwrap();
    let place = fs::File::open(directory.path()).unwrap();
    let events = events::Events::new();
    let watch = |node| {
        use std::os::fd::AsFd;
        events.watch(node, ALL, 1, place.as_fd())
    };
    let accepted = (0..=1_u64 << 16).take_while(|node| watch(*node).is_ok()).count();
    assert_eq!(accepted, 1 << 16);
    events.forget(7);
    watch(1 << 20).unwrap();
}

/// Something that either side does with one of a few names.
#[derive(Clone, Copy, Debug)]
enum Step {
    Create,
    Append,
    Mode,
    Rename(u8),
    Remove,
}

fn step() -> impl Strategy<Value = (bool, u8, Step, bool)> {
    let step = prop_oneof![
        3 => Just(Step::Create),
        3 => Just(Step::Append),
        1 => Just(Step::Mode),
        2 => (0_u8..4).prop_map(Step::Rename),
        2 => Just(Step::Remove)
    ];
    (any::<bool>(), 0_u8..4, step, any::<bool>())
}

/// Does a step on the host; returns the events of it. Steps that fail have none.
fn on_host(guest: &Guest, name: u8, step: Step) -> Vec<Seen> {
    let (text, path) = (name.to_string(), |name: u8| guest.path(&name.to_string()));
    let done = match step {
        Step::Create => OpenOptions::new().write(true).create_new(true).open(path(name)).map(drop),
        Step::Append => OpenOptions::new().append(true).open(path(name)).and_then(|mut file| file.write_all(b"x")),
        Step::Mode => fs::set_permissions(path(name), Permissions::from_mode(0o600)),
        Step::Rename(to) if to == name => return Vec::new(),
        Step::Rename(to) => fs::rename(path(name), path(to)),
        Step::Remove => fs::remove_file(path(name)),
    };
    let masks: &[u32] = match step {
        Step::Create => &[IN_CREATE, IN_CLOSE_WRITE],
        Step::Append => &[IN_MODIFY, IN_CLOSE_WRITE],
        Step::Mode => &[IN_ATTRIB],
        Step::Rename(to) if done.is_ok() => {
            return vec![seen(IN_MOVED_FROM, &text), seen(IN_MOVED_TO, &to.to_string())];
        }
        Step::Rename(_) => &[],
        Step::Remove => &[IN_DELETE],
    };
    let masks = if done.is_ok() { masks } else { &[] };
    masks.iter().map(|mask| seen(*mask, &text)).collect()
}

/// The same in the guest; failures are part of the game.
fn in_guest(guest: &Guest, root: u64, name: u8, step: Step) {
    let text = name.to_string();
    let file = || guest.lookup(root, &text).map(|(node, _)| node);
    let close = |node, handle| guest.call(RELEASE, node, body().u64(handle).u64(0).u64(0)).map(drop);
    let _ = match step {
        Step::Create => guest
            .create(root, &text, libc::O_WRONLY | libc::O_EXCL, 0o644)
            .and_then(|(node, handle, _)| close(node, handle)),
        Step::Append => file().and_then(|node| {
            let handle = guest.open(node, libc::O_WRONLY)?;
            guest.write_with(node, handle, 0, b"y", libc::O_APPEND, 0)?;
            close(node, handle)
        }),
        Step::Mode => file().and_then(|node| guest.chmod(node, 0o640)).map(drop),
        Step::Rename(to) => guest.rename((root, &text), (root, &to.to_string()), 0),
        Step::Remove => guest.remove(UNLINK, root, &text),
    };
}

/// Puts together what inotify puts together: an event that is the same as the one before.
fn merged(mut events: Vec<Seen>) -> Vec<Seen> {
    events.dedup();
    events
}

proptest! {
    #[test]
    fn each_change_of_the_host_is_reported_once_between_any_changes_of_the_guest(steps in vec(step(), 1..60)) {
        let (guest, root) = Guest::watching(ALL & !(IN_DELETE_SELF | IN_MOVE_SELF));
        let (mut expected, mut got) = (Vec::new(), Vec::new());
        for (host, name, step, look) in steps {
            if host {
                expected.extend(on_host(&guest, name, step));
            } else {
                in_guest(&guest, root, name, step);
            }
            if look {
                got.extend(guest.seen());
            }
        }
        got.extend(guest.seen());
        prop_assert_eq!(merged(got), merged(expected));
    }
}

#[test]
fn of_two_that_create_a_name_at_once_the_event_is_the_hosts_only_if_it_won() {
    let (guest, root) = Guest::watching(IN_CREATE | IN_DELETE);
    let mut won = [0, 0];
    for round in 0..400 {
        let name = round.to_string();
        let (path, barrier) = (guest.path(&name), Arc::new(std::sync::Barrier::new(2)));
        let other = Arc::clone(&barrier);
        let host = thread::spawn(move || {
            other.wait();
            fs::create_dir(path).is_ok()
        });
        barrier.wait();
        let guest_won = guest.mkdir(root, &name, 0o755).is_ok();
        let host_won = host.join().unwrap();
        assert!(host_won != guest_won);
        won[usize::from(guest_won)] += 1;
        let expected = if host_won { vec![seen(IN_CREATE | IN_ISDIR, &name)] } else { Vec::new() };
        assert_eq!(guest.seen(), expected, "round {round}, host won: {host_won}");
    }
    assert!(won.iter().sum::<i32>() == 400);
}

#[test]
fn each_of_many_changes_of_the_host_is_reported_once_while_the_guest_changes_others() {
    const EACH: usize = 500;
    let (guest, root) = Guest::watching(ALL & !IN_CLOSE_WRITE);
    let (directory, done) = (guest.path(""), Arc::new(std::sync::atomic::AtomicBool::new(false)));
    let ended = Arc::clone(&done);
    let host = thread::spawn(move || {
        for number in 0..EACH {
            let [name, new] = ["h", "m"].map(|kind| directory.join(format!("{kind}{number}")));
            fs::write(&name, b"x").unwrap();
            fs::rename(&name, &new).unwrap();
            fs::remove_file(&new).unwrap();
        }
        ended.store(true, std::sync::atomic::Ordering::Release);
    });
    let (mut number, mut got) = (0, Vec::new());
    while !done.load(std::sync::atomic::Ordering::Acquire) {
        let name = format!("g{number}");
        let (node, handle, _) = guest.create(root, &name, libc::O_WRONLY, 0o644).unwrap();
        guest.write(node, handle, 0, b"x").unwrap();
        guest.call(RELEASE, node, body().u64(handle).u64(0).u64(0)).unwrap();
        guest.rename((root, &name), (root, "same"), 0).unwrap();
        guest.remove(UNLINK, root, "same").unwrap();
        number += 1;
        got.extend(guest.ready());
    }
    host.join().unwrap();
    got.extend(guest.ready());
    let mut count: BTreeMap<OsString, Vec<u32>> = BTreeMap::new();
    for event in got {
        count.entry(OsString::from(OsStr::from_bytes(&event.name))).or_default().push(event.mask);
    }
    assert_eq!(
        count.len(),
        2 * EACH,
        "{:?}",
        count.keys().filter(|name| name.as_bytes()[0] == b'g').collect::<Vec<_>>()
    );
    for (name, masks) in count {
        let expected = if name.as_bytes()[0] == b'h' {
            [IN_CREATE, IN_MODIFY, IN_MOVED_FROM]
        } else {
            [IN_MOVED_TO, IN_DELETE, 0]
        };
        let expected: Vec<_> = expected.into_iter().filter(|mask| *mask != 0).collect();
        assert_eq!(masks, expected, "{name:?}");
    }
}

#[test]
fn an_event_waits_for_a_change_that_may_have_caused_it_and_those_behind_it_do() {
    let (guest, root) = Guest::watching(IN_CREATE);
    let events = &guest.serving.as_ref().unwrap().events;
    let mut change = events::Change::default();
    change.name(root, b"a", IN_CREATE);
    let own = events.begin(change);
    fs::write(guest.path("a"), b"").unwrap();
    fs::write(guest.path("b"), b"").unwrap();
    assert_eq!(guest.seen(), []);
    own.end(true);
    assert_eq!(guest.seen(), [seen(IN_CREATE, "b")]);
    let start = Instant::now();
    fs::write(guest.path("c"), b"").unwrap();
    assert_eq!(guest.seen(), [seen(IN_CREATE, "c")]);
    assert!(start.elapsed() < Duration::from_millis(100));
}

#[test]
fn a_driver_gets_each_event_in_a_buffer_of_its_notification_queue() {
    let guest = Guest::new();
    let server = Arc::new(guest.serve(&[("", false)], 5));
    let driver = Driver::with(device(server), events::FEATURE);
    let mut node = fuse::ROOT;
    for name in guest.path("").components().skip(1) {
        node = entry(&driver.call(2, LOOKUP, node, body().name(name))[16..]).0;
    }
    let watched = driver.call(3, fuse::WATCH, node, body().u32(IN_CREATE | IN_DELETE).u32(0).u64(1));
    assert_eq!(u32_at(&watched, 4), 0);
    // One too small, for an event that is lost then.
    driver.offer(1, 16);
    fs::write(guest.path("lost"), b"").unwrap();
    assert!(driver.receive(1).is_empty());
    driver.offer(1, events::BUFFER as u32);
    thread::sleep(Duration::from_millis(20));
    let start = Instant::now();
    fs::write(guest.path("name"), b"").unwrap();
    let notification = driver.receive(1);
    assert!(start.elapsed() < Duration::from_millis(100), "{:?}", start.elapsed());
    let words: Vec<_> = (0..4).map(|word| u32_at(&notification, 24 + 4 * word)).collect();
    assert_eq!((u32_at(&notification, 0) as usize, u64_at(&notification, 8)), (notification.len(), 0));
    assert_eq!((u32_at(&notification, 4), u64_at(&notification, 16)), (fuse::NOTIFY_HOST_EVENT, node));
    assert_eq!((&words[..], &notification[40..]), (&[IN_CREATE, 0, 4, 0][..], &b"name"[..]));
    // Events that come while there is no buffer wait for one.
    fs::write(guest.path("second"), b"").unwrap();
    fs::remove_file(guest.path("name")).unwrap();
    driver.offer(1, events::BUFFER as u32);
    assert_eq!(&driver.receive(1)[40..], b"second");
    driver.offer(1, events::BUFFER as u32);
    let last = driver.receive(1);
    assert_eq!((u32_at(&last, 24), &last[40..]), (IN_DELETE, &b"name"[..]));
}

#[test]
fn a_successor_watches_what_its_predecessor_watched_and_nothing_else() {
    let shares = [("share", false)];
    let mut guest = Guest::with(&shares);
    fs::create_dir(guest.path("share/inner")).unwrap();
    for name in ["file", "left", "gone"] {
        fs::write(guest.path("share").join(name), b"").unwrap();
    }
    let [directory, inner] = ["share", "share/inner"].map(|path| guest.node(path));
    let [file, left, gone] = ["share/file", "share/left", "share/gone"].map(|path| guest.node(path));
    guest.watch(directory, IN_CREATE, 1).unwrap();
    guest.watch(inner, IN_CREATE, 1).unwrap();
    guest.watch(inner, IN_CREATE | IN_DELETE, 2).unwrap();
    for node in [file, left, gone] {
        guest.watch(node, IN_MODIFY, 7).unwrap();
    }
    guest.watch(left, 0, 8).unwrap();
    fs::remove_file(guest.path("share/gone")).unwrap();
    guest.replace(&shares);

    fs::write(guest.path("share/new"), b"x").unwrap();
    fs::write(guest.path("share/inner/new"), b"x").unwrap();
    fs::remove_file(guest.path("share/inner/new")).unwrap();
    for name in ["file", "left"] {
        fs::write(guest.path("share").join(name), b"x").unwrap();
    }
    let seen: Vec<_> = guest.ready().into_iter().map(|event| (event.node, event.mask)).collect();
    assert_eq!(seen, [(directory, IN_CREATE), (inner, IN_CREATE), (inner, IN_DELETE), (file, IN_MODIFY)]);
    // Its requests go on counting.
    guest.watch(file, 0, 6).unwrap();
    assert_eq!(guest.serving.as_ref().unwrap().events.watched(), 3);
    guest.watch(file, 0, 8).unwrap();
    assert_eq!(guest.serving.as_ref().unwrap().events.watched(), 2);
}
