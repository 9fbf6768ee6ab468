//! The image's dockerd, which has patches of ours (`guest/engine/patches`), asked directly.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::PathBuf,
    process::Command,
};

use serde_json::{Value, json};

use crate::{
    engine_jail::{Engine, imitate_vm, must_answer, tar_of},
    guest_root::GuestRoot,
};

/// Memory that dockerd may take for a container's files of users and groups, in KiB.
const MEMORY: u64 = 300 << 10;

/// The size of a hole that costs a container nothing.
const HOLE: u64 = 64 << 30;

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn huge_files_of_users_and_groups_are_an_error_of_their_container_only() {
    GuestRoot::with(|_| {
        let engine = start();
        create("sleeper", &["sleep", "600"], &json!({}));
        for file in ["group", "passwd"] {
            // Stopped: in the writable layer.
            let layer = state("sleeper")["GraphDriver"]["Data"]["UpperDir"].as_str().map(PathBuf::from).unwrap();
            dig(&layer.join("etc"), file);
            let message = refused("/containers/sleeper/start", b"");
            assert!(message.contains(&format!("etc/{file}")) && message.contains("too large"), "{message}");
            // The remedy that the message names.
            let contents = if file == "group" { "root:x:0:\n" } else { "root:x:0:0::/:/bin/sh\n" };
            let (status, body) = must_answer("PUT", "/containers/sleeper/archive?path=/etc", &tar_of(file, contents));
            assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
            accepted("/containers/sleeper/start");
            // Running: in the container's root.
            let root = PathBuf::from(format!("/proc/{}/root/etc", state("sleeper")["State"]["Pid"]));
            dig(&root, file);
            let exec = json!({ "Cmd": ["true"], "User": "root" }).to_string();
            let (status, answer) = must_answer("POST", "/containers/sleeper/exec", exec.as_bytes());
            assert_eq!(status, 201, "{}", String::from_utf8_lossy(&answer));
            let exec: Value = serde_json::from_slice(&answer).unwrap();
            let path = format!("/exec/{}/start", exec["Id"].as_str().unwrap());
            let message = refused(&path, json!({ "Detach": true }).to_string().as_bytes());
            assert!(message.contains(&format!("etc/{file}")) && message.contains("too large"), "{message}");
            accepted("/containers/sleeper/kill");
            assert_eq!(must_answer("POST", "/containers/sleeper/wait", b"").0, 200);
            fs::write(layer.join("etc").join(file), contents).unwrap();
        }
        let peak = peak_memory(&engine);
        println!("dockerd's memory at its peak: {} MiB", peak >> 10);
        assert!(peak < MEMORY, "dockerd took {} MiB", peak >> 10);
    });
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn a_pipe_in_the_place_of_a_group_file_does_not_block_a_start() {
    GuestRoot::with(|_| {
        let _engine = start();
        create("sleeper", &["true"], &json!({}));
        let layer = state("sleeper")["GraphDriver"]["Data"]["UpperDir"].as_str().map(PathBuf::from).unwrap();
        fs::create_dir_all(layer.join("etc")).unwrap();
        assert!(Command::new("mkfifo").arg(layer.join("etc/group")).status().unwrap().success());
        let message = refused("/containers/sleeper/start", b"");
        assert!(message.contains("etc/group: not a regular file"), "{message}");
    });
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn an_empty_volume_of_type_tmpfs_gets_the_images_files() {
    GuestRoot::with(|_| {
        let _engine = start();
        let volume = json!({
            "Name": "filled", "Driver": "local", "DriverOpts": { "type": "tmpfs", "device": "tmpfs", "o": "mode=0700" }
        });
        assert_eq!(must_answer("POST", "/volumes/create", volume.to_string().as_bytes()).0, 201);
        // Holds the volume, which is empty where its image has nothing, and can follow links in it.
        create("holder", &["sleep", "600"], &json!({ "Binds": ["filled:/nothing"] }));
        accepted("/containers/holder/start");
        create("copied", &["true"], &json!({ "Binds": ["filled:/etc"] }));
        let volume = PathBuf::from(format!("/proc/{}/root/nothing", state("holder")["State"]["Pid"]));
        let passwd = fs::read_to_string(volume.join("passwd")).unwrap();
        assert!(passwd.starts_with("root:"), "{passwd}");
        let mode = |path: &str| Command::new("stat").args(["-c", "%a %u %g", path]).output().unwrap().stdout;
        let merged = state("holder")["GraphDriver"]["Data"]["MergedDir"].as_str().unwrap().to_owned();
        assert_eq!(mode(volume.to_str().unwrap()), mode(&format!("{merged}/etc")), "the directory's own mode");
        std::os::unix::fs::symlink("passwd", volume.join("link")).unwrap();
        assert_eq!(fs::read_to_string(volume.join("link")).unwrap(), passwd);
        accepted("/containers/holder/kill");
    });
}

/// An engine with the test image, outside of the jail, and with crun: isolation takes the guest's kernel. Without control
/// groups, as not every machine has all of the controllers that a container's limits are for.
fn start() -> Engine {
    GuestRoot::leave_network();
    let crun = json!({ "path": "/usr/bin/crun", "runtimeArgs": ["--cgroup-manager=disabled"] });
    imitate_vm(&json!({ "default-runtime": "crun", "runtimes": { "crun": crun } }));
    let engine = Engine::start(None);
    Engine::load_image();
    engine
}

fn create(name: &str, command: &[&str], host: &Value) {
    let mut body = json!({ "Image": "alpine", "Cmd": command, "HostConfig": host });
    body["HostConfig"]["NetworkMode"] = "none".into();
    let (status, answer) = must_answer("POST", &format!("/containers/create?name={name}"), body.to_string().as_bytes());
    assert_eq!(status, 201, "{name}: {}", String::from_utf8_lossy(&answer));
}

fn state(name: &str) -> Value {
    let (status, answer) = must_answer("GET", &format!("/containers/{name}/json"), b"");
    assert_eq!(status, 200);
    serde_json::from_slice(&answer).unwrap()
}

fn accepted(path: &str) {
    let (status, answer) = must_answer("POST", path, b"");
    assert_eq!(status, 204, "{path}: {}", String::from_utf8_lossy(&answer));
}

/// Sends a request that has to fail, and returns the message.
fn refused(path: &str, body: &[u8]) -> String {
    let (status, answer) = must_answer("POST", path, body);
    let message = String::from_utf8_lossy(&answer).into_owned();
    assert!(status >= 400, "{path}: {status} {message}");
    message
}

/// Makes a file of a hole, with a line in front of it.
fn dig(directory: &std::path::Path, name: &str) {
    fs::create_dir_all(directory).unwrap();
    let file = File::options().create(true).truncate(false).write(true).open(directory.join(name)).unwrap();
    file.write_all_at(b"root:x:0:0::/:/bin/sh\n", 0).unwrap();
    file.set_len(HOLE).unwrap();
}

/// The most memory that dockerd has had, in KiB.
fn peak_memory(engine: &Engine) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", engine.dockerd().as_raw_nonzero())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
