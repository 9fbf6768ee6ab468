//! All connections of the device: who they are, who may send next, and what becomes of packets that belong to none.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixListener,
    },
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    connection::{Connection, Key, Phase, REQUEST_TIMEOUT, Readiness},
    hybrid::{ConnectParser, MAX_LINE, Progress},
    packet::{HOST_CID, Header, Op, TYPE_STREAM},
    segments::Segment,
    stream::{HostStream, SocketStream},
};

/// Most connections at once, those still shaking hands with a host client included.
pub(super) const MAX_CONNECTIONS: usize = 1024;

/// Most RST packets waiting for a buffer of the guest. When so many wait, the transmit queue rests: a device must not
/// go on processing it without room for the answers (virtio 1.3, 5.10.6.2).
const MAX_RESETS: usize = 256;

/// Event tokens below this are the caller's.
pub(super) const FIRST_TOKEN: u64 = 16;

/// Host ports given to connections from the host: `FIRST_PORT..FIRST_PORT * 2`.
const FIRST_PORT: u32 = 1 << 30;

/// Connections of the guest come from ports up to this one, or are refused.
const LAST_RESERVED_PORT: u32 = 1023;

/// Pause after the host ran out of descriptors.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Where connections come from and go to.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    /// The guest's context id.
    pub(super) guest_cid: u64,
    /// The hybrid socket's path; the guest's connections go to `<path>_<port>`.
    pub(super) path: PathBuf,
    /// The hybrid socket; non-blocking.
    pub(super) listener: Arc<UnixListener>,
    /// See [`MAX_CONNECTIONS`].
    pub(super) max_connections: usize,
}

/// A host client that has not said yet which port it wants.
#[derive(Debug)]
struct Handshake {
    stream: SocketStream,
    parser: ConnectParser,
    deadline: Instant,
}

#[derive(Debug)]
enum Slot {
    Handshake(Handshake),
    Connection {
        connection: Box<Connection<SocketStream>>,
        /// In [`Muxer::ready`].
        queued: bool,
    },
}

/// See the module.
pub(super) struct Muxer {
    endpoint: Endpoint,
    epoll: Epoll,
    slots: HashMap<u64, Slot>,
    by_key: HashMap<Key, u64>,
    /// Connections with something to send, in turn.
    ready: VecDeque<u64>,
    resets: VecDeque<Header>,
    next_token: u64,
    next_port: u32,
    /// No slot has a deadline before this.
    next_wake: Option<Instant>,
    accept_again: Option<Instant>,
}

impl Muxer {
    /// Starts without connections and listens on the endpoint; `listener_token` names its events.
    pub(super) fn new(endpoint: Endpoint, listener_token: u64) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        epoll.ctl(ControlOperation::Add, endpoint.listener.as_raw_fd(), EpollEvent::new(events, listener_token))?;
        Ok(Self {
            endpoint,
            epoll,
            slots: HashMap::new(),
            by_key: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_token: FIRST_TOKEN,
            next_port: FIRST_PORT,
            next_wake: None,
            accept_again: None,
        })
    }

    /// Where the caller waits, also for its own events.
    pub(super) fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    /// Connections and handshakes.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// True if [`Self::next_packet`] may have a packet.
    pub(super) fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// True if no packet of the guest may be taken before RSTs went out.
    pub(super) fn is_stalled(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// How long the caller may sleep; `None` for as long as nothing happens.
    pub(super) fn timeout(&self, now: Instant) -> Option<Duration> {
        let wake = match (self.next_wake, self.accept_again) {
            (Some(wake), Some(accept)) => Some(wake.min(accept)),
            (wake, accept) => wake.or(accept),
        };
        wake.map(|wake| wake.saturating_duration_since(now))
    }

    /// Accepts waiting host clients.
    pub(super) fn accept(&mut self, now: Instant) {
        self.accept_again = None;
        loop {
            match self.endpoint.listener.accept() {
                Ok((stream, _)) => {
                    if self.is_full() {
                        tracing::warn!("rejecting a vsock client: too many connections");
                        continue;
                    }
                    let stream = SocketStream::new(stream.into());
                    let deadline = now + REQUEST_TIMEOUT;
                    self.insert(Slot::Handshake(Handshake { stream, parser: ConnectParser::default(), deadline }));
                    self.wake_at(deadline);
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return,
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => {
                        // The event is edge-triggered: what waits now is not announced again.
                        tracing::warn!(%error, "cannot accept a vsock client; retrying");
                        self.accept_again = Some(now + ACCEPT_RETRY_INTERVAL);
                        return;
                    }
                },
            }
        }
    }

    /// Connects an open host stream to a port of the guest. With `announce`, the host reads `OK <port>` first.
    pub(super) fn connect(&mut self, guest_port: u32, stream: SocketStream, announce: bool, now: Instant) {
        if self.is_full() {
            tracing::warn!("rejecting a vsock stream: too many connections");
        } else if !stream.is_abandoned() {
            let key = Key { host_port: self.allocate_port(guest_port), guest_port };
            self.insert_connection(Connection::from_host(key, stream, announce, now));
        }
    }

    /// Something happened to the stream with this token; a token that is gone is ignored.
    pub(super) fn event(&mut self, token: u64, events: EventSet, now: Instant) {
        match self.slots.get_mut(&token) {
            Some(Slot::Handshake(_)) => self.read_handshake(token, now),
            Some(Slot::Connection { connection, .. }) => {
                let readiness = Readiness {
                    readable: events.intersects(EventSet::IN | EventSet::READ_HANG_UP),
                    writable: events.contains(EventSet::OUT),
                    hung_up: events.intersects(EventSet::HANG_UP | EventSet::ERROR),
                };
                connection.ready(readiness, now);
                self.settle(token);
            }
            None => {}
        }
    }

    /// A packet of the guest. `payload` is `None` if the packet claims more than its buffers hold.
    pub(super) fn transmit(&mut self, header: &Header, payload: Option<&[Segment<'_>]>, now: Instant) {
        if header.src_cid != self.endpoint.guest_cid {
            tracing::debug!(header.src_cid, "dropping a vsock packet with a foreign source");
            return;
        }
        let op = Op::from_wire(header.op);
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            return self.refuse(header, op);
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let token = self.by_key.get(&key).copied();
        if let Some((token, Slot::Connection { connection, .. })) =
            token.and_then(|token| Some((token, self.slots.get_mut(&token)?)))
        {
            match (op, payload) {
                (Some(op), Some(payload)) => connection.receive(op, header, payload, now),
                _ => connection.abort(),
            }
            self.settle(token);
        } else if op == Some(Op::Request) && payload.is_some() && !self.is_full() && is_reserved(key.guest_port) {
            self.connect_to_host(key, header);
        } else {
            self.refuse(header, op);
        }
    }

    /// The next packet's header; its payload, if any, is in `space` already. Connections take turns.
    pub(super) fn next_packet(&mut self, space: &[Segment<'_>], now: Instant) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        for _ in 0..self.ready.len() {
            let token = self.ready.pop_front()?;
            let Some(Slot::Connection { connection, queued }) = self.slots.get_mut(&token) else { continue };
            *queued = false;
            let reply = connection.next_packet(space, now);
            let header = reply.map(|reply| {
                let Key { host_port, guest_port } = connection.key();
                let (buf_alloc, fwd_cnt) = connection.stamp();
                Header {
                    src_cid: HOST_CID,
                    dst_cid: self.endpoint.guest_cid,
                    src_port: host_port,
                    dst_port: guest_port,
                    len: reply.len as u32,
                    kind: TYPE_STREAM,
                    op: reply.op.to_wire(),
                    flags: reply.flags,
                    buf_alloc,
                    fwd_cnt,
                }
            });
            self.settle(token);
            if header.is_some() {
                return header;
            }
        }
        None
    }

    /// Acts on the deadlines that have passed.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.accept_again.is_some_and(|at| at <= now) {
            self.accept(now);
        }
        if self.next_wake.is_none_or(|wake| wake > now) {
            return;
        }
        self.next_wake = None;
        let tokens: Vec<u64> = self.slots.keys().copied().collect();
        for token in tokens {
            match self.slots.get_mut(&token) {
                Some(Slot::Handshake(Handshake { deadline, .. })) => {
                    let deadline = *deadline;
                    if deadline <= now {
                        self.remove(token);
                    } else {
                        self.wake_at(deadline);
                    }
                }
                Some(Slot::Connection { connection, .. }) => {
                    connection.expire(now);
                    self.settle(token);
                }
                None => {}
            }
        }
    }

    fn is_full(&self) -> bool {
        self.slots.len() >= self.endpoint.max_connections
    }

    fn wake_at(&mut self, at: Instant) {
        self.next_wake = Some(self.next_wake.map_or(at, |wake| wake.min(at)));
    }

    /// Owes the guest an RST for a packet that belongs to no connection; never answers an RST (5.10.6.5).
    fn refuse(&mut self, header: &Header, op: Option<Op>) {
        if op == Some(Op::Rst) || self.is_stalled() {
            return;
        }
        self.resets.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: Op::Rst.to_wire(),
            ..Header::default()
        });
    }

    /// The guest's request: connects to the host program that serves this port.
    fn connect_to_host(&mut self, key: Key, request: &Header) {
        let mut path = self.endpoint.path.clone().into_os_string();
        path.push(format!("_{}", key.host_port));
        let served = match connect_unix(&PathBuf::from(path)) {
            Ok(stream) => self.insert_connection(Connection::from_guest(key, stream, request)),
            Err(error) => {
                tracing::debug!(port = key.host_port, %error, "no host program serves the port that the guest connects to");
                false
            }
        };
        if !served {
            self.refuse(request, Some(Op::Request));
        }
    }

    /// Reads a client's request, and not a byte beyond it.
    fn read_handshake(&mut self, token: u64, now: Instant) {
        loop {
            let Some(Slot::Handshake(Handshake { stream, parser, .. })) = self.slots.get_mut(&token) else { return };
            let mut bytes = [0; MAX_LINE];
            let seen = match stream.peek(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(0) | Err(_) => return self.remove(token),
                Ok(seen) => seen,
            };
            let (used, progress) = parser.feed(&bytes[..seen]);
            let taken = stream.take(&mut bytes[..used]);
            match progress {
                _ if !matches!(taken, Ok(taken) if taken == used) => return self.remove(token),
                Progress::Partial => {}
                Progress::Invalid => return self.remove(token),
                Progress::Connect { port } => return self.promote(token, port, now),
            }
        }
    }

    /// Makes a connection of a handshake, under the same token.
    fn promote(&mut self, token: u64, guest_port: u32, now: Instant) {
        if let Some(Slot::Handshake(handshake)) = self.slots.remove(&token) {
            let key = Key { host_port: self.allocate_port(guest_port), guest_port };
            let connection = Connection::from_host(key, handshake.stream, true, now);
            self.by_key.insert(key, token);
            self.slots.insert(token, Slot::Connection { connection: Box::new(connection), queued: false });
            self.settle(token);
        }
    }

    /// A host port that no connection to this guest port has. There are far more ports than connections.
    fn allocate_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let host_port = self.next_port;
            self.next_port = if host_port == FIRST_PORT * 2 - 1 { FIRST_PORT } else { host_port + 1 };
            if !self.by_key.contains_key(&Key { host_port, guest_port }) {
                return host_port;
            }
        }
    }

    /// False if the host can't watch the stream, which is closed then.
    fn insert_connection(&mut self, connection: Connection<SocketStream>) -> bool {
        let key = connection.key();
        let slot = Slot::Connection { connection: Box::new(connection), queued: false };
        let Some(token) = self.insert(slot) else { return false };
        self.by_key.insert(key, token);
        self.settle(token);
        true
    }

    /// Watches the slot's stream, edge-triggered: readiness is remembered, so nothing is re-armed and nothing spins.
    fn insert(&mut self, slot: Slot) -> Option<u64> {
        let token = self.next_token;
        self.next_token += 1;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        match self.epoll.ctl(ControlOperation::Add, slot.fd(), EpollEvent::new(events, token)) {
            Ok(()) => {
                self.slots.insert(token, slot);
                Some(token)
            }
            Err(error) => {
                tracing::warn!(%error, "cannot watch a vsock stream");
                None
            }
        }
    }

    fn remove(&mut self, token: u64) {
        if let Some(slot) = self.slots.remove(&token) {
            // Explicit, because the open file may live on in another process.
            let _ = self.epoll.ctl(ControlOperation::Delete, slot.fd(), EpollEvent::default());
            if let Slot::Connection { connection, queued } = slot {
                self.forget_key(connection.key(), token);
                if queued {
                    self.ready.retain(|&other| other != token);
                }
            }
        }
    }

    fn forget_key(&mut self, key: Key, token: u64) {
        if self.by_key.get(&key) == Some(&token) {
            self.by_key.remove(&key);
        }
    }

    /// Brings the tables in line with what happened to a connection.
    fn settle(&mut self, token: u64) {
        let Some(Slot::Connection { connection, queued }) = self.slots.get_mut(&token) else { return };
        let (key, phase, deadline) = (connection.key(), connection.phase(), connection.next_deadline());
        if !*queued && connection.wants_to_send() {
            *queued = true;
            self.ready.push_back(token);
        }
        match phase {
            Phase::Gone => self.remove(token),
            Phase::Orphaned => self.forget_key(key, token),
            _ => {}
        }
        if let Some(deadline) = deadline {
            self.wake_at(deadline);
        }
    }
}

impl Slot {
    fn fd(&self) -> RawFd {
        match self {
            Self::Handshake(handshake) => handshake.stream.as_raw_fd(),
            Self::Connection { connection, .. } => connection.stream().as_raw_fd(),
        }
    }
}

/// True for a port that takes a capability in the guest's first user namespace to bind (`LAST_RESERVED_PORT` of
/// `linux/vm_sockets.h`). vsock knows no namespaces, so a process in a container may be able to make such sockets; it
/// gets other ports, and no connection to the host.
fn is_reserved(guest_port: u32) -> bool {
    guest_port <= LAST_RESERVED_PORT
}

/// Connects without ever waiting: a full backlog counts as nobody there.
fn connect_unix(path: &std::path::Path) -> io::Result<SocketStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(SocketStream::new(socket))
}
