//! Published ports: passes requests of the processes that dockerd starts for them on to the backend.
//!
//! dockerd starts one process for each published port, in the place of its own `docker-proxy`. That process connects to
//! [`PORTS_SOCKET`] and sends one request. The connection is the mapping: the port is released however the process
//! ends.
//!
//! One thread watches all connections. Requests and ends become events, because the supervisor has the agent
//! connection.

use std::{
    collections::HashMap,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc::Sender},
    time::Duration,
};

use bulkhead_protocol::{MAX_PORT_PACKET, PORTS_SOCKET, PortAnswer, PortMapping};
use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    socket::{
        AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, getsockopt, listen, recv, send,
        socket, sockopt::PeerCredentials,
    },
};

use crate::{
    error::Error,
    event::{Event, spawn},
    log, mounts,
};

/// Maximum of mappings at once; each is a process of dockerd and a descriptor of init.
const MAX_MAPPINGS: usize = 4096;

/// Longest reason that is passed on, in characters; even with every character escaped in JSON it fits in a packet.
const MAX_REASON: usize = 600;

/// Delay before the next attempt to accept when descriptors or memory have run out.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// The listener's epoll data; ids of mappings start above it.
const LISTENER_KEY: u64 = 0;

/// The reason for refusing a port in a VM without a network.
pub(crate) const NO_NETWORK: &str = "this VM has no network, so no port can be published; `bulkhead settings set \
                                     network user` and `bulkhead restart` give it one";

/// The connection of one port's process.
#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    /// The supervisor has received the request, so it needs an event at the end as well.
    requested: bool,
}

/// The connections of all mappings by their ids.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ports {
    connections: Arc<Mutex<HashMap<u64, Connection>>>,
}

/// The result of reading from a connection.
#[derive(Debug, PartialEq, Eq)]
enum Received {
    /// Nothing to read yet.
    Nothing,
    /// The one request.
    Request(PortMapping),
    /// A packet that is not a valid request, and the reason for the answer.
    Invalid(String),
    /// The process has ended or closed the connection.
    Closed,
}

impl Ports {
    /// Opens the socket and starts the thread that turns requests and ends of connections into events.
    pub(crate) fn listen(events: Sender<Event>) -> Result<Self, Error> {
        mounts::make_directory(mounts::PRIVATE_DIRECTORY, 0o700)?;
        let path = Path::new(PORTS_SOCKET);
        let listener = open(path).map_err(Error::file("listen on", PORTS_SOCKET))?;
        let ports = Self::default();
        let epoll = watch(&listener).map_err(Error::system("wait for published ports"))?;
        let relay = Relay { ports: ports.clone(), listener, epoll, events, next: LISTENER_KEY };
        spawn("ports", move || relay.run())?;
        Ok(ports)
    }

    /// Answers the request with this id; no `error` means that the host listens.
    pub(crate) fn answer(&self, id: u64, error: Option<String>) {
        // The process may have ended meanwhile. Its connection is gone then, and an `unpublish` follows the request.
        if let Some(connection) = self.lock().get(&id) {
            reply(&connection.socket, error);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Connection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread behind [`Ports`].
struct Relay {
    ports: Ports,
    listener: OwnedFd,
    epoll: Epoll,
    events: Sender<Event>,
    next: u64,
}

impl Relay {
    fn run(mut self) {
        let mut ready = [EpollEvent::empty(); 64];
        loop {
            let count = match self.epoll.wait(&mut ready, EpollTimeout::NONE) {
                Ok(count) => count,
                Err(nix::Error::EINTR) => continue,
                Err(errno) => return log::info(&format!("cannot publish ports any more: {errno}")),
            };
            // In the order in which epoll reports them, oldest first: when a container is recreated, the end of the old
            // port's process comes before the request of the new one, and the host can listen again.
            for event in &ready[..count] {
                let sent = match event.data() {
                    LISTENER_KEY => {
                        self.accept();
                        true
                    }
                    id => self.serve(id),
                };
                if !sent {
                    return;
                }
            }
        }
    }

    fn accept(&mut self) {
        let socket = match accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK) {
            // SAFETY: the kernel has just made this descriptor for this process.
            Ok(number) => unsafe { OwnedFd::from_raw_fd(number) },
            Err(nix::Error::EMFILE | nix::Error::ENFILE | nix::Error::ENOMEM | nix::Error::ENOBUFS) => {
                // The listener stays readable, so without a pause this would be a busy loop.
                return std::thread::sleep(ACCEPT_RETRY_INTERVAL);
            }
            Err(_) => return,
        };
        // The directory is closed to other users as well; this check does not depend on its mode. Root of an isolated
        // container is another user here.
        if !getsockopt(&socket, PeerCredentials).is_ok_and(|peer| peer.uid() == 0) {
            return;
        }
        let mut connections = self.ports.lock();
        if connections.len() >= MAX_MAPPINGS {
            return reply(&socket, Some(format!("cannot publish more than {MAX_MAPPINGS} ports")));
        }
        // Never reused: a late answer of the backend must not reach another mapping.
        self.next += 1;
        let watched = self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, self.next));
        match watched {
            Ok(()) => drop(connections.insert(self.next, Connection { socket, requested: false })),
            Err(errno) => {
                reply(&socket, Some(format!("init cannot watch the connection of the port's process: {errno}")));
            }
        }
    }

    /// Handles a connection that is readable or has ended; returns false when the supervisor has ended.
    fn serve(&self, id: u64) -> bool {
        let mut connections = self.ports.lock();
        // Not expected: closing a connection takes it out of the epoll set.
        let Some(connection) = connections.get_mut(&id) else { return true };
        let event = match receive(&connection.socket) {
            Received::Nothing => return true,
            Received::Request(port) if !connection.requested => {
                // The connection stays open without an answer until the backend's arrives.
                connection.requested = true;
                Some(Event::Publish { id, port })
            }
            Received::Invalid(reason) if !connection.requested => {
                reply(&connection.socket, Some(reason));
                connections.remove(&id);
                None
            }
            // dockerd's processes send one request. A second packet is a fault of the sender and ends the mapping.
            Received::Closed | Received::Request(_) | Received::Invalid(_) => {
                connections.remove(&id).filter(|connection| connection.requested).map(|_| Event::Unpublish(id))
            }
        };
        // Before sending, because the supervisor takes the same lock to answer.
        drop(connections);
        event.is_none_or(|event| self.events.send(event).is_ok())
    }
}

fn open(path: &Path) -> io::Result<OwnedFd> {
    let listener =
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listen(&listener, Backlog::MAXALLOWABLE)?;
    Ok(listener)
}

fn watch(listener: &OwnedFd) -> nix::Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(listener.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, LISTENER_KEY))?;
    Ok(epoll)
}

fn receive(socket: &OwnedFd) -> Received {
    // One byte more than a packet may have shows that the kernel cut a longer one off.
    let mut packet = [0; MAX_PORT_PACKET + 1];
    match recv(socket.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT) {
        Ok(0) => Received::Closed,
        Ok(len) if len > MAX_PORT_PACKET => {
            Received::Invalid(format!("the request for a port is longer than {MAX_PORT_PACKET} bytes"))
        }
        Ok(len) => match serde_json::from_slice(&packet[..len]) {
            Ok(port) => Received::Request(port),
            Err(error) => Received::Invalid(format!("invalid request for a port: {error}")),
        },
        Err(nix::Error::EAGAIN | nix::Error::EINTR) => Received::Nothing,
        Err(_) => Received::Closed,
    }
}

/// Sends the answer without waiting. A process that does not read it has ended or runs into its own timeout.
fn reply(socket: &OwnedFd, error: Option<String>) {
    let answer = PortAnswer { error: error.map(|reason| reason.chars().take(MAX_REASON).collect()) };
    if let Ok(packet) = serde_json::to_vec(&answer) {
        let _ = send(socket.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use bulkhead_protocol::Transport;
    use nix::sys::socket::connect;
    use proptest::prelude::*;

    use super::*;

    const PORT: PortMapping = PortMapping {
        transport: Transport::Udp,
        host_ip: std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        host_port: 53,
        container_ip: std::net::IpAddr::V4(std::net::Ipv4Addr::new(172, 17, 0, 2)),
        container_port: 53,
    };

    struct Bench {
        _directory: tempfile::TempDir,
        ports: Ports,
        events: Receiver<Event>,
        path: std::path::PathBuf,
    }

    /// A relay with a socket of its own; `None` unless this process is root, whom alone it accepts.
    fn bench() -> Option<Bench> {
        if !nix::unistd::geteuid().is_root() {
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ports.sock");
        let (sender, events) = channel();
        let listener = open(&path).unwrap();
        let epoll = watch(&listener).unwrap();
        let ports = Ports::default();
        let relay = Relay { ports: ports.clone(), listener, epoll, events: sender, next: LISTENER_KEY };
        std::thread::spawn(move || relay.run());
        Some(Bench { _directory: directory, ports, events, path })
    }

    impl Bench {
        fn connect(&self) -> OwnedFd {
            let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
            connect(socket.as_raw_fd(), &UnixAddr::new(&self.path).unwrap()).unwrap();
            socket
        }

        fn event(&self) -> Event {
            self.events.recv_timeout(Duration::from_secs(20)).unwrap()
        }
    }

    fn send_packet(socket: &OwnedFd, packet: &[u8]) {
        send(socket.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL).unwrap();
    }

    fn answer(socket: &OwnedFd) -> PortAnswer {
        let mut packet = [0; MAX_PORT_PACKET];
        let len = recv(socket.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap();
        serde_json::from_slice(&packet[..len]).unwrap()
    }

    #[test]
    fn a_mapping_lasts_as_long_as_its_process_and_its_id_is_not_used_again() {
        let Some(bench) = bench() else { return };
        for expected in 1..=3 {
            let process = bench.connect();
            send_packet(&process, &serde_json::to_vec(&PORT).unwrap());
            let Event::Publish { id, port } = bench.event() else { panic!() };
            assert_eq!((id, port), (expected, PORT));
            bench.ports.answer(id, None);
            assert_eq!(answer(&process), PortAnswer { error: None });
            drop(process);
            assert!(matches!(bench.event(), Event::Unpublish(id) if id == expected));
            assert!(bench.ports.lock().is_empty());
            // Too late, and without effect.
            bench.ports.answer(id, None);
        }
    }

    #[test]
    fn a_port_is_released_before_the_next_process_asks_for_it() {
        let Some(bench) = bench() else { return };
        let mut last = bench.connect();
        send_packet(&last, &serde_json::to_vec(&PORT).unwrap());
        let Event::Publish { mut id, .. } = bench.event() else { panic!() };
        for _ in 0..200 {
            drop(last);
            last = bench.connect();
            send_packet(&last, &serde_json::to_vec(&PORT).unwrap());
            assert!(matches!(bench.event(), Event::Unpublish(old) if old == id));
            let Event::Publish { id: new, .. } = bench.event() else { panic!() };
            id = new;
        }
    }

    #[test]
    fn an_invalid_request_is_refused_and_never_reaches_the_host() {
        let Some(bench) = bench() else { return };
        let process = bench.connect();
        send_packet(&process, b"garbage");
        assert!(answer(&process).error.unwrap().contains("invalid request"));
        let process = bench.connect();
        send_packet(&process, &vec![b' '; MAX_PORT_PACKET + 100]);
        assert!(answer(&process).error.unwrap().contains("longer than 4096 bytes"));
        let process = bench.connect();
        send_packet(&process, &serde_json::to_vec(&PORT).unwrap());
        send_packet(&process, &serde_json::to_vec(&PORT).unwrap());
        assert!(matches!(bench.event(), Event::Publish { id: 3, .. }));
        assert!(matches!(bench.event(), Event::Unpublish(3)));
    }

    proptest! {
        #[test]
        fn every_reason_fits_in_a_packet(reason in ".{0,2000}") {
            let reason: String = reason.chars().chain("\u{1}".repeat(2000).chars()).take(MAX_REASON).collect();
            let answer = PortAnswer { error: Some(reason) };
            prop_assert!(serde_json::to_vec(&answer).unwrap().len() <= MAX_PORT_PACKET);
        }
    }
}
