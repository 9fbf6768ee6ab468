//! `bulkhead vsock`: between the host and containers that use vsock.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    process::Stdio,
    thread,
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

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_container_without_isolation_connects_to_a_command_that_listens_once() {
    let engine = engine(Isolation::Off);
    engine.need_image("debian:latest", "debian.tar");
    let mut command = engine.home.command(program());
    command.args(["vsock", "listen", "5000"]);
    let waits = thread::spawn(move || run_with(command, b"answer", COMMAND));
    // The end of each side's input is the end of the other's output.
    let ask = ["run", "--rm", "--privileged", "debian", "sh", "-c", "echo question | socat - VSOCK-CONNECT:2:5000"];
    let answer = poll("the command listens", COMMAND, || {
        let ran = engine.docker(&ask);
        ran.status.success().then_some(ran.stdout)
    });
    assert_eq!((answer.as_str(), waits.join().unwrap().ok().as_str()), ("answer", "question\n"));
    let refused = engine.docker(&ask);
    assert!(!refused.status.success(), "{}", refused.stdout);
    engine.remove_containers();
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn nothing_waits_for_isolated_containers_which_cannot_connect() {
    let engine = engine(Isolation::On);
    let mut command = engine.home.command(program());
    command.args(["vsock", "listen", "5000"]);
    assert!(run_with(command, b"", COMMAND).fails(1).contains("containers cannot use vsock"));
    // Neither does the device let others wait.
    let mut client = UnixStream::connect(engine.home.runtime("vsock.sock")).unwrap();
    client.write_all(b"LISTEN 5000\n").unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
}
