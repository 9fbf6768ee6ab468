//! Files that the engine keeps for a container and reads as a whole: the container's writes must not reach them.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use crate::guest_root::{GuestRoot, RUNTIME};

/// The engine's files of a container.
const FILES: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

/// The engine's directory of a container, with its files as the engine writes them.
fn engine_directory(container: &str) -> PathBuf {
    let directory = Path::new("/var/lib/docker/containers").join(container);
    fs::create_dir_all(&directory).unwrap();
    for file in FILES {
        fs::write(directory.join(file), format!("{file} of the engine\n")).unwrap();
    }
    directory
}

fn binds(directory: &Path, option: &str) -> Vec<Value> {
    let bind = |file: &str| {
        json!({
            "destination": format!("/etc/{file}"), "type": "bind", "source": directory.join(file),
            "options": ["rbind", "rprivate", option]
        })
    };
    FILES.map(bind).into()
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn what_a_container_writes_into_its_hosts_file_never_reaches_the_engines() {
    GuestRoot::with(|root| writes_stay(&root));
}

fn writes_stay(root: &GuestRoot) {
    let directory = engine_directory("w");
    // A hole of 64 GiB, data beyond the tmpfs's size, owners and modes, in every file; the last line is the
    // container's.
    let script = "exec 2>&1; for f in hosts hostname resolv.conf; do cd /etc; stat -c '%n %u %g %a' $f; cat $f; \
                  echo 'of the container' >>$f && cat $f && chown 7:8 $f && chmod 606 $f && stat -c '%u %g %a' $f; \
                  dd if=/dev/zero of=$f bs=1 count=1 seek=68719476735 2>/dev/null && stat -c %s $f; \
                  dd if=/dev/zero of=$f bs=1024k count=64 conv=notrunc 2>/dev/null || echo full; : >$f; done; \
                  grep -c ' /etc/' /proc/self/mountinfo; cat /etc/config.v2.json; true";
    fs::write(directory.join("config.v2.json"), "the engine's").unwrap();
    root.privileged_bundle("w", &["sh", "-c", script], false);
    root.add_mounts("w", &binds(&directory, "rw"));
    let output = root.run(RUNTIME, "w");
    root.remove("w");
    let part = |file: &str| {
        format!(
            "{file} 0 0 644\n{file} of the engine\n{file} of the engine\nof the container\n7 8 606\n68719476736\nfull\n"
        )
    };
    let expected = FILES.map(part).concat();
    let rest = output.strip_prefix(&expected).unwrap_or_else(|| panic!("{output}"));
    assert!(rest.starts_with("3\n") && rest.contains("No such file"), "{output}");
    for file in FILES {
        assert_eq!(fs::read_to_string(directory.join(file)).unwrap(), format!("{file} of the engine\n"));
        let owner = fs::metadata(directory.join(file)).unwrap();
        assert_eq!((owner.uid(), owner.gid(), owner.mode() & 0o7777), (0, 0, 0o644));
    }
    fs::remove_dir_all(directory).unwrap();
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn a_container_sees_what_the_engine_writes_until_it_writes_itself() {
    GuestRoot::with(|root| {
        let directory = engine_directory("s");
        let script = "until grep -q peer /etc/hosts; do sleep 0.05; done; cat /etc/hosts; echo own >>/etc/hosts; \
                      until grep -q later /etc/resolv.conf; do sleep 0.05; done; cat /etc/hosts /etc/resolv.conf";
        root.bundle("s", &["sh", "-c", script]);
        root.add_mounts("s", &binds(&directory, "rw"));
        root.start(RUNTIME, "s");
        fs::write(directory.join("hosts"), "10.0.0.7\tpeer\n").unwrap();
        let first = root.output_until("s", |output| output.contains("peer"));
        assert_eq!(first, "10.0.0.7\tpeer\n");
        let process = json!({ "user": { "uid": 0, "gid": 0 }, "args": ["cat", "/etc/hosts"], "cwd": "/",
            "env": ["PATH=/usr/bin:/bin"] });
        let hosts = || root.exec("s", &process);
        GuestRoot::wait_for(|| format!("the container's own line is not in {}", hosts()), || hosts().contains("own"));
        fs::write(directory.join("hosts"), "10.0.0.8\tother\n").unwrap();
        fs::write(directory.join("resolv.conf"), "later\n").unwrap();
        let all = root.output_until("s", |output| output.ends_with("later\n"));
        assert_eq!(all, "10.0.0.7\tpeer\n10.0.0.7\tpeer\nown\nlater\n");
        assert_eq!(fs::read_to_string(directory.join("hosts")).unwrap(), "10.0.0.8\tother\n");
        root.end(RUNTIME, "s");
        fs::remove_dir_all(directory).unwrap();
    });
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn the_engines_files_of_a_read_only_container_cannot_be_written() {
    GuestRoot::with(|root| {
        let directory = engine_directory("r");
        let script = "exec 2>&1; cat /etc/hosts; echo x >>/etc/hosts; mount -o remount,rw,bind /etc/hosts; \
                      echo x >/etc/hosts; umount /etc/hosts; true";
        root.privileged_bundle("r", &["sh", "-c", script], false);
        root.add_mounts("r", &binds(&directory, "ro"));
        let output = root.run(RUNTIME, "r");
        root.remove("r");
        assert!(output.starts_with("hosts of the engine\n"), "{output}");
        assert_eq!(output.matches("Read-only file system").count(), 2, "{output}");
        assert_eq!(fs::read_to_string(directory.join("hosts")).unwrap(), "hosts of the engine\n");
        fs::remove_dir_all(directory).unwrap();
    });
}
