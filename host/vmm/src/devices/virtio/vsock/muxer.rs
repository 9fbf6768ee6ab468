//! All connections of the device: finds the one that a packet or an event belongs to, lets them send in turn, and
//! answers packets that belong to none.
//!
//! A slot holds a host stream, as a handshake of the hybrid socket, as a client that listens there, or as a connection.
//! Its token identifies it in epoll and is never used again, so an event that is late cannot reach another slot.
//! Everything that a guest or a host client can make grow is bounded: slots, RSTs that wait, and the bytes held for each
//! connection.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixListener,
    },
    sync::Arc,
    time::{Duration, Instant},
};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    connection::{Connection, Key, Phase, REQUEST_TIMEOUT, Readiness},
    hybrid::{MAX_LINE, Progress, Request, RequestParser},
    listeners::Listeners,
    offers::Offers,
    packet::{HOST_CID, Header, Op, TYPE_STREAM},
    segments::Segment,
    stream::{HostStream, SocketStream},
};

/// Maximum number of connections, handshakes of host clients included.
pub(super) const MAX_CONNECTIONS: usize = 1024;

/// Maximum number of RSTs that wait for a receive buffer. When so many wait, the transmit queue rests: a device stops
/// processing it when its additional resources for answers are exhausted (virtio 1.3, 5.10.6.1).
const MAX_RESETS: usize = 256;

/// The first token of a slot; those below are the caller's.
pub(super) const FIRST_TOKEN: u64 = 16;

/// Ports of connections from the host: `FIRST_PORT..FIRST_PORT * 2`. The guest connects to lower ones.
const FIRST_PORT: u32 = 1 << 30;

/// The last port from which the guest may connect to the host, see [`is_reserved`].
const LAST_RESERVED_PORT: u32 = 1023;

/// Time until clients are accepted again after an error, such as a lack of descriptors.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// The addresses of the guest and the host.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    pub(super) guest_cid: u64,
    /// Host ends for the guest's connections.
    pub(super) offers: Arc<Offers>,
    /// The hybrid socket; non-blocking.
    pub(super) listener: Arc<UnixListener>,
    /// Its clients may wait for connections of the guest.
    pub(super) clients_listen: bool,
    pub(super) max_connections: usize,
}

/// A client of the hybrid socket that has not sent its request completely.
#[derive(Debug)]
struct Handshake {
    stream: SocketStream,
    parser: RequestParser,
    deadline: Instant,
}

#[derive(Debug)]
enum Slot {
    Handshake(Handshake),
    /// A client of the hybrid socket that waits for a connection of the guest to this port of the host.
    Listener {
        stream: SocketStream,
        port: u32,
    },
    Connection {
        connection: Box<Connection<SocketStream>>,
        /// The token is in [`Muxer::ready`], which must hold it only once.
        queued: bool,
    },
}

/// The connections of a device.
pub(super) struct Muxer {
    endpoint: Endpoint,
    epoll: Epoll,
    slots: HashMap<u64, Slot>,
    /// Tokens of the connections that the guest knows.
    by_key: HashMap<Key, u64>,
    listeners: Listeners,
    /// Connections with something to send, in turn.
    ready: VecDeque<u64>,
    /// RSTs for packets without a connection.
    resets: VecDeque<Header>,
    next_token: u64,
    next_port: u32,
    /// No slot has a deadline before this. It may be too early: deadlines that were cancelled are not looked for.
    next_wake: Option<Instant>,
    /// Time of the next attempt to accept clients, after an error.
    accept_again: Option<Instant>,
}

impl Muxer {
    /// Creates a muxer without connections that watches the endpoint's listener. The listener's events have the token
    /// `listener_token`.
    pub(super) fn new(endpoint: Endpoint, listener_token: u64) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        epoll.ctl(ControlOperation::Add, endpoint.listener.as_raw_fd(), EpollEvent::new(events, listener_token))?;
        Ok(Self {
            endpoint,
            epoll,
            slots: HashMap::new(),
            by_key: HashMap::new(),
            listeners: Listeners::default(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_token: FIRST_TOKEN,
            next_port: FIRST_PORT,
            next_wake: None,
            accept_again: None,
        })
    }

    /// The epoll instance on which the caller waits, also for its own events.
    pub(super) fn epoll(&self) -> &Epoll {
        &self.epoll
    }

    /// Number of connections, handshakes and listeners.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    /// True if [`Self::next_packet`] may return a packet.
    pub(super) fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// True if no packet of the guest may be handled before RSTs have been sent.
    pub(super) fn is_stalled(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Time until the next deadline; `None` if there is none.
    pub(super) fn timeout(&self, now: Instant) -> Option<Duration> {
        let wake = match (self.next_wake, self.accept_again) {
            (Some(wake), Some(accept)) => Some(wake.min(accept)),
            (wake, accept) => wake.or(accept),
        };
        wake.map(|wake| wake.saturating_duration_since(now))
    }

    /// Accepts the host clients that wait at the hybrid socket.
    pub(super) fn accept(&mut self, now: Instant) {
        self.accept_again = None;
        // Until the listener would block, since its event is edge-triggered.
        loop {
            match self.endpoint.listener.accept() {
                Ok((stream, _)) => {
                    // Accepted and closed, not left in the backlog: the client sees it at once.
                    if self.is_full() {
                        tracing::warn!("rejecting a vsock client: too many connections");
                        continue;
                    }
                    let stream = SocketStream::new(stream.into());
                    let deadline = now + REQUEST_TIMEOUT;
                    self.insert(Slot::Handshake(Handshake { stream, parser: RequestParser::default(), deadline }));
                    self.wake_at(deadline);
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return,
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => {
                        // The clients that wait are not announced again, so they are looked for after a while. An
                        // attempt in each round of the loop would make it spin.
                        tracing::warn!(%error, "cannot accept a vsock client; retrying");
                        self.accept_again = Some(now + ACCEPT_RETRY_INTERVAL);
                        return;
                    }
                },
            }
        }
    }

    /// Connects an open host stream to a port of the guest. With `announce` the host first reads `OK <port>`.
    pub(super) fn connect(&mut self, guest_port: u32, mut stream: SocketStream, announce: bool, now: Instant) {
        if self.is_full() {
            tracing::warn!("rejecting a vsock stream: too many connections");
            // Its sender may have a copy, which keeps one that is only closed open.
            stream.finish();
        // The client may have given up while the stream waited for the guest's driver.
        } else if !stream.is_abandoned() {
            let key = Key { host_port: self.allocate_port(guest_port), guest_port };
            self.insert_connection(Connection::from_host(key, stream, announce, now));
        }
    }

    /// Handles an event of the stream with this token. A token without a slot is ignored: it was removed by another
    /// event of the same round.
    pub(super) fn event(&mut self, token: u64, events: EventSet, now: Instant) {
        match self.slots.get_mut(&token) {
            Some(Slot::Handshake(_)) => self.read_handshake(token, now),
            // Bytes that it has written by now are for the connection that it waits for.
            Some(Slot::Listener { .. }) if events.intersects(EventSet::HANG_UP | EventSet::ERROR) => self.remove(token),
            Some(Slot::Connection { connection, .. }) => {
                // READ_HANG_UP means an end of the stream to be read, HANG_UP that both directions are over.
                let readiness = Readiness {
                    readable: events.intersects(EventSet::IN | EventSet::READ_HANG_UP),
                    writable: events.contains(EventSet::OUT),
                    hung_up: events.intersects(EventSet::HANG_UP | EventSet::ERROR),
                };
                connection.ready(readiness, now);
                self.settle(token);
            }
            Some(Slot::Listener { .. }) | None => {}
        }
    }

    /// Handles a packet of the guest. `payload` is `None` if the packet claims more than its buffers hold.
    pub(super) fn transmit(&mut self, header: &Header, payload: Option<&[Segment<'_>]>, now: Instant) {
        // A guest must use its own context ID (5.10.6.4.1). There is no one to answer otherwise: an RST to another
        // address would go to the same guest.
        if header.src_cid != self.endpoint.guest_cid {
            tracing::debug!(header.src_cid, "dropping a vsock packet with a foreign source");
            return;
        }
        let op = Op::from_wire(header.op);
        // There is nothing but the host to connect to, by streams. An unknown type must be answered with an RST
        // (5.10.6.4.2).
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            return self.refuse(header, op);
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let token = self.by_key.get(&key).copied();
        if let Some((token, Slot::Connection { connection, .. })) =
            token.and_then(|token| Some((token, self.slots.get_mut(&token)?)))
        {
            // An unknown operation or a truncated packet violates the protocol: the connection cannot continue.
            match (op, payload) {
                (Some(op), Some(payload)) => connection.receive(op, header, payload, now),
                _ => connection.abort(),
            }
            self.settle(token);
        // A request for a new connection. Its payload, if any, is ignored.
        } else if op == Some(Op::Request) && payload.is_some() {
            self.connect_to_host(key, header);
        } else {
            self.refuse(header, op);
        }
    }

    /// Returns the header of the next packet for the guest, whose payload, if any, has been read into `space`.
    /// Connections take turns.
    pub(super) fn next_packet(&mut self, space: &[Segment<'_>], now: Instant) -> Option<Header> {
        // First, because they hold up the transmit queue.
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        // Each ready connection is tried once. One that has nothing after all leaves the list until its next event; one
        // that sent a packet goes to the end of the list, in `settle`.
        for _ in 0..self.ready.len() {
            let token = self.ready.pop_front()?;
            let Some(Slot::Connection { connection, queued }) = self.slots.get_mut(&token) else { continue };
            *queued = false;
            let reply = connection.next_packet(space, now);
            let header = reply.map(|reply| {
                let Key { host_port, guest_port } = connection.key();
                // Every packet of a connection must carry the credit (5.10.6.3.2).
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

    /// Handles the deadlines that have passed.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.accept_again.is_some_and(|at| at <= now) {
            self.accept(now);
        }
        if self.next_wake.is_none_or(|wake| wake > now) {
            return;
        }
        // All slots are visited, which finds the next wake-up, too. That happens rarely: deadlines are seconds, except
        // for a connection that waits for credit.
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
                Some(Slot::Listener { .. }) | None => {}
            }
        }
    }

    fn is_full(&self) -> bool {
        self.slots.len() >= self.endpoint.max_connections
    }

    fn wake_at(&mut self, at: Instant) {
        self.next_wake = Some(self.next_wake.map_or(at, |wake| wake.min(at)));
    }

    /// Queues an RST for a packet that belongs to no connection. An RST is never answered: two sides that did would
    /// never stop.
    fn refuse(&mut self, header: &Header, op: Option<Op>) {
        // Stalled only if the caller did not look: then the packet has no answer, but nothing grows.
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

    /// Gives a request of the guest the host stream that waits for the port: to its own programs what was offered, to all
    /// others a client that listens.
    fn connect_to_host(&mut self, key: Key, request: &Header) {
        let served = if is_reserved(key.guest_port) {
            let stream = (!self.is_full()).then(|| self.endpoint.offers.take(key.host_port)).flatten();
            stream.is_some_and(|stream| {
                self.insert_connection(Connection::from_guest(key, SocketStream::new(stream), false, request))
            })
        } else {
            self.connect_to_listener(key, request)
        };
        if !served {
            self.refuse(request, Some(Op::Request));
        }
    }

    /// Connects the guest to the client that has waited longest at the port; false if none does.
    fn connect_to_listener(&mut self, key: Key, request: &Header) -> bool {
        let Some(token) = self.listeners.take(key.host_port) else { return false };
        let Some(Slot::Listener { stream, .. }) = self.slots.remove(&token) else { return false };
        self.establish(token, Connection::from_guest(key, stream, true, request));
        true
    }

    /// Lets a client wait for a connection of the guest.
    fn listen(&mut self, token: u64, port: u32) {
        // The ports from there on are those of connections from the host.
        if !self.endpoint.clients_listen || port >= FIRST_PORT {
            return self.remove(token);
        }
        let Some(Slot::Handshake(Handshake { stream, .. })) = self.slots.remove(&token) else { return };
        let gone = stream.is_hung_up();
        self.slots.insert(token, Slot::Listener { stream, port });
        self.listeners.add(port, token);
        // Its event came with that of the line.
        if gone {
            self.remove(token);
        }
    }

    /// Reads a client's request, and no byte beyond it.
    fn read_handshake(&mut self, token: u64, now: Instant) {
        loop {
            let Some(Slot::Handshake(Handshake { stream, parser, .. })) = self.slots.get_mut(&token) else { return };
            // Looked at before they are taken: bytes behind the line belong to the guest and must stay in the socket.
            let mut bytes = [0; MAX_LINE];
            let seen = match stream.peek(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(0) | Err(_) => return self.remove(token),
                Ok(seen) => seen,
            };
            let (used, progress) = parser.feed(&bytes[..seen]);
            let taken = stream.take(&mut bytes[..used]);
            match progress {
                // Another process with the same socket could have taken them in between.
                _ if !matches!(taken, Ok(taken) if taken == used) => return self.remove(token),
                Progress::Partial => {}
                Progress::Invalid => return self.remove(token),
                Progress::Complete(Request::Connect { port }) => return self.promote(token, port, now),
                Progress::Complete(Request::Listen { port }) => return self.listen(token, port),
            }
        }
    }

    /// Turns a handshake into a connection.
    fn promote(&mut self, token: u64, guest_port: u32, now: Instant) {
        if let Some(Slot::Handshake(handshake)) = self.slots.remove(&token) {
            let key = Key { host_port: self.allocate_port(guest_port), guest_port };
            self.establish(token, Connection::from_host(key, handshake.stream, true, now));
        }
    }

    /// Adds a connection of a stream that is watched already, by this token, so epoll need not be changed.
    fn establish(&mut self, token: u64, connection: Connection<SocketStream>) {
        self.by_key.insert(connection.key(), token);
        self.slots.insert(token, Slot::Connection { connection: Box::new(connection), queued: false });
        self.settle(token);
    }

    /// Returns a host port that no connection to this guest port has. There are far more ports than connections, so the
    /// search ends soon.
    fn allocate_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let host_port = self.next_port;
            // In turn, so that a port is not used again soon after the guest has seen its connection end.
            self.next_port = if host_port == FIRST_PORT * 2 - 1 { FIRST_PORT } else { host_port + 1 };
            if !self.by_key.contains_key(&Key { host_port, guest_port }) {
                return host_port;
            }
        }
    }

    /// Adds a connection; false if its stream cannot be watched, which closes it.
    fn insert_connection(&mut self, connection: Connection<SocketStream>) -> bool {
        let key = connection.key();
        let slot = Slot::Connection { connection: Box::new(connection), queued: false };
        let Some(token) = self.insert(slot) else { return false };
        self.by_key.insert(key, token);
        self.settle(token);
        true
    }

    /// Adds a slot and watches its stream. Events are edge-triggered and connections remember them, so nothing is
    /// re-armed, and a stream that cannot be served at the moment does not wake the thread.
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
            // Closing alone would not do: epoll watches the open file, which another process may keep open.
            let _ = self.epoll.ctl(ControlOperation::Delete, slot.fd(), EpollEvent::default());
            match slot {
                Slot::Handshake(_) => {}
                Slot::Listener { port, .. } => self.listeners.remove(port, token),
                Slot::Connection { connection, queued } => {
                    self.forget_key(connection.key(), token);
                    // The list is the one place left that names the token.
                    if queued {
                        self.ready.retain(|&other| other != token);
                    }
                }
            }
        }
    }

    /// Removes a key, if it still belongs to this token: after the guest has forgotten an orphaned connection, it may
    /// use the same ports for another one.
    fn forget_key(&mut self, key: Key, token: u64) {
        if self.by_key.get(&key) == Some(&token) {
            self.by_key.remove(&key);
        }
    }

    /// Updates the tables after a change of a connection. Must be called after each.
    fn settle(&mut self, token: u64) {
        let Some(Slot::Connection { connection, queued }) = self.slots.get_mut(&token) else { return };
        let (key, phase, deadline) = (connection.key(), connection.phase(), connection.next_deadline());
        if !*queued && connection.wants_to_send() {
            *queued = true;
            self.ready.push_back(token);
        }
        match phase {
            Phase::Gone => self.remove(token),
            // The guest has forgotten it, so its key is free. The slot lives until the host has read the rest.
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
            Self::Handshake(Handshake { stream, .. }) | Self::Listener { stream, .. } => stream.as_raw_fd(),
            Self::Connection { connection, .. } => connection.stream().as_raw_fd(),
        }
    }
}

/// True for a port that only a process with CAP_NET_BIND_SERVICE in the guest's initial user namespace can bind
/// (`LAST_RESERVED_PORT` of `include/net/af_vsock.h`). vsock has no namespaces, so a process in a container may be able
/// to create such sockets. It gets other ports, and no connection but to a client that listens for it.
fn is_reserved(guest_port: u32) -> bool {
    guest_port <= LAST_RESERVED_PORT
}
