//! The Docker API through docker.sock, the backend and virtio-vsock: streams, their ends, many of them.

use std::{
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    time::{Duration, Instant},
};

use bollard::{
    Docker,
    container::LogOutput,
    models::ContainerCreateBody,
    query_parameters::{
        AttachContainerOptionsBuilder, CreateContainerOptions, RemoveContainerOptions, StartContainerOptions,
        WaitContainerOptions,
    },
};
use futures_util::StreamExt;
use support::{
    client::{self, connect},
    engine::{Isolation, Pattern, engine, shell, write_pattern},
    process::{COMMAND, poll, run, stream},
};
use tokio::io::AsyncWriteExt;

/// Time for the 64 MiB to go through and come back.
const BULK: Duration = Duration::from_secs(300);

const MIB: usize = 1 << 20;

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_command_prints_and_its_exit_status_passes() {
    let engine = engine(Isolation::On);
    let ran = engine.docker(&["run", "--rm", "alpine", "sh", "-c", "echo hi; echo oh >&2; exit 42"]);
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str(), ran.status.code()), ("hi\n", "oh\n", Some(42)));
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn standard_input_and_its_end_reach_a_container() {
    let engine = engine(Isolation::On);
    assert_eq!(engine.docker_with(&["run", "-i", "--rm", "alpine", "cat"], b"x\n").ok(), "x\n");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn an_exec_goes_on_talking_after_its_input_has_ended() {
    let engine = engine(Isolation::On);
    let command = ["exec", "-i", engine.sleeper(), "sh", "-c", "cat; sleep 1; echo after; exit 3"];
    let ran = engine.docker_with(&command, b"before\n");
    assert_eq!((ran.stdout.as_str(), ran.status.code()), ("before\nafter\n", Some(3)), "{}", ran.stderr);
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn sixty_four_mib_go_in_and_come_back_byte_exact() {
    let engine = engine(Isolation::On);
    let command = engine.home.docker_command(&["run", "-i", "--rm", "--log-driver", "none", "alpine", "cat"]);
    let feed = |stdin: &mut dyn Write| write_pattern(stdin, 64 * MIB).expect("standard input was closed early");
    let took = stream(command, BULK, feed, |stdout| {
        let mut pattern = Pattern::default();
        let mut buffer = vec![0; Pattern::BLOCK];
        for block in 0..64 * MIB / Pattern::BLOCK {
            if let Err(error) = stdout.read_exact(&mut buffer) {
                panic!("the stream ended in block {block}: {error}");
            }
            assert!(buffer == pattern.next_block(), "block {block} of 64 KiB differs");
        }
        assert_eq!(stdout.read(&mut buffer).unwrap(), 0, "more came back than went in");
    });
    println!("64 MiB each way in {took:.1?}");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_slow_reader_gets_every_byte_in_order() {
    const LAST: u64 = 2_250_000;
    let engine = engine(Isolation::On);
    let last = LAST.to_string();
    let command =
        engine.home.docker_command(&["run", "--rm", "--log-driver", "none", "alpine", "seq", "1", last.as_str()]);
    let mut total = 0;
    stream(
        command,
        BULK,
        |_| {},
        |stdout| {
            let mut buffer = vec![0; 64 * 1024];
            let (mut expected, mut line) = (1_u64, Vec::new());
            loop {
                let length = stdout.read(&mut buffer).unwrap();
                if length == 0 {
                    break;
                }
                for byte in &buffer[..length] {
                    if *byte == b'\n' {
                        assert_eq!(std::str::from_utf8(&line).unwrap(), expected.to_string(), "at byte {total}");
                        expected += 1;
                        line.clear();
                    } else {
                        line.push(*byte);
                    }
                }
                // Long pauses fill every buffer on the way; short ones keep them full.
                let stall = total / (6 * MIB) != (total + length) / (6 * MIB) || total == 0;
                std::thread::sleep(Duration::from_millis(if stall { 2000 } else { 2 }));
                total += length;
            }
            assert_eq!((expected, line.len()), (LAST + 1, 0));
        },
    );
    assert!(total >= 16 * MIB, "{total}");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn two_hundred_connections_at_once_are_all_answered() {
    let engine = engine(Isolation::On);
    let begun = Instant::now();
    let mut streams: Vec<_> = (0..200).map(|_| connect(&engine.home.docker_socket()).unwrap()).collect();
    for stream in &mut streams {
        client::request(stream, "GET", "/_ping").unwrap();
    }
    for (number, stream) in streams.iter_mut().enumerate() {
        let answer = client::answer(stream);
        assert!(matches!(&answer, Ok((200, body)) if body == "OK"), "connection {number}: {answer:?}");
    }
    println!("200 connections at once: {:.1?}", begun.elapsed());
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn five_hundred_connections_in_sequence_are_all_answered() {
    let engine = engine(Isolation::On);
    let begun = Instant::now();
    for number in 0..500 {
        let answer = client::ask(&engine.home.docker_socket(), "GET", "/_ping");
        assert!(matches!(&answer, Ok((200, body)) if body == "OK"), "connection {number}: {answer:?}");
    }
    println!("500 connections in sequence: {:.1?}", begun.elapsed());
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_connection_may_be_closed_by_either_side_first() {
    let engine = engine(Isolation::On);
    // The client ends its half before the answer.
    let mut stream = connect(&engine.home.docker_socket()).unwrap();
    client::request(&mut stream, "GET", "/_ping").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client::answer(&mut stream).unwrap(), (200, "OK".into()));
    // The server ends it: a read returns the end, and a write fails, at once or when the reset has arrived.
    let mut stream = connect(&engine.home.docker_socket()).unwrap();
    client::request(&mut stream, "GET", "/_ping").unwrap();
    assert_eq!(client::answer(&mut stream).unwrap(), (200, "OK".into()));
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0);
    let gone = poll("the server's end is noticed", COMMAND, || stream.write_all(b"more").err());
    assert!(matches!(gone.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{gone}");
    // The client goes away in the middle of its request, or without reading the answer.
    for request in ["POST /containers/create HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{", "GET /info"] {
        let mut stream = connect(&engine.home.docker_socket()).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
    }
    for _ in 0..20 {
        client::request(&mut connect(&engine.home.docker_socket()).unwrap(), "GET", "/_ping").unwrap();
    }
    engine.assert_answers();
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn the_hybrid_vsock_socket_is_spoken_by_hand_with_socat() {
    let engine = engine(Isolation::On);
    let socket = engine.home.runtime("vsock.sock");
    let line = format!(
        r"printf 'CONNECT 1023\nGET /_ping HTTP/1.0\r\n\r\n' | socat -t 30 - UNIX-CONNECT:{}",
        socket.display()
    );
    let output = shell(engine.home, &line, COMMAND).ok();
    let (first, rest) = output.split_once('\n').unwrap();
    let port = first.strip_prefix("OK ").unwrap_or_else(|| panic!("{output}"));
    assert!(port.parse::<u32>().is_ok(), "{first}");
    assert!(rest.starts_with("HTTP/1.0 200 OK\r\n") && rest.ends_with("\r\n\r\nOK"), "{rest}");
    // Nobody listens on this port: the connection is closed and nothing is promised.
    let line = format!(r"printf 'CONNECT 9\n' | socat -t 30 - UNIX-CONNECT:{}", socket.display());
    assert_eq!(shell(engine.home, &line, COMMAND).stdout, "");
    engine.assert_answers();
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn following_the_logs_ends_with_the_container() {
    let engine = engine(Isolation::On);
    engine.docker(&["rm", "--force", "talker"]);
    let script = "for i in 1 2 3; do echo line $i; sleep 1; done";
    engine.docker(&["run", "--detach", "--name", "talker", "alpine", "sh", "-c", script]).ok();
    let logs = engine.docker(&["logs", "--follow", "talker"]).ok();
    assert_eq!(logs, "line 1\nline 2\nline 3\n");
    engine.docker(&["rm", "talker"]).ok();
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_library_creates_attaches_starts_and_waits() {
    let engine = engine(Isolation::On);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let work = with_bollard(engine.home.docker_socket().display().to_string());
    let ended = runtime.block_on(async { tokio::time::timeout(COMMAND, work).await });
    assert!(ended.is_ok(), "bollard did not end within {COMMAND:?}");
}

async fn with_bollard(socket: String) {
    let docker = Docker::connect_with_unix(&socket, 60, bollard::API_DEFAULT_VERSION).unwrap();
    let docker = docker.negotiate_version().await.unwrap();
    assert_eq!(docker.ping().await.unwrap(), "OK");
    let version = docker.version().await.unwrap();
    assert_eq!(version.os.as_deref(), Some("linux"), "{version:?}");
    let body = ContainerCreateBody {
        image: Some("alpine".into()),
        cmd: Some(vec!["sh".into(), "-c".into(), "wc -c; exit 5".into()]),
        attach_stdin: Some(true),
        attach_stdout: Some(true),
        open_stdin: Some(true),
        stdin_once: Some(true),
        ..Default::default()
    };
    let id = docker.create_container(None::<CreateContainerOptions>, body).await.unwrap().id;
    let options = AttachContainerOptionsBuilder::default().stdin(true).stdout(true).stream(true).build();
    let mut attached = docker.attach_container(&id, Some(options)).await.unwrap();
    docker.start_container(&id, None::<StartContainerOptions>).await.unwrap();
    attached.input.write_all(&vec![b'x'; 100_000]).await.unwrap();
    attached.input.shutdown().await.unwrap();
    let mut printed = String::new();
    while let Some(output) = attached.output.next().await {
        let LogOutput::StdOut { message } = output.unwrap() else { continue };
        printed.push_str(std::str::from_utf8(&message).unwrap());
    }
    assert_eq!(printed.trim(), "100000");
    // bollard makes an error of a status that is not 0.
    let ended = docker.wait_container(&id, None::<WaitContainerOptions>).next().await.unwrap();
    assert!(
        matches!(ended, Err(bollard::errors::Error::DockerContainerWaitError { code: 5, .. })),
        "exit status 5 became {ended:?}"
    );
    docker.remove_container(&id, None::<RemoveContainerOptions>).await.unwrap();
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn the_printed_environment_points_docker_to_the_engine() {
    let engine = engine(Isolation::On);
    let script = engine.home.bulkhead(&["env"], COMMAND).ok();
    let line = format!("{script}\ndocker version --format '{{{{.Server.Os}}}}'");
    assert_eq!(shell(engine.home, &line, COMMAND).ok().trim(), "linux");
    let mut plain = engine.home.command("docker");
    plain.args(["context", "show"]);
    assert_eq!(run(plain, COMMAND).ok().trim(), "default", "the current context was switched");
}
