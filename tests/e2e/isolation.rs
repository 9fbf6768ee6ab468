//! The figures and refusals of Enhanced Container Isolation, in the documented words.

use std::{fs, thread};

use serde_json::Value;
use support::{
    client,
    engine::{Engine, ISOLATION, Isolation, engine},
    home::pid,
    process::{COMMAND, run},
};

const FIRST_RANGE: &str = "         0     100000      65536\n";
const SECOND_RANGE: &str = "         0     165536      65536\n";
const ALL_IDS: &str = "         0          0 4294967295\n";

/// The runtime that a container really has.
fn runtime(engine: &Engine, container: &str) -> String {
    engine.docker(&["inspect", "--format={{.HostConfig.Runtime}}", container]).ok().trim().to_owned()
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn each_of_two_containers_has_a_range_of_ids_of_its_own() {
    let engine = engine(Isolation::On);
    engine.remove_containers();
    let first = ["run", "--detach", "--init", "--name=first", "alpine", "sleep", "3600"];
    engine.docker(&first).ok();
    assert_eq!(engine.docker(&["exec", "first", "cat", "/proc/self/uid_map"]).ok(), FIRST_RANGE);
    let second = engine.docker(&["run", "--rm", "alpine", "cat", "/proc/self/uid_map", "/proc/self/gid_map"]).ok();
    assert_eq!(second, format!("{SECOND_RANGE}{SECOND_RANGE}"));
    assert_eq!(runtime(&engine, "first"), "sysbox-runc");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn another_runtime_and_the_hosts_user_namespace_are_ignored() {
    let engine = engine(Isolation::On);
    // The range of a container that is gone is given to the next.
    engine.remove_containers();
    let arguments = ["run", "--name=other", "--runtime=runc", "--userns=host", "alpine", "cat", "/proc/self/uid_map"];
    assert_eq!(engine.docker(&arguments).ok(), FIRST_RANGE);
    assert_eq!(runtime(&engine, "other"), "sysbox-runc");
    // The container as it runs is seen by a client that looks for itself, too.
    let (_, body) = engine.get("/containers/other/json");
    let container: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(container["HostConfig"]["Runtime"], "sysbox-runc");
    engine.remove_containers();
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn the_hosts_namespaces_are_refused_with_the_documented_texts() {
    const WHY: &str = "with the host (because they use the linux user-namespace for isolation)";
    let engine = engine(Isolation::On);
    let cases = ["pid", "ipc", "uts", "network"].map(|namespace| {
        let shared = match namespace {
            "network" => "a network namespace".to_owned(),
            other => format!("namespaces [{other}]"),
        };
        let command = engine.home.docker_command(&["run", "--rm", &format!("--{namespace}=host"), "alpine", "true"]);
        let text = format!(
            "OCI runtime create failed: error in the container spec: invalid or unsupported container spec: \
             sysbox containers can't share {shared} {WHY}: unknown"
        );
        (text, thread::spawn(move || run(command, COMMAND)))
    });
    for (text, ran) in cases {
        let message = ran.join().unwrap().fails(125);
        assert!(message.contains(&text), "expected: {text}\nsaid: {message}");
    }
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn mounts_of_the_engines_socket_are_refused() {
    let engine = engine(Isolation::On);
    let before = engine.containers();
    let on_host = engine.home.docker_socket();
    for mount in [
        ["-v", "/var/run/docker.sock:/var/run/docker.sock"],
        ["-v", &format!("{}:/var/run/docker.sock", on_host.display())],
        ["--mount", "type=bind,source=/run/docker.sock,target=/s"],
        ["-v", "/run:/host"],
        ["-v", "/var/run:/host:ro"],
    ] {
        let message = engine.docker(&["run", "--rm", mount[0], mount[1], "alpine", "true"]).fails(125);
        let text = "Error response from daemon: enhanced container isolation: docker socket mount denied for container \
                    with image \"docker.io/library/alpine\"; image is not in the allowed list; if you wish to allow \
                    it, configure the docker socket image list in the Docker Desktop settings.";
        assert!(message.contains(text), "{mount:?}: {message}");
    }
    assert_eq!(engine.containers(), before, "a refused container was made");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn mounts_of_the_vms_own_files_are_refused() {
    let engine = engine(Isolation::On);
    let mount = "/etc/docker/daemon.json:/mnt/daemon.json";
    let message = engine.docker(&["run", "--rm", "-v", mount, "alpine", "cat", "/mnt/daemon.json"]).fails(125);
    let text = "OCI runtime create failed: error in the container spec: can't mount /etc/docker/daemon.json because \
                it's configured as a restricted host mount: unknown";
    assert!(message.contains(text), "{message}");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn steps_of_a_build_run_in_a_user_namespace() {
    let engine = engine(Isolation::On);
    let directory = engine.home.path("build");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("Dockerfile"), "FROM alpine\nRUN cat /proc/self/uid_map\n").unwrap();
    let mut command = engine.home.docker_command(&["build", "--no-cache", "--rm", directory.to_str().unwrap()]);
    command.env("DOCKER_BUILDKIT", "0");
    let output = run(command, COMMAND).ok();
    let map = output.lines().find(|line| line.ends_with(" 65536")).unwrap_or_else(|| panic!("no uid_map: {output}"));
    let ids: Vec<u32> = map.split_whitespace().map(|id| id.parse().unwrap()).collect();
    assert!(ids.len() == 3 && ids[0] == 0 && ids[1] >= 100_000 && ids[2] == 65536, "{map}");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn without_isolation_containers_run_under_runc_and_share_all_ids() {
    let engine = engine(Isolation::On);
    let before = engine.home.status();
    engine.run_with(&[(ISOLATION, "false")]);
    let after = engine.home.status();
    assert_eq!(after["vm"]["enhancedContainerIsolation"], false, "a restart reads the settings again");
    assert_eq!(pid(&after, "backendPid"), pid(&before, "backendPid"), "a restart keeps the backend");
    assert_ne!(pid(&after, "vmmPid"), pid(&before, "vmmPid"), "a restart makes a fresh VM");
    assert_eq!(engine.docker(&["run", "--name=open", "alpine", "cat", "/proc/self/uid_map"]).ok(), ALL_IDS);
    assert_eq!(runtime(&engine, "open"), "runc");
    let socket = engine.home.docker_socket();
    assert_eq!(client::ask(&socket, "DELETE", "/containers/open").unwrap().0, 204);
}
