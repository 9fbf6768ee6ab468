//! Attempts on Bulkhead's own files, which lie in the share of a home directory.

use std::{fs, os::unix::fs::symlink};

use super::*;

const OWN: [&str; 3] = ["home/.config/bulkhead", "home/.local/share/bulkhead", "home/.cache/bulkhead"];

/// A guest of a home directory, under two names, with Bulkhead's files in it.
fn home() -> Guest {
    let mut guest = Guest::with(&[("home", false)]);
    for own in &OWN[..2] {
        fs::create_dir_all(guest.path(own)).unwrap();
    }
    fs::write(guest.path("home/.config/bulkhead/settings.json"), b"{}").unwrap();
    fs::write(guest.path("home/.local/share/bulkhead/data.img"), b"disk").unwrap();
    fs::hard_link(guest.path("home/.local/share/bulkhead/data.img"), guest.path("home/copy")).unwrap();
    fs::create_dir(guest.path("home/.config/other")).unwrap();
    guest.hidden = OWN.iter().map(|own| guest.path(own)).collect();
    guest.replace(&[("home", false), ("", false)]);
    guest
}

#[test]
fn they_are_not_there_under_any_name() {
    let guest = home();
    for path in [OWN[0], OWN[1], "home/.config/bulkhead/settings.json", "home/copy"] {
        assert_eq!(guest.find(&guest.path(path)), Err(libc::ENOENT), "{path}");
    }
    assert_eq!(guest.names(guest.node("home/.config")), ["other"]);
    let plain = guest.list(guest.node("home/.local/share"), false, 4096).unwrap();
    assert_eq!(plain.len(), 2, "{plain:?}");
    // The host makes new ones, as programs do that replace a file, and directories that were not there.
    fs::write(guest.path("home/.config/bulkhead/new"), b"{}").unwrap();
    assert_eq!(guest.find(&guest.path("home/.config/bulkhead/new")), Err(libc::ENOENT));
    fs::remove_dir_all(guest.path(OWN[0])).unwrap();
    fs::create_dir(guest.path(OWN[0])).unwrap();
    assert_eq!(guest.find(&guest.path(OWN[0])), Err(libc::ENOENT));
    // A link to them leads there in the guest's tree, where they are not.
    symlink(guest.path(OWN[1]), guest.path("home/link")).unwrap();
    assert_eq!(guest.find(&guest.path("home/link")).unwrap().1.mode & libc::S_IFMT, libc::S_IFLNK);
}

#[test]
fn nothing_takes_their_place() {
    let guest = home();
    let [home, config, local] = ["home", "home/.config", "home/.local"].map(|path| guest.node(path));
    guest.mkdir(home, "mine", 0o755).unwrap();
    for name in [".config", ".local"] {
        assert_eq!(guest.rename((home, name), (home, "away"), 0), Err(libc::EBUSY), "{name}");
        assert_eq!(guest.rename((home, "mine"), (home, name), 0), Err(libc::EBUSY), "{name}");
        assert_eq!(guest.rename((home, "mine"), (home, name), libc::RENAME_EXCHANGE), Err(libc::EBUSY), "{name}");
        assert_eq!(guest.remove(RMDIR, home, name), Err(libc::EBUSY), "{name}");
    }
    assert_eq!(guest.rename((local, "share"), (home, "away"), 0), Err(libc::EBUSY));
    for (parent, name) in [(config, "bulkhead"), (home, ".cache")] {
        assert_eq!(guest.mkdir(parent, name, 0o755).map(drop), Err(libc::EACCES), "{name}");
        assert_eq!(guest.create(parent, name, libc::O_RDWR, 0o644).map(drop), Err(libc::EACCES), "{name}");
        assert_eq!(guest.call(SYMLINK, parent, body().name(name).name("/etc")), Err(libc::EACCES), "{name}");
        assert_eq!(guest.rename((home, "mine"), (parent, name), 0), Err(libc::EBUSY), "{name}");
    }
    assert_eq!(guest.rename((config, "bulkhead"), (home, "mine"), libc::RENAME_EXCHANGE), Err(libc::EBUSY));
    // Nor are their other names moved, replaced or removed by a guest that knows them.
    assert_eq!(guest.rename((home, "copy"), (home, "new"), 0), Err(libc::EBUSY));
    assert_eq!(guest.rename((home, "mine"), (home, "copy"), libc::RENAME_EXCHANGE), Err(libc::EBUSY));
    assert_eq!(guest.remove(UNLINK, home, "copy"), Err(libc::EBUSY));
    // All else can be done.
    guest.rename((config, "other"), (home, "other"), 0).unwrap();
    guest.mkdir(config, "new", 0o755).unwrap();
    assert!(guest.path("home/.config/bulkhead/settings.json").exists());
}

#[test]
fn a_link_on_the_way_to_them_stays() {
    let mut guest = Guest::with(&[("home", false)]);
    fs::create_dir_all(guest.path("home/dotfiles/config/bulkhead")).unwrap();
    symlink("dotfiles/config", guest.path("home/.config")).unwrap();
    guest.hidden = vec![guest.path("home/.config/bulkhead")];
    guest.replace(&[("home", false)]);
    let (home, dotfiles) = (guest.node("home"), guest.node("home/dotfiles"));
    assert_eq!(guest.remove(UNLINK, home, ".config"), Err(libc::EBUSY));
    assert_eq!(guest.rename((home, "dotfiles"), (home, "away"), 0), Err(libc::EBUSY));
    assert_eq!(guest.rename((dotfiles, "config"), (home, "away"), 0), Err(libc::EBUSY));
    assert_eq!(guest.find(&guest.path("home/dotfiles/config/bulkhead")), Err(libc::ENOENT));
}

#[test]
fn a_node_from_a_time_before_they_were_hidden_is_stale() {
    let mut guest = Guest::with(&[("home", false)]);
    fs::create_dir_all(guest.path("home/own")).unwrap();
    fs::write(guest.path("home/own/settings"), b"{}").unwrap();
    let nodes = ["home/own", "home/own/settings"].map(|path| guest.node(path));
    let handle = guest.open(nodes[1], libc::O_RDWR).unwrap();
    guest.hidden = vec![guest.path("home/own")];
    guest.replace(&[("home", false)]);
    assert_eq!(nodes.map(|node| guest.attributes(node)), [Err(libc::ESTALE); 2]);
    assert_eq!(guest.write(nodes[1], handle, 0, b"x"), Err(libc::ESTALE));
}

#[test]
fn they_cannot_be_shared_themselves() {
    let guest = home();
    let shares = ["home/.config/bulkhead", "home/.local/share/bulkhead/", "home"].map(|path| guest.share(path, true));
    let (_, failed) = Server::new(&shares, &guest.hidden, 4096, 3, &State::own().unwrap(), false);
    assert_eq!(failed.len(), 2, "{failed:?}");
}
