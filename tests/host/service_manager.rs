//! Starting by a service manager's socket, and what the backend reports to the manager.

use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{MetadataExt, PermissionsExt},
            net::{UnixDatagram, UnixListener, UnixStream},
        },
    },
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use support::program;

use crate::{
    home::{Backend, Home, refused},
    start::{has_kvm, put_image},
};

/// A listening socket as the manager of a user makes it.
fn listen(home: &Home, profile: &str) -> UnixListener {
    let path = home.runtime("").with_file_name(profile).join("docker.sock");
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    listener
}

/// The command for a backend with `listener` as its descriptor 3, as systemd starts it.
fn service(home: &Home, listener: &UnixListener) -> Command {
    let mut command = home.command("/bin/sh");
    let script = r#"exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" backend"#;
    command.args(["-c", script]).arg(program());
    command.stdin(Stdio::from(listener.as_fd().try_clone_to_owned().unwrap()));
    command
}

fn ping(socket: &Path) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Reads reports until one has a line that begins with `wanted`; returns that line.
fn reported(manager: &UnixDatagram, wanted: &str) -> String {
    manager.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    loop {
        let mut buffer = [0; 2048];
        let length = manager.recv(&mut buffer).unwrap_or_else(|error| panic!("no {wanted}: {error}"));
        let text = String::from_utf8(buffer[..length].to_vec()).unwrap();
        if let Some(line) = text.lines().find(|line| line.starts_with(wanted)) {
            return line.to_owned();
        }
    }
}

#[test]
fn the_first_client_of_a_service_managers_socket_starts_the_engine_and_gets_the_reason_if_that_fails() {
    let home = Home::new();
    let listener = listen(&home, "default");
    let socket = home.runtime("docker.sock");
    let manager = UnixDatagram::bind(home.path("notify")).unwrap();
    let mut backend = Home::listening(service(&home, &listener).env("NOTIFY_SOCKET", home.path("notify")));
    assert_eq!(reported(&manager, "READY"), "READY=1");
    reported(&manager, "STATUS=no VM");
    assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
    assert_eq!(home.status()["state"], "stopped");

    // Without an image, and on some machines without KVM.
    let answer = ping(&socket);
    assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("(state: failed, "), "{answer}");
    assert_eq!(home.status()["boot"], 1);
    reported(&manager, "STATUS=failed: ");
    // The next one does not try it again.
    ping(&socket);
    assert_eq!(home.status()["boot"], 1);

    assert!(home.bulkhead(&["stop"]).status.success());
    assert!(backend.wait().success());
    assert_eq!(reported(&manager, "STOPPING"), "STOPPING=1");
    // Clients go on reaching the manager, by the socket and by the context.
    assert!(UnixStream::connect(&socket).is_ok() && !home.runtime("control.sock").exists());
    assert_eq!(fs::read_dir(home.path("docker/contexts/meta")).unwrap().count(), 1);
}

#[test]
fn a_connection_without_a_request_starts_no_engine() {
    let home = Home::new();
    let listener = listen(&home, "default");
    let _backend = Home::listening(&mut service(&home, &listener));
    let mut probe = UnixStream::connect(home.runtime("docker.sock")).unwrap();
    probe.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = String::new();
    probe.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("(state: stopped)"), "{answer}");
    assert_eq!(home.status()["boot"], 0);
}

#[test]
fn a_service_managers_socket_must_be_the_profiles_listening_one() {
    let home = Home::new();
    let other = listen(&home, "other");
    let message = refused(&service(&home, &other).output().unwrap(), 1);
    assert!(message.contains("other/docker.sock, but clients of this profile use"), "{message}");
    let (connected, _peer) = UnixStream::pair().unwrap();
    let mut command = service(&home, &other);
    command.stdin(Stdio::from(OwnedFd::from(connected)));
    assert!(refused(&command.output().unwrap(), 1).contains("not a listening Unix socket"));
    // Descriptors for another process are not this one's.
    let mut command = home.command(program());
    command.arg("backend").env("LISTEN_FDS", "1").env("LISTEN_PID", "1");
    let _backend = Home::listening(&mut command);
}

#[test]
fn start_lets_the_service_manager_start_the_backend() {
    let home = Home::new();
    put_image(&home);
    if !has_kvm() {
        return;
    }
    let listener = listen(&home, "default");
    let inode = fs::metadata(home.runtime("docker.sock")).unwrap().ino();
    let mut start = home.command(program());
    start.arg("start").env("BULKHEAD_TRY_ANY_KVM", "1").stdout(Stdio::null()).stderr(Stdio::null());
    let mut start = start.spawn().unwrap();
    // As systemd: the first connection starts the service.
    let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut ready, PollTimeout::from(20_000_u16)).unwrap(), 1);
    let backend: Backend = Home::listening(service(&home, &listener).env("BULKHEAD_TRY_ANY_KVM", "1"));
    // The image is not a real one, so the start fails; in this backend.
    assert!(!start.wait().unwrap().success());
    let status = home.status();
    assert_eq!((&status["backendPid"], &status["boot"]), (&backend.child.id().into(), &1.into()), "{status}");
    assert_eq!(fs::metadata(home.runtime("docker.sock")).unwrap().ino(), inode);
}

#[test]
fn a_profile_of_a_newer_version_is_refused_and_left_alone() {
    let home = Home::new();
    home.backend().kill();
    let mark = home.path("data/bulkhead/default/format");
    assert_eq!(fs::read_to_string(&mark).unwrap(), "1\n");
    fs::write(&mark, "2\n").unwrap();
    let message = refused(&home.bulkhead(&["backend", "--launched"]), 1);
    assert!(message.contains("written by a newer version of Bulkhead (format 2 in "), "{message}");
    assert_eq!(fs::read_to_string(&mark).unwrap(), "2\n");
}
