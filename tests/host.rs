//! The real program, as far as it goes without a VM: profiles, locks, sockets, bad input, the docker context.

// A helper of a test that cannot go on shall panic, as the test itself does.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

/// XDG folders of their own for one test.
struct Home {
    folder: tempfile::TempDir,
}

impl Home {
    fn new() -> Self {
        let home = Self { folder: tempfile::Builder::new().prefix("bh").tempdir().unwrap() };
        for name in ["config", "data", "state", "cache", "run", "docker"] {
            fs::create_dir(home.path(name)).unwrap();
        }
        home
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn runtime(&self, name: &str) -> PathBuf {
        self.path("run/bulkhead/default").join(name)
    }

    /// A command with this home's environment.
    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env("HOME", self.folder.path())
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("XDG_DATA_HOME", self.path("data"))
            .env("XDG_STATE_HOME", self.path("state"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("DOCKER_CONFIG", self.path("docker"))
            .env_remove("DOCKER_HOST")
            .env_remove("DOCKER_CONTEXT")
            .env_remove("BULKHEAD_KERNEL")
            .env_remove("BULKHEAD_ROOTFS")
            .env_remove("BULKHEAD_TRY_ANY_KVM")
            .stdin(Stdio::null());
        command
    }

    fn bulkhead(&self, arguments: &[&str]) -> Output {
        self.command(program()).args(arguments).output().unwrap()
    }

    /// A backend in the foreground that listens.
    fn backend(&self) -> Backend {
        let mut child =
            self.command(program()).arg("backend").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("{\"ready\":"), "{line}");
        Backend { child }
    }

    fn status(&self) -> Value {
        let output = self.bulkhead(&["status", "--format", "json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn control(&self) -> UnixStream {
        let stream = UnixStream::connect(self.runtime("control.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Sends bytes and returns all that comes back.
    fn ask(&self, bytes: &[u8]) -> String {
        let mut stream = self.control();
        // A server that has seen enough may close before it has read all.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn post(&self, path: &str, body: &str) -> String {
        self.ask(
            format!(
                "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        )
    }
}

fn program() -> &'static str {
    env!("CARGO_BIN_EXE_bulkhead")
}

/// Killed when a test ends before it was stopped.
struct Backend {
    child: Child,
}

impl Backend {
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn wait(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the backend does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One line that begins with `error:`, and the exit status.
#[track_caller]
fn refused(output: &Output, code: i32) -> String {
    let message = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert!(message.starts_with("error: ") && message.trim_end().lines().count() == 1, "{message}");
    message
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[test]
fn a_second_backend_for_the_same_profile_is_refused_and_the_first_goes_on() {
    let home = Home::new();
    let first = home.backend();
    let message = refused(&home.bulkhead(&["backend", "--launched"]), 1);
    assert!(message.contains(&format!("already running (process {})", first.child.id())), "{message}");
    assert_eq!(home.status()["backendPid"], first.child.id());
}

#[test]
fn a_backend_begins_although_an_ending_one_removes_the_runtime_folder() {
    let home = Home::new();
    let folder = home.runtime("");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = fs::remove_dir(&folder);
            }
        });
        let outcomes: Vec<_> = (0..20)
            .map(|_| {
                // It ends with its standard input, a pipe that is closed at once.
                let mut backend = home.command(program());
                backend.args(["backend", "--throw-away"]).stdin(Stdio::piped()).stderr(Stdio::null());
                String::from_utf8(backend.output().unwrap().stdout).unwrap()
            })
            .collect();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        for line in outcomes {
            assert!(line.starts_with("{\"ready\":"), "{line}");
        }
    });
}

#[test]
fn a_second_runtime_folder_does_not_give_the_same_data_a_second_backend() {
    let home = Home::new();
    let _first = home.backend();
    let other = home.path("other");
    fs::create_dir(&other).unwrap();
    let output =
        home.command(program()).args(["backend", "--launched"]).env("XDG_RUNTIME_DIR", other).output().unwrap();
    assert!(refused(&output, 1).contains("different XDG_RUNTIME_DIR"));
}

#[test]
fn a_stopped_backend_leaves_no_socket_lock_or_context() {
    let home = Home::new();
    let mut backend = home.backend();
    assert_eq!(fs::metadata(home.runtime("control.sock")).unwrap().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(home.runtime("")).unwrap().mode() & 0o777, 0o700);
    let output = home.bulkhead(&["stop"]);
    assert!(output.status.success(), "{output:?}");
    assert!(backend.wait().success());
    assert!(!home.runtime("").exists());
    assert!(fs::read_dir(home.path("docker/contexts/meta")).unwrap().next().is_none());
    assert_eq!(home.status()["state"], "stopped");
    let again = home.bulkhead(&["stop"]);
    assert!(again.status.success() && String::from_utf8_lossy(&again.stdout).contains("not running"));
}

#[test]
fn a_killed_backend_is_reported_as_stopped_and_the_next_one_takes_over_its_sockets() {
    let home = Home::new();
    home.backend().kill();
    assert!(home.runtime("control.sock").exists() && home.runtime("lock").exists());
    assert_eq!(home.status()["state"], "stopped");
    let next = home.backend();
    assert_eq!(home.status()["backendPid"], next.child.id());
}

#[test]
fn sigterm_ends_the_backend_in_order() {
    let home = Home::new();
    let mut backend = home.backend();
    let pid = nix::unistd::Pid::from_raw(backend.child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(backend.wait().success());
    assert!(!home.runtime("lock").exists());
}

#[test]
fn garbage_on_the_control_socket_is_answered_with_400_and_does_no_harm() {
    let home = Home::new();
    let _backend = home.backend();
    for garbage in [&b"garbage\r\n\r\n"[..], b"\0\xff\xfe\r\n\r\n", b"GET /v1/status HTTP/9.9\r\n\r\n"] {
        let answer = home.ask(garbage);
        assert!(answer.starts_with("HTTP/1.1 400"), "{garbage:?}: {answer}");
    }
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(100_000));
    assert!(home.ask(long.as_bytes()).starts_with("HTTP/1.1 4"));
    for body in ["garbage", "[]", "{\"unknown\": 1}", "{\"cpus\": -1}", "{\"cpus\": \"many\"}"] {
        let answer = home.post("/v1/start", body);
        assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("\"message\""), "{body}: {answer}");
    }
    let answer = home.post("/v1/start", &"x".repeat(100_000));
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert!(home.post("/v1/status", "").starts_with("HTTP/1.1 405"));
    assert!(home.post("/v2/start", "").starts_with("HTTP/1.1 404"));
    assert_eq!(home.status()["state"], "stopped");
}

#[test]
fn a_client_that_sends_half_a_request_is_dropped_and_others_are_served_meanwhile() {
    let home = Home::new();
    let _backend = home.backend();
    let mut half: Vec<UnixStream> = (0..10).map(|_| home.control()).collect();
    for (index, stream) in half.iter_mut().enumerate() {
        let text = if index % 2 == 0 { "GET /v1/st" } else { "POST /v1/stop HTTP/1.1\r\nContent-Length: 9\r\n\r\n{" };
        stream.write_all(text.as_bytes()).unwrap();
    }
    assert_eq!(home.status()["state"], "stopped");
    for mut stream in half {
        let mut answer = Vec::new();
        let begun = Instant::now();
        let _ = stream.read_to_end(&mut answer);
        assert!(begun.elapsed() < Duration::from_secs(15));
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&answer));
    }
    assert_eq!(home.status()["state"], "stopped");
}

#[test]
fn events_begin_with_the_present_state_and_end_with_the_backend() {
    let home = Home::new();
    let mut backend = home.backend();
    let mut stream = home.control();
    stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    while !line.starts_with('{') {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0, "no event");
    }
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["state"], "stopped");
    assert!(home.bulkhead(&["stop"]).status.success());
    reader.read_to_string(&mut line).unwrap();
    assert!(backend.wait().success());
}

#[test]
fn a_docker_client_is_told_that_the_engine_is_not_running() {
    let home = Home::new();
    let _backend = home.backend();
    let mut stream = UnixStream::connect(home.runtime("docker.sock")).unwrap();
    stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 503"), "{answer}");
    let expected = "Bulkhead's engine is not running (state: stopped); run `bulkhead start`";
    assert_eq!(serde_json::from_str::<Value>(body).unwrap(), json!({ "message": expected }));
}

#[test]
fn without_a_vm_no_port_is_published_with_and_without_a_backend() {
    let home = Home::new();
    let ports = |arguments: &[&str]| {
        let output = home.bulkhead(&[&["ports"], arguments].concat());
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let nothing = || {
        assert_eq!(ports(&[]), "no port is published\n");
        let answer: Value = serde_json::from_str(&ports(&["--format", "json"])).unwrap();
        assert_eq!(answer, json!({"ports": []}));
    };
    nothing();
    let _backend = home.backend();
    nothing();
    let answer = home.post("/v1/ports", "");
    assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("allow: GET"), "{answer}");
}

#[test]
fn an_unknown_profile_is_refused_by_every_verb_that_needs_one() {
    let home = Home::new();
    for verb in [&["stop"][..], &["status"], &["ports"], &["logs"], &["restart"], &["settings", "list"]] {
        let arguments = [&["--profile", "nowhere"], verb].concat();
        let message = refused(&home.bulkhead(&arguments), 1);
        assert!(message.contains("no profile `nowhere`"), "{message}");
    }
    assert!(fs::read_dir(home.path("config")).unwrap().next().is_none());
    assert_eq!(home.bulkhead(&["--profile", "../etc", "status"]).status.code(), Some(2));
}

#[test]
fn settings_are_kept_per_profile_and_wrong_values_are_refused() {
    let home = Home::new();
    let get = |profile: &str, key: &str| {
        let output = home.bulkhead(&["--profile", profile, "settings", "get", key]);
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(get("default", "enhancedContainerIsolation"), "true");
    assert!(home.bulkhead(&["settings", "set", "enhancedContainerIsolation", "false"]).status.success());
    assert!(home.bulkhead(&["--profile", "ci", "settings", "set", "cpus", "4"]).status.success());
    assert_eq!(get("default", "enhancedContainerIsolation"), "false");
    assert_eq!(get("ci", "enhancedContainerIsolation"), "true");
    assert_eq!(get("ci", "cpus"), "4");
    assert_eq!(get("default", "cpus"), "auto");
    let file = home.path("config/bulkhead/default/settings.json");
    assert_eq!(fs::read_to_string(&file).unwrap(), "{\n  \"enhancedContainerIsolation\": false\n}\n");
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
    for (key, value) in [("cpus", "0"), ("cpus", "many"), ("memoryMiB", "8G"), ("enhancedContainerIsolation", "yes")] {
        assert!(refused(&home.bulkhead(&["settings", "set", key, value]), 1).contains(key));
    }
    assert!(refused(&home.bulkhead(&["settings", "set", "nothing", "1"]), 1).contains("no setting `nothing`"));
    assert!(home.bulkhead(&["settings", "unset", "enhancedContainerIsolation"]).status.success());
    assert_eq!(get("default", "enhancedContainerIsolation"), "true");
    fs::write(&file, "{").unwrap();
    assert!(refused(&home.bulkhead(&["settings", "list"]), 1).contains("settings.json is not a JSON object"));
}

/// As [`Home::bulkhead`], with a KVM that this machine may not have.
fn with_any_kvm(home: &Home, arguments: &[&str]) -> Option<Output> {
    fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").ok()?;
    Some(home.command(program()).args(arguments).env("BULKHEAD_TRY_ANY_KVM", "1").output().unwrap())
}

fn put_image(home: &Home) {
    let folder = home.path("data/bulkhead/image");
    fs::create_dir_all(&folder).unwrap();
    let mut kernel = vec![0; 64];
    kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
    kernel[18] = 62;
    let mut rootfs = vec![0; 4096];
    rootfs[1024..1028].copy_from_slice(&0xE0F5_E1E2_u32.to_le_bytes());
    rootfs[1036] = 12;
    rootfs[1060] = 1;
    fs::write(folder.join("vmlinux"), &kernel).unwrap();
    fs::write(folder.join("rootfs.erofs"), &rootfs).unwrap();
    let files = json!({
        "vmlinux": { "size": kernel.len(), "sha256": "0" },
        "rootfs.erofs": { "size": rootfs.len(), "sha256": "0" },
    });
    fs::write(folder.join("manifest.json"), json!({ "version": "1", "files": files }).to_string()).unwrap();
}

#[test]
fn start_without_an_image_names_the_folders_and_the_command_that_builds_it() {
    let home = Home::new();
    let Some(output) = with_any_kvm(&home, &["start"]) else { return };
    let message = refused(&output, 1);
    assert!(message.contains("no guest image found") && message.contains("scripts/image"), "{message}");
    assert!(!home.runtime("").exists());
}

#[test]
fn start_with_a_truncated_image_names_the_file() {
    let home = Home::new();
    put_image(&home);
    fs::write(home.path("data/bulkhead/image/rootfs.erofs"), "short").unwrap();
    let Some(output) = with_any_kvm(&home, &["start"]) else { return };
    assert!(refused(&output, 1).contains("rootfs.erofs has 5 bytes where its manifest says 4096"));
}

#[test]
fn start_with_more_memory_than_the_machine_has_is_refused() {
    let home = Home::new();
    put_image(&home);
    let Some(output) = with_any_kvm(&home, &["start", "--memory", "900T"]) else { return };
    assert!(refused(&output, 1).contains("but this machine has"));
}

#[test]
fn start_with_a_smaller_disk_than_exists_is_refused() {
    let home = Home::new();
    put_image(&home);
    let folder = home.path("data/bulkhead/default");
    fs::create_dir_all(&folder).unwrap();
    fs::File::create(folder.join("data.img")).unwrap().set_len(9 << 30).unwrap();
    let Some(output) = with_any_kvm(&home, &["start", "--disk", "8G"]) else { return };
    assert!(refused(&output, 1).contains("never shrinks"));
}

#[test]
fn a_policy_file_is_checked_with_the_place_of_what_is_wrong() {
    let home = Home::new();
    let file = home.path("policy.json");
    let validate = |text: &str| {
        fs::write(&file, text).unwrap();
        home.bulkhead(&["policy", "validate", file.to_str().unwrap()])
    };
    let good = validate(
        r#"{"configurationFileVersion": 2, "enhancedContainerIsolation": {"value": true, "locked": true},
            "analyticsEnabled": {"value": false, "locked": true}}"#,
    );
    assert!(good.status.success(), "{good:?}");
    let warning = String::from_utf8_lossy(&good.stderr).into_owned();
    assert_eq!(warning, "warning: the key analyticsEnabled is not known and is ignored\n");
    for (text, place) in [
        ("{\n  \"proxy\": }", "line 2 column 12"),
        (r#"{"enhancedContainerIsolation": {"value": "on", "locked": true}}"#, "enhancedContainerIsolation.value: "),
        (r#"{"linuxVM": {"vpnkitCIDR": {"value": "8.8.8.0/24", "locked": true}}}"#, "linuxVM.vpnkitCIDR.value: "),
    ] {
        assert!(refused(&validate(text), 1).contains(place), "{text}");
    }
    let pipe = home.path("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let message = refused(&home.bulkhead(&["policy", "validate", pipe.to_str().unwrap()]), 1);
    assert!(message.contains("no regular file"), "{message}");
}

#[test]
fn the_schema_of_the_policy_is_printed_as_it_is_in_docs() {
    let output = Home::new().bulkhead(&["policy", "schema"]);
    let shipped = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/admin-settings.schema.json")).unwrap();
    assert!(output.status.success() && output.stdout == shipped);
}

#[test]
fn network_settings_that_cannot_be_are_refused_with_what_can_be_and_without_passwords() {
    let home = Home::new();
    for (key, value, expected) in [
        ("network", "bridge", "user, none, passt or tap=NAME"),
        ("network", "tap=", "tap=NAME"),
        ("network", "tap=a/../b", "tap=NAME"),
        ("vpnkitCIDR", "8.8.8.0/24", "a private IPv4 network of 16 to 28 bits"),
        ("vpnkitCIDR", "172.17.0.0/16", "172.17.0.0/16, which is the engine's"),
        ("vpnkitCIDR", "192.168.65.7/24", "by its first address"),
        ("hostLoopback", "maybe", "true or false"),
        ("proxyHttpMode", "pac", "system or manual"),
        ("overrideProxyHttp", "http://me:s3cret@proxy:99999", "http://proxy.example.org:3128"),
        ("overrideProxyHttps", "gopher://me:s3cret@proxy", "http://proxy.example.org:3128"),
        ("overrideProxyExclude", "a b", "with commas between"),
    ] {
        let message = refused(&home.bulkhead(&["settings", "set", key, value]), 1);
        assert!(message.contains(key) && message.contains(expected), "{message}");
        assert!(!message.contains("s3cret"), "{message}");
    }
    assert!(!home.path("config/bulkhead/default/settings.json").exists());
}

#[test]
fn a_proxys_password_is_printed_only_when_it_is_asked_for_by_name() {
    let home = Home::new();
    let proxy = "http://me:s3cret@proxy.example.org:3128";
    assert!(home.bulkhead(&["settings", "set", "overrideProxyHttp", proxy]).status.success());
    for arguments in [&["settings", "list"][..], &["settings", "list", "--format", "json"]] {
        let text = String::from_utf8(home.bulkhead(arguments).stdout).unwrap();
        assert!(text.contains("http://***@proxy.example.org:3128") && !text.contains("s3cret"), "{text}");
    }
    let one = home.bulkhead(&["settings", "get", "overrideProxyHttp"]).stdout;
    assert_eq!(String::from_utf8(one).unwrap().trim_end(), proxy);
    let file = home.path("config/bulkhead/default/settings.json");
    assert_eq!(fs::metadata(file).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn start_with_a_network_that_is_not_there_says_how_to_get_it() {
    let home = Home::new();
    put_image(&home);
    let Some(output) = with_any_kvm(&home, &["start", "--net", "tap=bh-missing"]) else { return };
    let message = refused(&output, 1);
    assert!(message.contains("ip tuntap add bh-missing mode tap user $USER"), "{message}");
    let Some(output) = with_any_kvm(&home, &["start", "--net", "tap=lo"]) else { return };
    assert!(refused(&output, 1).contains("`lo` is no tap device"));
    let mut command = home.command(program());
    command.env("PATH", home.path("bin")).env("BULKHEAD_TRY_ANY_KVM", "1").args(["start", "--net", "passt"]);
    let message = refused(&command.output().unwrap(), 1);
    assert!(message.contains("no `passt` in PATH"), "{message}");
}

#[test]
fn a_wrong_command_line_is_status_2() {
    let home = Home::new();
    for arguments in [
        &["start", "--cpus", "0"][..],
        &["start", "--memory", "8"],
        &["start", "--kernel", "/x"],
        &["frob"],
        &["start", "--net", "bridge"],
        &["run", "--net", "tap=a b", "--", "true"],
    ] {
        assert_eq!(home.bulkhead(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

/// Runs the program as a user who may open nothing.
fn as_nobody(home: &Home, arguments: &[&str]) -> Option<Output> {
    if !is_root() || fs::metadata("/dev/kvm").ok()?.permissions().mode() & 0o006 == 0o006 {
        return None;
    }
    // The program's own folder may be closed to others.
    let copy = home.path("bulkhead");
    fs::copy(program(), &copy).unwrap();
    for folder in ["", "config", "data", "state", "cache", "run", "docker"] {
        std::os::unix::fs::chown(home.path(folder), Some(65534), Some(65534)).unwrap();
    }
    let mut command = home.command("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]).arg(copy).args(arguments);
    command.output().ok()
}

#[test]
fn an_unreadable_kvm_is_refused_with_the_group_and_the_command() {
    let home = Home::new();
    let Some(output) = as_nobody(&home, &["start"]) else { return };
    let message = refused(&output, 1);
    assert!(message.contains("/dev/kvm may not be opened") && message.contains("sudo usermod -aG"), "{message}");
    let Some(doctor) = as_nobody(&home, &["doctor"]) else { return };
    let text = String::from_utf8(doctor.stdout).unwrap();
    assert_eq!(doctor.status.code(), Some(1));
    assert!(text.starts_with("1 FAIL /dev/kvm: ") && text.contains("belongs to the group"), "{text}");
}

#[test]
fn a_throw_away_profile_leaves_nothing_when_its_engine_cannot_start() {
    let home = Home::new();
    refused(&home.bulkhead(&["run", "--timeout", "5", "--", "true"]), 125);
    for folder in ["data", "state", "run", "config"] {
        let profiles = fs::read_dir(home.path(folder).join("bulkhead")).into_iter().flatten();
        assert_eq!(profiles.count(), 0, "{folder}");
    }
}

#[test]
fn the_shell_command_of_env_points_to_the_socket() {
    let home = Home::new();
    let output = home.bulkhead(&["env"]);
    let script = format!("{}\nprintf %s \"$DOCKER_HOST\"", String::from_utf8(output.stdout).unwrap());
    let value = Command::new("sh").args(["-c", &script]).output().unwrap().stdout;
    assert_eq!(String::from_utf8(value).unwrap(), format!("unix://{}", home.runtime("docker.sock").display()));
}

#[test]
fn a_socket_path_that_is_too_long_is_refused() {
    let home = Home::new();
    let long = home.path(&"x".repeat(100));
    let output = home.command(program()).arg("status").env("XDG_RUNTIME_DIR", long).output().unwrap();
    assert!(refused(&output, 1).contains("more than the 107 that Linux allows"));
}

/// The JSON of `docker context inspect`, or `None` without such a context.
fn inspect(home: &Home, name: &str) -> Option<Value> {
    let output = home.command("docker").args(["context", "inspect", name]).output().unwrap();
    output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
}

fn has_docker() -> bool {
    Command::new("docker").arg("--version").output().is_ok_and(|output| output.status.success())
}

#[test]
fn the_docker_command_finds_the_context_while_the_backend_runs() {
    if !has_docker() {
        return;
    }
    let home = Home::new();
    let show = || home.command("docker").args(["context", "show"]).output().unwrap().stdout;
    let before = show();
    let mut backend = home.backend();
    let context = inspect(&home, "bulkhead").expect("no context");
    let host = format!("unix://{}", home.runtime("docker.sock").display());
    assert_eq!(context[0]["Endpoints"]["docker"]["Host"], host);
    assert_eq!(show(), before, "the current context was switched");
    let output = home.command("docker").args(["--context", "bulkhead", "ps"]).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("Bulkhead's engine is not running (state: stopped)"), "{message}");
    assert!(home.bulkhead(&["stop"]).status.success());
    backend.wait();
    assert_eq!(inspect(&home, "bulkhead"), None);
}

#[test]
fn a_context_that_a_person_made_is_left_alone() {
    if !has_docker() {
        return;
    }
    let home = Home::new();
    let create = ["context", "create", "bulkhead", "--docker", "host=tcp://192.0.2.1:2375"];
    assert!(home.command("docker").args(create).output().unwrap().status.success());
    let mut backend = home.backend();
    assert!(home.status().get("context").is_none());
    assert!(home.bulkhead(&["stop"]).status.success());
    backend.wait();
    let context = inspect(&home, "bulkhead").expect("it was removed");
    assert_eq!(context[0]["Endpoints"]["docker"]["Host"], "tcp://192.0.2.1:2375");
}

#[test]
fn a_folder_in_tmp_that_others_can_enter_is_not_used() {
    // Only where the real fallback of this user is free can a test put something there.
    let folder = PathBuf::from(format!("/tmp/bulkhead-{}", nix::unistd::geteuid()));
    if folder.exists() {
        return;
    }
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    let home = Home::new();
    let output =
        home.command(program()).args(["backend", "--launched"]).env_remove("XDG_RUNTIME_DIR").output().unwrap();
    fs::remove_dir(&folder).unwrap();
    assert!(refused(&output, 1).contains("is open to other users"));
}

#[test]
fn a_socket_that_somebody_else_listens_on_is_not_mistaken_for_a_backend() {
    let home = Home::new();
    fs::create_dir_all(home.runtime("")).unwrap();
    let listener = UnixListener::bind(home.runtime("control.sock")).unwrap();
    let server = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.write_all(b"220 mail\r\n\r\n");
        }
    });
    refused(&home.bulkhead(&["status"]), 1);
    server.join().unwrap();
    assert!(Path::new(&home.runtime("control.sock")).exists());
}
