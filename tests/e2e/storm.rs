//! Much at once, for as long as `BULKHEAD_TEST_STORM` says, in seconds; one round without it.

use std::{
    io::{self, Write},
    net::{Ipv4Addr, TcpStream},
    ops::Range,
    os::unix::net::UnixStream,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use support::{
    client::{self, connect},
    engine::{Engine, Isolation, engine},
    ports::free,
    process::poll,
};

/// Ports of one container.
const PORTS: u16 = 40;

/// Containers beside it.
const CONTAINERS: usize = 64;

/// Clients that go away in the middle of an answer, and how many of them there are at once.
const CLIENTS: usize = 300;
const CLIENTS_AT_ONCE: usize = 50;

/// Containers that start at once.
const STARTS_AT_ONCE: usize = 4;

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn the_engine_bears_ports_clients_and_containers_at_once() {
    let seconds = std::env::var("BULKHEAD_TEST_STORM").map_or(0, |seconds| seconds.parse().unwrap());
    let (begun, wanted) = (Instant::now(), Duration::from_secs(seconds));
    let engine = engine(Isolation::On);
    engine.remove_containers();
    let boot = engine.home.status()["boot"].clone();
    for round in 1.. {
        let started = Instant::now();
        rush(&engine);
        let status = engine.home.status();
        assert!(status["state"] == "running" && status["boot"] == boot, "{status}");
        // Past the harness, which shows what a test prints only when it fails.
        let _ = writeln!(io::stderr(), "round {round}: {:.1?}, {:.0?} in all", started.elapsed(), begun.elapsed());
        if begun.elapsed() >= wanted {
            break;
        }
    }
}

/// One round, which leaves nothing.
fn rush(engine: &Engine) {
    let ports = publish(engine);
    thread::scope(|scope| {
        scope.spawn(|| start_containers(engine));
        scope.spawn(|| leave_clients(engine));
        ports.clone().for_each(answers);
    });
    assert_eq!(engine.containers().len(), CONTAINERS + 1);
    ports.clone().for_each(answers);
    engine.remove_containers();
    poll("the containers go", Duration::from_secs(60), || engine.containers().is_empty().then_some(()));
    let listening = |port| TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok();
    poll("the ports close", Duration::from_secs(10), || (!ports.clone().any(listening)).then_some(()));
}

/// Starts a web server with all ports.
fn publish(engine: &Engine) -> Range<u16> {
    let first = free(PORTS);
    let ports = first..first + PORTS;
    let mut run = vec!["run".to_owned(), "--detach".into(), "--init".into(), "--name=ports".into()];
    run.extend(ports.clone().map(|port| format!("--publish={port}:80")));
    run.extend(["alpine", "httpd", "-f", "-p", "80", "-h", "/etc"].map(ToOwned::to_owned));
    let run: Vec<&str> = run.iter().map(String::as_str).collect();
    engine.docker(&run).ok();
    ports
}

fn answers(port: u16) {
    let answer = poll("the port answers", Duration::from_secs(60), || {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(60))).ok()?;
        client::request(&mut stream, "GET", "/hostname").ok()?;
        client::answer(&mut stream).ok()
    });
    assert_eq!(answer.0, 200, "{port}: {answer:?}");
}

fn start_containers(engine: &Engine) {
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..STARTS_AT_ONCE {
            scope.spawn(|| {
                while next.fetch_add(1, Ordering::Relaxed) < CONTAINERS {
                    engine
                        .docker(&["run", "--detach", "--init", "alpine", "sh", "-c", "yes | head -n 1000; sleep 1d"])
                        .ok();
                }
            });
        }
    });
}

/// Opens streams of events and logs, and closes them in the middle.
fn leave_clients(engine: &Engine) {
    let socket = engine.home.docker_socket();
    let paths = ["/events", "/containers/ports/logs?follow=1&stdout=1&stderr=1", "/containers/ports/stats"];
    for first in (0..CLIENTS).step_by(CLIENTS_AT_ONCE) {
        let open = |number: usize| -> UnixStream {
            let mut stream = connect(&socket).unwrap();
            client::request(&mut stream, "GET", paths[number % paths.len()]).unwrap();
            stream
        };
        let streams: Vec<_> = (first..first + CLIENTS_AT_ONCE).map(open).collect();
        // For the answers to be under way.
        thread::sleep(Duration::from_millis(500));
        drop(streams);
    }
}
