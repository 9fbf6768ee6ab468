//! Stops, starts and sudden deaths: synced data survives, nothing stale stays, the status is true.

use std::{
    fs::{self, File},
    time::Duration,
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use support::{
    client::{self, Events},
    engine::{Engine, ISOLATION, Isolation, START, STOP, engine, images, shell},
    home::{Home, OwnHome, empty_erofs, is_alive, pid},
    process::{COMMAND, poll, run},
    program,
};

/// Time for a death to be noticed.
const NOTICED: Duration = Duration::from_secs(30);

/// Kills a process that the status names; returns its id.
#[track_caller]
fn kill_hard(status: &Value, key: &str) -> u32 {
    let victim = pid(status, key).unwrap_or_else(|| panic!("no {key} in {status}"));
    kill(Pid::from_raw(victim.cast_signed()), Signal::SIGKILL).unwrap();
    victim
}

/// The processes are exactly the backend and the VM that the status names, and those of its network and directories.
#[track_caller]
fn assert_one_of_each_process(home: &Home) {
    let status = home.status();
    let named = [pid(&status, "backendPid").unwrap(), pid(&status, "vmmPid").unwrap()];
    let (known, others): (Vec<u32>, Vec<u32>) = home.processes().into_iter().partition(|pid| named.contains(pid));
    let mut verbs: Vec<_> = others
        .iter()
        .map(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default())
        .map(|line| String::from_utf8_lossy(line.split(|byte| *byte == 0).nth(1).unwrap_or_default()).into_owned())
        .collect();
    verbs.sort_unstable();
    assert_eq!((known.len(), verbs), (2, ["net", "share-server"].map(str::to_owned).to_vec()));
}

fn has_image_and_volume(engine: &Engine, volume: &str) -> bool {
    [format!("/volumes/{volume}"), "/images/alpine:latest/json".into()].iter().all(|path| engine.get(path).0 == 200)
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_dead_dockerd_is_started_again_and_the_status_says_so_meanwhile() {
    // Only without isolation does a container see the processes of the VM.
    let engine = engine(Isolation::Off);
    let events = Events::follow(&engine.home.control_socket());
    let before = events.until("the first event is the present state", NOTICED, |_| true);
    assert_eq!(before["state"], "running");
    let script = "echo kept | dd of=/v/file conv=fsync && kill -9 $(pidof dockerd) && sleep 3600";
    let arguments = ["run", "--rm", "--privileged", "--pid=host", "-v", "dockerd:/v", "alpine", "sh", "-c", script];
    // Its client sees the connection break.
    let ran = engine.docker(&arguments);
    assert!(!ran.status.success(), "{ran:?}");
    let down = events.until("the engine is down", NOTICED, |status| status["state"] != "running");
    assert_eq!((&down["state"], &down["waitingFor"]), (&"starting".into(), &"engine".into()), "{down}");
    assert!(down["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{down}");
    let up = events.until("the engine is up again", START, |status| status["state"] == "running");
    assert_eq!(pid(&up, "vmmPid"), pid(&before, "vmmPid"), "the VM was replaced");
    assert!(up.get("reason").is_none(), "{up}");
    engine.assert_answers();
    assert_eq!(engine.home.status()["state"], "running");
    assert_eq!(engine.read_back("dockerd"), "kept\n");
    engine.remove_containers();
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_killed_vm_is_reported_and_the_next_start_finds_what_was_synced() {
    let engine = engine(Isolation::Either);
    engine.write_durably("vmm", "kept\n");
    let status = engine.home.status();
    let events = Events::follow(&engine.home.control_socket());
    kill_hard(&status, "vmmPid");
    let failed = events.until("the VM's end is noticed", NOTICED, |status| status["state"] == "failed");
    assert_eq!(failed["reason"], "the vmm process was killed by signal 9 (SIGKILL)");
    assert!(failed.get("vmmPid").is_none() && failed.get("vm").is_none(), "{failed}");
    assert!(!failed["console"].as_array().unwrap().is_empty(), "a failed VM's last words are missing");
    assert_eq!(engine.home.status(), failed);
    assert!(!engine.home.runtime("vsock.sock").exists(), "the VM's socket is left");
    let (code, body) = engine.get("/_ping");
    assert_eq!(code, 503, "{body}");
    assert!(body.contains("engine is not running (state: failed, the vmm process was killed by signal 9"), "{body}");
    engine.write_settings(&[(ISOLATION, "true")]);
    engine.start();
    let started = engine.home.status();
    assert_eq!(pid(&started, "backendPid"), pid(&status, "backendPid"));
    assert_eq!(started["state"], "running");
    assert_one_of_each_process(engine.home);
    assert_eq!(engine.read_back("vmm"), "kept\n");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_killed_backend_takes_its_vm_along_and_the_next_start_takes_over() {
    let engine = engine(Isolation::Either);
    engine.write_durably("backend", "kept\n");
    let status = engine.home.status();
    let backend = kill_hard(&status, "backendPid");
    let vmm = pid(&status, "vmmPid").unwrap();
    poll("backend and VM are gone", NOTICED, || (!is_alive(backend) && !is_alive(vmm)).then_some(()));
    assert_eq!(engine.home.processes(), Vec::<u32>::new());
    let dead = engine.home.status();
    assert_eq!(dead["state"], "stopped");
    assert!(dead.get("backendPid").is_none() && dead.get("vmmPid").is_none(), "{dead}");
    let lock = File::open(engine.home.runtime("lock")).unwrap();
    drop(Flock::lock(lock, FlockArg::LockExclusiveNonblock).expect("the lock is held by nobody alive"));
    let refused = client::ask(&engine.home.docker_socket(), "GET", "/_ping").unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "{refused}");
    engine.write_settings(&[(ISOLATION, "true")]);
    engine.start();
    assert_one_of_each_process(engine.home);
    engine.assert_answers();
    assert_eq!(engine.read_back("backend"), "kept\n");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_stopped_engine_leaves_nothing_running_and_starts_with_its_images_and_volumes() {
    let engine = engine(Isolation::Either);
    engine.docker(&["volume", "create", "stays"]).ok();
    engine.sleeper();
    let printed = engine.home.bulkhead(&["stop"], STOP).ok();
    assert_eq!(printed.lines().last(), Some("stopped"));
    engine.home.assert_nothing_runs();
    let console = fs::read_to_string(engine.home.path("state/bulkhead/default/console.log")).unwrap();
    assert!(console.contains("going down"), "the guest was not asked: {console}");
    engine.start();
    assert!(has_image_and_volume(&engine, "stays"));
    let (code, body) = engine.get("/containers/sleeper/json");
    let container: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((code, &container["State"]["Running"]), (200, &false.into()), "{body}");
    // tini passes SIGTERM on: the engine had been stopped in order, not killed.
    assert_eq!(container["State"]["ExitCode"], 143, "{}", container["State"]);
    engine.remove_containers();
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_throw_away_engine_runs_one_command_where_it_was_called_and_leaves_nothing_behind() {
    let home = OwnHome(Home::new());
    let here = home.path("here");
    fs::create_dir_all(&here).unwrap();
    fs::write(here.join("file"), "of the host\n").unwrap();
    fs::write(here.join("variables"), "ANSWER=4 2\nDOCKER_HOST=tcp://192.0.2.1:1\n").unwrap();
    let script = format!(
        "test \"$ANSWER\" = '4 2' && grep -Fqx \"DOCKER_HOST=$DOCKER_HOST\" published &&
         docker load --quiet --input '{}/alpine.tar' &&
         docker run --rm -v \"$PWD\":/d alpine sh -c 'cat /d/file; echo x >/d/out; exit 7'",
        images().display()
    );
    let mut command = home.command(program());
    command.current_dir(&here).env("PWD", &here);
    command.args(["run", "--quiet", "--timeout", "220", "--env-file", "variables", "--publish-env", "published"]);
    command.args(["--", "sh", "-c", &script]);
    let ran = run(command, START + COMMAND);
    assert_eq!(ran.status.code(), Some(7), "{}", ran.stderr);
    assert_eq!(ran.stdout, "Loaded image: alpine:latest\nof the host\n");
    assert_eq!(fs::read_to_string(here.join("out")).unwrap(), "x\n");
    assert_eq!(home.processes(), Vec::<u32>::new());
    for directory in ["config", "data", "state", "run"] {
        let left: Vec<_> =
            fs::read_dir(home.path(directory).join("bulkhead")).into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "{directory}: {left:?}");
    }
    assert_eq!(fs::read_dir(home.path("docker")).unwrap().count(), 0, "docker's configuration was touched");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_guest_that_panics_is_a_failed_start_with_the_consoles_tail() {
    let home = OwnHome(Home::new());
    let rootfs = home.path("rootfs.erofs");
    fs::write(&rootfs, empty_erofs()).unwrap();
    let kernel = kernel(&home);
    let arguments = ["start", "--timeout", "100", "--kernel", &kernel, "--rootfs", rootfs.to_str().unwrap()];
    let message = home.bulkhead(&arguments, START).refused();
    assert!(message.ends_with("error: the guest kernel panicked\n"), "{message}");
    assert!(
        message.starts_with("last lines of the guest's console:\n") && message.contains("Kernel panic"),
        "{message}"
    );
    let status = home.status();
    assert_eq!((&status["state"], &status["reason"]), (&"failed".into(), &"the guest kernel panicked".into()));
    let console = status["console"].to_string();
    assert!(console.contains("Unable to mount root fs"), "{console}");
    assert!(home.bulkhead(&["stop"], STOP).ok().contains("stopped"));
    home.assert_nothing_runs();
}

/// The kernel of the image that is used.
fn kernel(home: &Home) -> String {
    let cache = std::env::var("XDG_CACHE_HOME").unwrap_or_else(|_| std::env::var("HOME").unwrap() + "/.cache");
    let found = shell(home, &format!("readlink -e '{cache}/bulkhead/image/current/vmlinux'"), COMMAND).ok();
    found.trim().to_owned()
}
