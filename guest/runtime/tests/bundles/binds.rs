//! Binds that crun mounts, because what they go onto is its to mount: what they take away must stay away.

use std::{fs, path::Path, process::Command};

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_remount, unmount};
use serde_json::{Value, json};

use crate::guest_root::{PROBE, Place, RUNTIME, done};

/// A link of the image that leads into what crun mounts.
const LINK: &str = "link-to-dev";

/// A volume; another file system is mounted in it.
const VOLUME: &str = "/var/lib/docker/volumes/v/_data";

/// Where the volume goes, with the mount in it: below procfs and sysfs, below `/dev` by a detour, and on a tmpfs with an
/// option that the runtime leaves to crun.
const FOLDERS: [&str; 4] = ["/proc/tty", "/sys/bus", "/link-to-dev/volume", "/odd/volume"];

/// Where a file of it goes.
const FILES: [&str; 2] = ["/proc/sys/kernel/ostype", "/sys/kernel/notes"];

/// Where the VM's own mounts of the volume take writing away and the binds nothing: one that is read-only, and one in
/// which such a one is.
const READ_ONLY_SOURCES: [(&str, &str, &str); 2] = [
    ("/proc/fs", "/var/lib/docker/volumes/read-only/_data", "/proc/fs"),
    ("/sys/class", "/var/lib/docker/volumes/around/_data", "/sys/class/read-only"),
];

/// What can be taken away besides devices, which always are.
const FLAGS: [&str; 3] = ["ro", "nosuid", "noexec"];

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn what_a_bind_takes_away_stays_away_where_crun_mounts_it() {
    Place::with(|place| stays_away(&place));
}

fn stays_away(place: &Place) {
    std::os::unix::fs::symlink("/dev", place.lower().join(LINK)).unwrap();
    let inner = Path::new(VOLUME).join("inner");
    fs::create_dir_all(&inner).unwrap();
    fs::write(Path::new(VOLUME).join("file"), "kept").unwrap();
    // Whoever may write the mount may write the files: not the owner's bits are what is tested.
    done(Command::new("chmod").args(["-R", "a+rwX", VOLUME]));
    mount("inner", &inner, "tmpfs", MountFlags::empty(), c"mode=0777").unwrap();

    let read_only = [READ_ONLY_SOURCES[0].1.to_owned(), format!("{}/read-only", READ_ONLY_SOURCES[1].1)];
    for path in &read_only {
        fs::create_dir_all(path).unwrap();
        mount_bind(VOLUME, path).unwrap();
        mount_remount(path, MountFlags::BIND | MountFlags::RDONLY, c"").unwrap();
    }

    for flag in FLAGS {
        let folders = FOLDERS.iter().flat_map(|path| [(*path).to_owned(), format!("{path}/inner")]);
        let sources = READ_ONLY_SOURCES.iter().filter(|_| flag == "ro").map(|(_, _, path)| (*path).to_owned());
        let paths: Vec<String> = folders.chain(FILES.map(Into::into)).chain(sources).collect();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let arguments = [&[PROBE, "mounts", flag], &paths[..]].concat();
        place.privileged_bundle("a", &arguments, false);
        place.add_mounts("a", &mounts(flag));
        let said = place.run(RUNTIME, "a");
        place.remove("a");
        check(flag, &paths, &said);
        assert_eq!(fs::read_to_string(Path::new(VOLUME).join("file")).unwrap(), "kept");
    }
    for path in read_only.iter().map(Path::new).chain([&*inner]) {
        unmount(path, UnmountFlags::empty()).unwrap();
    }
}

fn mounts(flag: &str) -> Vec<Value> {
    let odd = json!({ "destination": "/odd", "type": "tmpfs", "source": "tmpfs", "options": ["nodiratime"] });
    let folders = FOLDERS.map(|path| bind(path, VOLUME, &["rbind", "rprivate", flag]));
    let files = FILES.map(|path| bind(path, &format!("{VOLUME}/file"), &["rbind", "rprivate", flag]));
    let sources = READ_ONLY_SOURCES.map(|(path, source, _)| bind(path, source, &["rbind", "rprivate"]));
    [odd].into_iter().chain(folders).chain(files).chain(sources).collect()
}

fn bind(path: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": path, "type": "bind", "source": source, "options": options })
}

/// Every attempt was made, and the kernel refused each that does nothing else.
fn check(flag: &str, paths: &[&str], said: &str) {
    let lines: Vec<Vec<&str>> = said.lines().map(|line| line.splitn(3, '\t').collect()).collect();
    for path in paths {
        let of_path: Vec<_> = lines.iter().filter(|line| line[0].split(", ").nth(1) == Some(path)).collect();
        assert_eq!(of_path.len(), 20, "{path}: {said}");
        for line in of_path {
            assert_ne!(line[1], "open", "{flag}: {}: {}", line[0], line[2]);
            // A clone without the mount in it would show what is below that.
            let shows = line[0].starts_with("mount_setattr of a clone") && FOLDERS.contains(path);
            let refusal = if shows { "Invalid argument" } else { "Operation not permitted" };
            if line[0].contains("mount_setattr") || line[0].starts_with("remount") {
                assert!(line[2].contains(refusal), "{flag}: {line:?}");
            }
        }
    }
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn a_bind_that_crun_mounts_has_no_devices() {
    Place::with(|place| no_devices(&place));
}

fn no_devices(place: &Place) {
    fs::create_dir_all(VOLUME).unwrap();
    place.privileged_bundle("n", &["cat", "/proc/self/mountinfo"], false);
    let writable = bind("/proc/tty", VOLUME, &["rbind"]);
    place.add_mounts("n", &[writable, bind("/sys/bus", VOLUME, &["bind", "ro", "noatime"])]);
    let said = place.run(RUNTIME, "n");
    place.remove("n");
    let options = |path: &str| {
        let lines = said.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let of_path: Vec<_> = lines.filter(|fields| fields[4] == path).map(|fields| fields[5].to_owned()).collect();
        let [options] = &of_path[..] else { panic!("{path}: {said}") };
        options.clone()
    };
    assert!(options("/proc/tty").starts_with("rw,nodev,"), "{said}");
    assert!(options("/sys/bus").starts_with("ro,nodev,"), "{said}");
}
