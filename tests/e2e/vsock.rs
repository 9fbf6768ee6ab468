//! `bulkhead vsock`: from the host to a container that listens on a vsock port.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    process::Stdio,
};

use support::{
    engine::{Isolation, engine},
    process::{COMMAND, poll, run_with},
    program,
};

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_vsock_port_of_a_container_is_reached_by_pipe_and_by_socket_without_isolation() {
    let engine = engine(Isolation::Off);
    engine.need_image("debian:latest", "debian.tar");
    let listen = "exec socat VSOCK-LISTEN:5000,fork,reuseaddr EXEC:'tr a-z A-Z'";
    engine.docker(&["run", "--detach", "--init", "--privileged", "debian", "sh", "-c", listen]).ok();
    let connect = |port: &str| {
        let mut command = engine.home.command(program());
        command.args(["vsock", "connect", port]);
        run_with(command, b"question", COMMAND)
    };
    // `tr` answers at the end of its input, which therefore has to arrive.
    let answer = poll("the container listens", COMMAND, || {
        let ran = connect("5000");
        ran.status.success().then_some(ran.stdout)
    });
    assert_eq!(answer, "QUESTION");
    assert!(connect("5001").fails(1).contains("nothing listens on vsock port 5001"));

    let socket = engine.home.path("forwarded");
    let mut forward = engine.home.command(program());
    forward.args(["vsock", "forward", &format!("{}:5000", socket.display())]).stdout(Stdio::null());
    let mut forward = forward.spawn().unwrap();
    let mut stream = poll("the socket listens", COMMAND, || UnixStream::connect(&socket).ok());
    stream.write_all(b"again").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "AGAIN");
    let pid = nix::unistd::Pid::from_raw(forward.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(forward.wait().unwrap().success());
    assert!(!socket.exists(), "the socket is left");
    engine.remove_containers();
}
