//! Binds that crun mounts, because it mounts the file system below them: their restrictions must stay.

use std::{fs, path::Path, process::Command};

use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_remount, unmount};
use serde_json::{Value, json};

use crate::guest_root::{GuestRoot, PROBE, RUNTIME, done};

/// A link of the image into a file system that crun mounts.
const LINK: &str = "link-to-dev";

/// A volume, with another file system mounted in it.
const VOLUME: &str = "/var/lib/docker/volumes/v/_data";

/// The destinations of the volume: below procfs and sysfs, below `/dev` through a link, and on a tmpfs with an option
/// that makes the runtime leave it to crun.
const DIRECTORIES: [&str; 4] = ["/proc/tty", "/sys/bus", "/link-to-dev/volume", "/odd/volume"];

/// The destinations of a file of the volume.
const FILES: [&str; 2] = ["/proc/sys/kernel/ostype", "/sys/kernel/notes"];

/// Binds without restrictions of sources that are read-only in the VM: one is a read-only mount, one has such a mount
/// in it. Destination, source, and the path that must not be writable.
const READ_ONLY_SOURCES: [(&str, &str, &str); 2] = [
    ("/proc/fs", "/var/lib/docker/volumes/read-only/_data", "/proc/fs"),
    ("/sys/class", "/var/lib/docker/volumes/around/_data", "/sys/class/read-only"),
];

/// The restrictions that a bind can ask for, besides `nodev`.
const FLAGS: [&str; 3] = ["ro", "nosuid", "noexec"];

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn what_a_bind_takes_away_stays_away_where_crun_mounts_it() {
    GuestRoot::with(|root| stays_away(&root));
}

fn stays_away(root: &GuestRoot) {
    std::os::unix::fs::symlink("/dev", root.lower().join(LINK)).unwrap();
    let inner = Path::new(VOLUME).join("inner");
    fs::create_dir_all(&inner).unwrap();
    fs::write(Path::new(VOLUME).join("file"), "kept").unwrap();
    // Every user may write the files, so that only the mount is tested and not the permissions.
    done(Command::new("chmod").args(["-R", "a+rwX", VOLUME]));
    mount("inner", &inner, "tmpfs", MountFlags::empty(), c"mode=0777").unwrap();

    let read_only = [READ_ONLY_SOURCES[0].1.to_owned(), format!("{}/read-only", READ_ONLY_SOURCES[1].1)];
    for path in &read_only {
        fs::create_dir_all(path).unwrap();
        mount_bind(VOLUME, path).unwrap();
        mount_remount(path, MountFlags::BIND | MountFlags::RDONLY, c"").unwrap();
    }

    for flag in FLAGS {
        let directories = DIRECTORIES.iter().flat_map(|path| [(*path).to_owned(), format!("{path}/inner")]);
        let sources = READ_ONLY_SOURCES.iter().filter(|_| flag == "ro").map(|(_, _, path)| (*path).to_owned());
        let paths: Vec<String> = directories.chain(FILES.map(Into::into)).chain(sources).collect();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let arguments = [&[PROBE, "mounts", flag], &paths[..]].concat();
        root.privileged_bundle("a", &arguments, false);
        root.add_mounts("a", &mounts(flag));
        let output = root.run(RUNTIME, "a");
        root.remove("a");
        check(flag, &paths, &output);
        assert_eq!(fs::read_to_string(Path::new(VOLUME).join("file")).unwrap(), "kept");
    }
    for path in read_only.iter().map(Path::new).chain([&*inner]) {
        unmount(path, UnmountFlags::empty()).unwrap();
    }
}

fn mounts(flag: &str) -> Vec<Value> {
    let odd = json!({ "destination": "/odd", "type": "tmpfs", "source": "tmpfs", "options": ["nodiratime"] });
    let directories = DIRECTORIES.map(|path| bind(path, VOLUME, &["rbind", "rprivate", flag]));
    let files = FILES.map(|path| bind(path, &format!("{VOLUME}/file"), &["rbind", "rprivate", flag]));
    let sources = READ_ONLY_SOURCES.map(|(path, source, _)| bind(path, source, &["rbind", "rprivate"]));
    [odd].into_iter().chain(directories).chain(files).chain(sources).collect()
}

fn bind(path: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": path, "type": "bind", "source": source, "options": options })
}

/// Asserts that every attempt was made, and that the kernel refused each one that would lift a restriction.
fn check(flag: &str, paths: &[&str], output: &str) {
    let lines: Vec<Vec<&str>> = output.lines().map(|line| line.splitn(3, '\t').collect()).collect();
    for path in paths {
        let of_path: Vec<_> = lines.iter().filter(|line| line[0].split(", ").nth(1) == Some(path)).collect();
        assert_eq!(of_path.len(), 20, "{path}: {output}");
        for line in of_path {
            assert_ne!(line[1], "open", "{flag}: {}: {}", line[0], line[2]);
            // A clone without the mount in it would show the directory below that mount.
            let shows = line[0].starts_with("mount_setattr of a clone") && DIRECTORIES.contains(path);
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
    GuestRoot::with(|root| no_devices(&root));
}

fn no_devices(root: &GuestRoot) {
    fs::create_dir_all(VOLUME).unwrap();
    root.privileged_bundle("n", &["cat", "/proc/self/mountinfo"], false);
    let writable = bind("/proc/tty", VOLUME, &["rbind"]);
    root.add_mounts("n", &[writable, bind("/sys/bus", VOLUME, &["bind", "ro", "noatime"])]);
    let output = root.run(RUNTIME, "n");
    root.remove("n");
    let options = |path: &str| {
        let lines = output.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let of_path: Vec<_> = lines.filter(|fields| fields[4] == path).map(|fields| fields[5].to_owned()).collect();
        let [options] = &of_path[..] else { panic!("{path}: {output}") };
        options.clone()
    };
    assert!(options("/proc/tty").starts_with("rw,nodev,"), "{output}");
    assert!(options("/sys/bus").starts_with("ro,nodev,"), "{output}");
}
