//! Published ports: between the processes that dockerd starts for them and the backend. See
//! [`bulkhead_protocol::PORTS_SOCKET`].

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

/// Mappings at once; each is a process of dockerd's and a descriptor here.
const MAX_MAPPINGS: usize = 4096;

/// Longest reason that is passed on, in characters; with every one of them escaped it fits in a packet.
const MAX_REASON: usize = 600;

/// Pause when the kernel has no descriptor to give.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// The listener's number among the mappings' ids, which begin behind it.
const LISTENER_KEY: u64 = 0;

/// Why nothing can be published in a VM without a network.
pub(crate) const NO_NETWORK: &str = "this VM has no network, so no port can be published; `bulkhead settings set \
                                     network user` and `bulkhead restart` give it one";

/// One process of dockerd's.
#[derive(Debug)]
struct Connection {
    socket: OwnedFd,
    /// The main loop knows of it.
    requested: bool,
}

/// The connections of all mappings by their ids.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ports {
    connections: Arc<Mutex<HashMap<u64, Connection>>>,
}

/// What a packet or the end of a connection means.
#[derive(Debug, PartialEq, Eq)]
enum Received {
    /// Nothing yet.
    Nothing,
    /// The one request.
    Request(PortMapping),
    /// Nothing that can be understood.
    Invalid(String),
    /// It is over.
    Closed,
}

impl Ports {
    /// Opens the socket and turns requests and ends of connections into events.
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

    /// Tells the process of a mapping how it went.
    pub(crate) fn answer(&self, id: u64, error: Option<String>) {
        // One that gave up meanwhile has ended its mapping.
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
                Err(errno) => return log::info(&format!("no port can be published any more: {errno}")),
            };
            // In the order in which they became ready, so that a port that was given up is free for the next.
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
                return std::thread::sleep(ACCEPT_RETRY_INTERVAL);
            }
            Err(_) => return,
        };
        if !getsockopt(&socket, PeerCredentials).is_ok_and(|peer| peer.uid() == 0) {
            return;
        }
        let mut connections = self.ports.lock();
        if connections.len() >= MAX_MAPPINGS {
            return reply(&socket, Some(format!("more than {MAX_MAPPINGS} ports can't be published")));
        }
        self.next += 1;
        let watched = self.epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, self.next));
        match watched {
            Ok(()) => drop(connections.insert(self.next, Connection { socket, requested: false })),
            Err(errno) => reply(&socket, Some(format!("the guest's init can't wait for the port's process: {errno}"))),
        }
    }

    /// Hears what a mapping's process says; false when nobody takes events any more.
    fn serve(&self, id: u64) -> bool {
        let mut connections = self.ports.lock();
        let Some(connection) = connections.get_mut(&id) else { return true };
        let event = match receive(&connection.socket) {
            Received::Nothing => return true,
            Received::Request(port) if !connection.requested => {
                connection.requested = true;
                Some(Event::Publish { id, port })
            }
            Received::Invalid(reason) if !connection.requested => {
                reply(&connection.socket, Some(reason));
                connections.remove(&id);
                None
            }
            // A second request is none of dockerd's proxies.
            Received::Closed | Received::Request(_) | Received::Invalid(_) => {
                connections.remove(&id).filter(|connection| connection.requested).map(|_| Event::Unpublish(id))
            }
        };
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
    let mut packet = [0; MAX_PORT_PACKET + 1];
    match recv(socket.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT) {
        Ok(0) => Received::Closed,
        Ok(len) if len > MAX_PORT_PACKET => Received::Invalid("the request for a port is too long".to_owned()),
        Ok(len) => match serde_json::from_slice(&packet[..len]) {
            Ok(port) => Received::Request(port),
            Err(error) => Received::Invalid(format!("the request for a port is not understood: {error}")),
        },
        Err(nix::Error::EAGAIN | nix::Error::EINTR) => Received::Nothing,
        Err(_) => Received::Closed,
    }
}

/// Sends the answer; a process that does not take it has ended or will run into its time-out.
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
        _folder: tempfile::TempDir,
        ports: Ports,
        events: Receiver<Event>,
        path: std::path::PathBuf,
    }

    /// A relay with a socket of its own; `None` for a user whom it would refuse.
    fn bench() -> Option<Bench> {
        if !nix::unistd::geteuid().is_root() {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ports.sock");
        let (sender, events) = channel();
        let listener = open(&path).unwrap();
        let epoll = watch(&listener).unwrap();
        let ports = Ports::default();
        let relay = Relay { ports: ports.clone(), listener, epoll, events: sender, next: LISTENER_KEY };
        std::thread::spawn(move || relay.run());
        Some(Bench { _folder: folder, ports, events, path })
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

    fn say(socket: &OwnedFd, packet: &[u8]) {
        send(socket.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL).unwrap();
    }

    fn heard(socket: &OwnedFd) -> PortAnswer {
        let mut packet = [0; MAX_PORT_PACKET];
        let len = recv(socket.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap();
        serde_json::from_slice(&packet[..len]).unwrap()
    }

    #[test]
    fn a_mapping_lasts_as_long_as_its_process_and_its_id_is_not_used_again() {
        let Some(bench) = bench() else { return };
        for expected in 1..=3 {
            let process = bench.connect();
            say(&process, &serde_json::to_vec(&PORT).unwrap());
            let Event::Publish { id, port } = bench.event() else { panic!() };
            assert_eq!((id, port), (expected, PORT));
            bench.ports.answer(id, None);
            assert_eq!(heard(&process), PortAnswer { error: None });
            drop(process);
            assert!(matches!(bench.event(), Event::Unpublish(id) if id == expected));
            assert!(bench.ports.lock().is_empty());
            // Too late: nobody is there.
            bench.ports.answer(id, None);
        }
    }

    #[test]
    fn a_port_is_given_up_before_the_next_process_asks_for_it() {
        let Some(bench) = bench() else { return };
        let mut last = bench.connect();
        say(&last, &serde_json::to_vec(&PORT).unwrap());
        let Event::Publish { mut id, .. } = bench.event() else { panic!() };
        for _ in 0..200 {
            drop(last);
            last = bench.connect();
            say(&last, &serde_json::to_vec(&PORT).unwrap());
            assert!(matches!(bench.event(), Event::Unpublish(old) if old == id));
            let Event::Publish { id: new, .. } = bench.event() else { panic!() };
            id = new;
        }
    }

    #[test]
    fn what_is_no_request_is_refused_and_never_reaches_the_host() {
        let Some(bench) = bench() else { return };
        let process = bench.connect();
        say(&process, b"garbage");
        assert!(heard(&process).error.unwrap().contains("not understood"));
        let process = bench.connect();
        say(&process, &vec![b' '; MAX_PORT_PACKET + 100]);
        assert!(heard(&process).error.unwrap().contains("too long"));
        let process = bench.connect();
        say(&process, &serde_json::to_vec(&PORT).unwrap());
        say(&process, &serde_json::to_vec(&PORT).unwrap());
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
