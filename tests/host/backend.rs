//! One backend for each profile, and what it answers.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};
use serde_json::{Value, json};
use support::program;

use crate::home::{Home, refused};

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
    let directory = home.runtime("");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = fs::remove_dir(&directory);
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
fn a_command_that_looks_for_a_backend_does_not_keep_one_from_starting() {
    let home = Home::new();
    home.backend().kill();
    // `status` holds the lock like this for a moment.
    let file = fs::File::open(home.runtime("lock")).unwrap();
    let reader = Flock::lock(file, FlockArg::LockShared).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(200));
            drop(reader);
        });
        let backend = home.backend();
        assert_eq!(home.status()["backendPid"], backend.child.id());
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
        assert_eq!(ports(&[]), "no published ports\n");
        let answer: Value = serde_json::from_str(&ports(&["--format", "json"])).unwrap();
        assert_eq!(answer, json!({"ports": []}));
    };
    nothing();
    let _backend = home.backend();
    nothing();
    let answer = home.post("/v1/ports", "");
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains(r#""outcome":"notRunning""#), "{answer}");
    let answer = home.post("/v1/usage", "");
    assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("allow: GET"), "{answer}");
}

#[test]
fn a_socket_path_that_is_too_long_is_refused() {
    let home = Home::new();
    let long = home.path(&"x".repeat(100));
    let output = home.command(program()).arg("status").env("XDG_RUNTIME_DIR", long).output().unwrap();
    assert!(refused(&output, 1).contains("more than the 107 that Linux allows"));
}

#[test]
fn a_folder_in_tmp_that_others_can_enter_is_not_used() {
    // Only where the real fallback of this user is free can a test put something there.
    let directory = PathBuf::from(format!("/tmp/bulkhead-{}", nix::unistd::geteuid()));
    if directory.exists() {
        return;
    }
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    let home = Home::new();
    let output =
        home.command(program()).args(["backend", "--launched"]).env_remove("XDG_RUNTIME_DIR").output().unwrap();
    fs::remove_dir(&directory).unwrap();
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
