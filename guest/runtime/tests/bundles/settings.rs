//! Settings of a spec that would reach beyond the container: refused, dropped or brought into bounds.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::{Value, json};

use crate::guest_root::{GuestRoot, RUNTIME};

const VOLUMES: &str = "/var/lib/docker/volumes";

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn hooks_cgroups_and_settings_that_no_engine_writes_are_refused() {
    GuestRoot::with(|root| {
        let proof = "/var/lib/docker/proof";
        let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", format!("id >{proof}")] });
        let cases = [
            ("", "hooks", json!({ "prestart": [hook] }), "the hook \"/bin/sh\" is not allowed"),
            ("", "hooks", json!({ "createRuntime": [hook] }), "hooks.createRuntime is not supported"),
            ("/linux", "cgroupsPath", "/system/x".into(), "\"/system/x\" is not allowed"),
            ("/linux", "cgroupsPath", "../../../tmp/x/y".into(), "is not allowed"),
            ("/process", "scheduler", json!({ "policy": "SCHED_FIFO" }), "process.scheduler"),
        ];
        for (pointer, key, value, message) in cases {
            root.bundle("a", &["true"]);
            root.edit("a", |config| config.pointer_mut(pointer).unwrap()[key] = value);
            let refusal = root.refused("a");
            assert!(refusal.contains(message), "{refusal}");
            root.remove("a");
        }
        assert!(!Path::new(proof).exists(), "no hook ran");
    });
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn neither_the_first_process_nor_one_of_exec_outranks_the_engine() {
    GuestRoot::with(|root| {
        let limits = json!([
            { "type": "RLIMIT_RTPRIO", "soft": 99, "hard": 99 }, { "type": "RLIMIT_CORE", "soft": 7, "hard": 7 }
        ]);
        let command = ["sh", "-c", "grep -E 'realtime priority|core file' /proc/self/limits"];
        let adapt = |config: &mut Value| {
            config["rlimits"] = limits.clone();
        };
        let check = |output: &str| {
            let lines: Vec<Vec<&str>> = output.lines().map(|line| line.split_whitespace().collect()).collect();
            let value =
                |name: &str| lines.iter().find(|words| words.contains(&name)).map(|words| words[words.len() - 2]);
            assert_eq!(value("realtime"), Some("0"), "{output}");
            assert_eq!(lines.iter().find(|words| words.contains(&"core")).map(|words| words[4]), Some("7"), "{output}");
        };
        root.bundle("a", &command);
        root.edit("a", |config| adapt(&mut config["process"]));
        check(&root.run(RUNTIME, "a"));
        root.remove("a");

        root.bundle("b", &["sh", "-c", "cat /proc/self/uid_map; exec sleep 1000"]);
        root.start(RUNTIME, "b");
        root.range("b");
        let mut process =
            json!({ "args": command, "cwd": "/", "env": ["PATH=/bin:/usr/bin"], "user": { "uid": 0, "gid": 0 } });
        adapt(&mut process);
        check(&root.exec("b", &process));
        root.end(RUNTIME, "b");
    });
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn volumes_of_other_file_systems_are_refused_also_below_a_volume() {
    GuestRoot::with(|root| {
        let volume = |name: &str| Path::new(VOLUMES).join(name).join("_data");
        for name in ["proc", "overlay", "memory", "around"] {
            fs::create_dir_all(volume(name)).unwrap();
        }
        fs::create_dir(volume("around").join("inner")).unwrap();
        mount("proc", volume("proc"), "proc", MountFlags::empty(), None).unwrap();
        mount("overlay", volume("overlay"), "overlay", MountFlags::empty(), c"lowerdir=/etc:/usr").unwrap();
        mount("tmpfs", volume("memory"), "tmpfs", MountFlags::empty(), c"mode=0755").unwrap();
        mount("proc", volume("around").join("inner"), "proc", MountFlags::empty(), None).unwrap();
        let bind = |name: &str| json!({ "destination": "/m", "type": "bind", "source": volume(name), "options": ["rbind", "rprivate"] });
        for name in ["proc", "overlay", "around"] {
            root.bundle("a", &["ls", "/m"]);
            root.add_mounts("a", &[bind(name)]);
            let refusal = root.refused("a");
            assert!(refusal.contains("configured as a restricted host mount"), "{name}: {refusal}");
            root.remove("a");
        }
        // A volume in memory belongs to the container's root, which may write there.
        root.bundle("a", &["sh", "-c", "echo kept >/m/file && stat -c %u /m /m/file"]);
        root.add_mounts("a", &[bind("memory")]);
        assert_eq!(root.run(RUNTIME, "a"), "0\n0\n");
        assert_eq!(fs::read_to_string(volume("memory").join("file")).unwrap(), "kept\n");
        root.remove("a");
        for path in [volume("proc"), volume("overlay"), volume("memory"), volume("around").join("inner")] {
            unmount(path, UnmountFlags::empty()).unwrap();
        }
    });
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn the_engine_and_a_container_see_each_others_files_at_once() {
    GuestRoot::with(|root| {
        // The container looks for the name before it is there, which a file system of its own would remember.
        let script = "cat /proc/self/uid_map; while ! test -e /made; do sleep 0.1; done; stat -c %u /made; echo own >/made; \
                      exec sleep 1000";
        root.bundle("a", &["sh", "-c", script]);
        root.start(RUNTIME, "a");
        root.range("a");
        let made = root.engine_root("a").join("made");
        fs::write(&made, "").unwrap();
        root.output_until("a", |output| output.ends_with("\n0\n"));
        GuestRoot::wait_for(|| "the engine does not see the line".into(), || fs::read(&made).unwrap() == b"own\n");
        assert_eq!(fs::metadata(&made).unwrap().uid(), 0);
        root.end(RUNTIME, "a");
    });
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn a_root_that_this_kernel_cannot_id_map_is_refused_with_the_remedy() {
    GuestRoot::with(|root| {
        root.bundle("a", &["true"]);
        mount("proc", root.engine_root("a"), "proc", MountFlags::empty(), None).unwrap();
        let refusal = root.refused("a");
        assert!(refusal.contains("use the kernel of `firmware/build guest`"), "{refusal}");
        unmount(root.engine_root("a"), UnmountFlags::empty()).unwrap();
        root.remove("a");
    });
}
