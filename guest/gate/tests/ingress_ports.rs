//! Ports of services in the routing mesh, with an engine and an init made of sockets.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a test that fails")]

use std::{
    io::{Read, Write},
    net::Ipv4Addr,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, channel},
    },
    time::Duration,
};

use bulkhead_gate::{Gate, Isolation, publish_ingress_ports};
use bulkhead_protocol::{PortMapping, Transport};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, listen, recv, send, socket,
};

/// The limit for what takes milliseconds.
const SOON: Duration = Duration::from_secs(20);

/// An engine whose `GET /services` gives the text, which is not a manager without one, and whose streams of events are
/// kept.
#[derive(Clone, Default)]
struct Engine {
    services: Arc<Mutex<Option<String>>>,
    streams: Arc<Mutex<Vec<UnixStream>>>,
}

impl Engine {
    fn serve(&self, path: &Path) {
        let (listener, engine) = (UnixListener::bind(path).unwrap(), self.clone());
        std::thread::spawn(move || listener.incoming().flatten().for_each(|stream| engine.answer(stream)));
    }

    fn answer(&self, mut stream: UnixStream) {
        let mut head = vec![0; 4096];
        let length = stream.read(&mut head).unwrap();
        if head[..length].starts_with(b"GET /events?") {
            stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").unwrap();
            return self.streams.lock().unwrap().push(stream);
        }
        if head[..length].starts_with(b"POST ") {
            return stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").unwrap();
        }
        let services = self.services.lock().unwrap().clone();
        let body = if head[..length].starts_with(b"GET /info ") {
            format!(r#"{{"Swarm":{{"ControlAvailable":{}}}}}"#, services.is_some())
        } else {
            assert!(head[..length].starts_with(b"GET /services "));
            services.unwrap()
        };
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    }

    /// Changes the ports of the one service, and tells all that follow the events.
    fn set(&self, ports: &[u16]) {
        let port =
            |port| format!(r#"{{"Protocol":"tcp","TargetPort":80,"PublishedPort":{port},"PublishMode":"ingress"}}"#);
        let ports: Vec<_> = ports.iter().map(port).collect();
        *self.services.lock().unwrap() = Some(format!(r#"[{{"Endpoint":{{"Ports":[{}]}}}}]"#, ports.join(",")));
        self.streams.lock().unwrap().retain_mut(|stream| stream.write_all(b"3\r\n{}\n\r\n").is_ok());
    }
}

/// A mapping as init sees it.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Published(u16),
    Ended(u16),
}

/// An init that refuses port 81.
fn init(path: &Path) -> Receiver<Seen> {
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&listener, Backlog::new(8).unwrap()).unwrap();
    let (sender, seen) = channel();
    std::thread::spawn(move || {
        while let Ok(number) = accept(listener.as_raw_fd()) {
            // SAFETY: accept has just made the descriptor.
            let (peer, sender) = (unsafe { OwnedFd::from_raw_fd(number) }, sender.clone());
            std::thread::spawn(move || {
                let mut packet = [0; 4096];
                let length = recv(peer.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap();
                let port: PortMapping = serde_json::from_slice(&packet[..length]).unwrap();
                assert_eq!((port.transport, port.container_port), (Transport::Tcp, port.host_port));
                assert_eq!((port.host_ip, port.container_ip), ([0, 0, 0, 0].into(), [192, 168, 65, 2].into()));
                let answer = if port.host_port == 81 { r#"{"error":"in use"}"# } else { r#"{"error":null}"# };
                let _ = sender.send(Seen::Published(port.host_port));
                send(peer.as_raw_fd(), answer.as_bytes(), MsgFlags::MSG_NOSIGNAL).unwrap();
                while !matches!(recv(peer.as_raw_fd(), &mut packet, MsgFlags::empty()), Ok(0) | Err(_)) {}
                let _ = sender.send(Seen::Ended(port.host_port));
            });
        }
    });
    seen
}

/// Starts the gate's part in a thread; returns the gate's socket for clients.
fn follow(directory: &Path) -> std::path::PathBuf {
    let (engine, init, clients) = (directory.join("engine"), directory.join("init"), directory.join("clients"));
    let acceptor = clients.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async move {
            let gate = Arc::new(Gate::new(engine, Isolation::Off));
            let listener = tokio::net::UnixListener::bind(&acceptor).unwrap();
            tokio::spawn(publish(Arc::clone(&gate), init));
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(bulkhead_gate::serve_connection(Arc::clone(&gate), stream, bulkhead_gate::Caller::Host));
            }
        });
    });
    clients
}

async fn publish(gate: Arc<Gate>, init: std::path::PathBuf) {
    publish_ingress_ports(gate, Ipv4Addr::new(192, 168, 65, 2), &init).await;
}

#[test]
fn a_service_has_its_port_on_the_host_from_its_creation_to_its_removal() {
    let directory = tempfile::tempdir().unwrap();
    let engine = Engine::default();
    engine.serve(&directory.path().join("engine"));
    engine.set(&[80, 81]);
    let seen = init(&directory.path().join("init"));
    follow(directory.path());

    assert_eq!(seen.recv_timeout(SOON).unwrap(), Seen::Published(80));
    assert_eq!(seen.recv_timeout(SOON).unwrap(), Seen::Published(81));
    assert_eq!(seen.recv_timeout(SOON).unwrap(), Seen::Ended(81), "the host has refused it");
    engine.set(&[80, 81, 82]);
    assert_eq!(seen.recv_timeout(SOON).unwrap(), Seen::Published(82));
    engine.set(&[82]);
    assert_eq!(seen.recv_timeout(SOON).unwrap(), Seen::Ended(80));
    // The engine has crashed and is back, with other services.
    engine.streams.lock().unwrap().clear();
    engine.set(&[83]);
    let mut both = [seen.recv_timeout(SOON).unwrap(), seen.recv_timeout(SOON).unwrap()];
    both.sort_by_key(|seen| matches!(seen, Seen::Published(_)));
    assert_eq!(both, [Seen::Ended(82), Seen::Published(83)]);
}

#[test]
fn an_engine_outside_of_a_swarm_is_asked_again_when_a_request_about_the_swarm_has_passed() {
    let directory = tempfile::tempdir().unwrap();
    let engine = Engine::default();
    engine.serve(&directory.path().join("engine"));
    let seen = init(&directory.path().join("init"));
    let clients = follow(directory.path());
    assert!(seen.recv_timeout(Duration::from_millis(300)).is_err());

    let ask = || {
        let mut client = (0..200).find_map(|_| {
            std::thread::sleep(Duration::from_millis(10));
            UnixStream::connect(&clients).ok()
        });
        let client = client.as_mut().unwrap();
        client.write_all(b"POST /v1.45/swarm/leave HTTP/1.0\r\n\r\n").unwrap();
        let _ = client.read_to_end(&mut Vec::new());
    };
    engine.set(&[80]);
    ask();
    assert_eq!(seen.recv_timeout(SOON).unwrap(), Seen::Published(80));
    *engine.services.lock().unwrap() = None;
    ask();
    assert_eq!(seen.recv_timeout(SOON).unwrap(), Seen::Ended(80));
}
