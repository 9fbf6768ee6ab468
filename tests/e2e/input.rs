//! Bad input where KVM would run the guest: one clear line, and nothing hangs.

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::{PermissionsExt, chown},
    time::Duration,
};

use support::{
    client::connect,
    engine::{Isolation, STOP, engine, shell},
    home::{Home, OwnHome, empty_erofs},
    process::{COMMAND, run},
    program,
};

/// Time for a refusal.
const REFUSAL: Duration = Duration::from_secs(30);

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_second_start_says_that_the_engine_runs_already() {
    let engine = engine(Isolation::Either);
    let before = engine.home.status();
    assert_eq!(engine.home.bulkhead(&["start"], REFUSAL).ok(), "the engine is already running\n");
    let asked = engine.home.bulkhead(&["start", "--cpus", "1"], REFUSAL);
    assert!(asked.stderr.starts_with("warning: the VM already exists"), "{asked:?}");
    assert_eq!(asked.ok(), "the engine is already running\n");
    assert_eq!(engine.home.status(), before);
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn garbage_on_any_socket_does_not_disturb_a_running_engine() {
    let engine = engine(Isolation::Either);
    for socket in ["control.sock", "docker.sock", "vsock.sock"] {
        for garbage in [&b"garbage\r\n\r\n"[..], b"\0\xff\xfe\n\n", b"CONNECT -1\n", b"CONNECT 99999999999\n"] {
            let mut stream = connect(&engine.home.runtime(socket)).unwrap();
            let _ = stream.write_all(garbage);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let mut answer = Vec::new();
            // Refused or closed; both are an end.
            let ended = stream.read_to_end(&mut answer);
            let waited = ended.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
            assert!(!waited, "{socket} did not end after {garbage:?}");
            let answer = String::from_utf8_lossy(&answer);
            assert!(!answer.contains(" 200 ") && !answer.starts_with("OK "), "{socket}: {garbage:?}: {answer}");
        }
    }
    engine.assert_answers();
    assert_eq!(engine.home.status()["state"], "running");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn an_unknown_profile_is_refused_beside_a_running_one() {
    let engine = engine(Isolation::Either);
    let message = engine.home.bulkhead(&["--profile", "nowhere", "stop"], REFUSAL).refused();
    assert!(message.contains("no profile `nowhere`"), "{message}");
    engine.assert_answers();
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_missing_and_a_truncated_image_are_refused() {
    let home = OwnHome(Home::new());
    let with = |cache: &str| {
        let mut command = home.command(program());
        command.arg("start").env("XDG_CACHE_HOME", home.path(cache));
        run(command, REFUSAL)
    };
    let missing = with("empty").refused();
    assert!(missing.contains("no guest image found") && missing.contains("scripts/image"), "{missing}");
    let cache = std::env::var("XDG_CACHE_HOME").unwrap_or_else(|_| std::env::var("HOME").unwrap() + "/.cache");
    let cut = home.path("cut/bulkhead/image");
    let line = format!(
        "mkdir -p '{0}/1' && ln -s 1 '{0}/current' && cp -L '{cache}'/bulkhead/image/current/* '{0}/1/' && \
         truncate --size=-4096 '{0}/1/rootfs.erofs'",
        cut.display()
    );
    shell(&home, &line, COMMAND).ok();
    let truncated = with("cut").refused();
    assert!(truncated.contains("rootfs.erofs has ") && truncated.contains("manifest says"), "{truncated}");
    // Without a manifest the file system itself knows how long it is.
    fs::remove_file(cut.join("1/manifest.json")).unwrap();
    assert!(with("cut").refused().contains("rootfs.erofs is truncated"));
    assert_eq!(home.processes(), Vec::<u32>::new());
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_kernel_with_nothing_in_it_is_a_failed_start() {
    let home = OwnHome(Home::new());
    let (kernel, rootfs) = (home.path("vmlinux"), home.path("rootfs.erofs"));
    let mut header = vec![0; 64];
    header[..6].copy_from_slice(b"\x7fELF\x02\x01");
    header[18] = 62;
    fs::write(&kernel, header).unwrap();
    fs::write(&rootfs, empty_erofs()).unwrap();
    let arguments = ["start", "--kernel", kernel.to_str().unwrap(), "--rootfs", rootfs.to_str().unwrap()];
    let message = home.bulkhead(&arguments, REFUSAL).refused();
    assert!(message.contains("kernel"), "{message}");
    let status = home.status();
    assert_eq!(status["state"], "failed");
    assert!(message.contains(status["reason"].as_str().unwrap()), "{message}: {status}");
    assert!(home.bulkhead(&["stop"], STOP).ok().contains("stopped"));
    home.assert_nothing_runs();
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn more_memory_than_the_machine_has_is_refused() {
    let home = OwnHome(Home::new());
    let message = home.bulkhead(&["start", "--memory", "900T"], REFUSAL).refused();
    assert!(message.contains("but this machine has"), "{message}");
    assert_eq!(home.processes(), Vec::<u32>::new());
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_full_disk_is_refused() {
    if !is_root() {
        // Only root may mount a small file system.
        return;
    }
    let home = OwnHome(Home::new());
    let data = home.path("data").display().to_string();
    shell(&home, &format!("mount -t tmpfs -o size=4m tmpfs '{data}'"), COMMAND).ok();
    let refused = std::panic::catch_unwind(|| home.bulkhead(&["start"], REFUSAL).refused());
    shell(&home, &format!("umount '{data}'"), COMMAND).ok();
    let message = refused.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    assert!(message.contains("MiB free") && message.contains("free some space"), "{message}");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_person_without_access_to_kvm_is_told_the_group_and_the_command() {
    if !is_root() {
        // Only root can be somebody else.
        return;
    }
    let home = OwnHome(Home::new());
    // The program's own directory may be closed to others.
    let copy = home.path("bulkhead");
    fs::copy(program(), &copy).unwrap();
    fs::set_permissions(home.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    for directory in ["", "config", "data", "state", "run", "docker"] {
        chown(home.path(directory), Some(65534), Some(65534)).unwrap();
    }
    let mut command = home.command("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]).arg(copy).arg("start");
    let message = run(command, REFUSAL).refused();
    assert!(message.contains("/dev/kvm may not be opened") && message.contains("sudo usermod -aG kvm"), "{message}");
}
