//! Dispatches the guest's packets to TCP, UDP, ICMP and DNS; owns the table of TCP connections, their timers and the
//! order in which they send.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    net::{SocketAddr, TcpListener, UdpSocket},
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant as Clock},
};

use bulkhead_protocol::Transport;
use smoltcp::{
    time::Instant,
    wire::{IpProtocol, TcpPacket},
};
use vmm_sys_util::epoll::Epoll;

use super::{
    addresses::{Addresses, MTU, is_unicast},
    dns::Dns,
    ethernet::{self, Payload},
    events::{self, Token},
    fragments::Fragments,
    frame::Frame,
    guest_frame::GuestFrame,
    icmp::Echo,
    ip::Packet,
    key::Key,
    offload::Offload,
    sink::FrameSink,
    socket,
    tcp::bulk::{self, Segment},
    tcp::flow::{Flow, Outcome},
    tcp::listeners::{Accepted, Listeners},
    tcp::sender::Sent,
    udp::{self, Udp},
};

/// Number of TCP connections. A SYN beyond it is refused; clients of published ports wait in their backlog.
const MAX_FLOWS: usize = 8192;
/// Bytes of smoltcp's buffer for each direction of a new connection, by the number of connections that there are. All
/// together have at most half a gigabyte, of which only pages that were used take memory.
const BUFFERS: [(usize, usize); 3] = [(128, 512 * 1024), (1024, 64 * 1024), (MAX_FLOWS, SMALL_BUFFER)];
const SMALL_BUFFER: usize = 16 * 1024;
/// First port of clients that are shown with the gateway's address.
const FIRST_PORT: u16 = 1024;
/// Frames that wait for the guest's buffers. TCP emits no more than these; other protocols' frames are dropped beyond
/// twice as many.
const MAX_OUT: usize = 256;
/// Interval between two checks for idle associations.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// A connection in the table.
struct Entry {
    flow: Flow,
    /// Its time in `timers`.
    timer: Option<Instant>,
    /// It is in `senders`.
    queued: bool,
}

/// All services behind the queues.
pub(super) struct Stack {
    epoll: Arc<Epoll>,
    addresses: Addresses,
    started: Clock,
    pub(super) offload: Offload,
    /// Number of the next connection. Numbers are never used again, so a late event finds nothing.
    next: u64,
    flows: HashMap<u64, Entry>,
    by_key: HashMap<Key, u64>,
    timers: BTreeSet<(Instant, u64)>,
    /// Connections that may have more frames than `out` had room for.
    waiting: BTreeSet<u64>,
    /// Connections with data for the guest, in the order of their turns. Some may be gone.
    senders: VecDeque<u64>,
    /// Connections that got acknowledgements, or data that went past smoltcp, since their last turn.
    acknowledged: BTreeSet<u64>,
    listeners: Listeners,
    /// The port that a client with the gateway's address was last shown with.
    last_port: u16,
    udp: Udp,
    echo: Echo,
    fragments: Fragments,
    last_sweep: Clock,
    dns: Dns,
    /// Buffer for one datagram.
    scratch: Vec<u8>,
    /// The guest's last frame, kept because a fresh buffer would be cleared first.
    frame: Vec<u8>,
    /// Frames for the guest.
    pub(super) out: VecDeque<Frame>,
}

impl Stack {
    pub(super) fn new(epoll: Arc<Epoll>, addresses: Addresses) -> Self {
        Self {
            epoll,
            addresses,
            started: Clock::now(),
            offload: Offload { checksum: false, segmentation: false },
            next: 0,
            flows: HashMap::new(),
            by_key: HashMap::new(),
            timers: BTreeSet::new(),
            waiting: BTreeSet::new(),
            senders: VecDeque::new(),
            acknowledged: BTreeSet::new(),
            listeners: Listeners::default(),
            last_port: FIRST_PORT,
            udp: Udp::default(),
            echo: Echo::default(),
            fragments: Fragments::default(),
            last_sweep: Clock::now(),
            dns: Dns::default(),
            scratch: vec![0; usize::from(MTU)],
            frame: Vec::new(),
            out: VecDeque::new(),
        }
    }

    fn now(&self) -> Instant {
        Instant::from_micros(self.started.elapsed().as_micros() as i64)
    }

    /// Takes a frame of the guest.
    pub(super) fn receive(&mut self, frame: &GuestFrame<'_>) {
        let mut head = [0; bulk::HEAD];
        let copied = frame.copy(0, &mut head);
        let head = &head[..copied];
        if self.take_bulk(head, frame) {
            return;
        }
        let mut bytes = std::mem::take(&mut self.frame);
        if bytes.len() < frame.len() {
            bytes.resize(frame.len(), 0);
        }
        // Bytes that were looked at are not read again: the guest may have changed them.
        bytes[..copied].copy_from_slice(head);
        frame.copy(copied, &mut bytes[copied..frame.len()]);
        self.receive_bytes(&bytes[..frame.len()]);
        self.frame = bytes;
    }

    /// Passes on the data of a frame without copying it; false if the frame has to be received.
    fn take_bulk(&mut self, head: &[u8], frame: &GuestFrame<'_>) -> bool {
        let Some(segment) = Segment::parse(head, frame.len()) else { return false };
        let Some(id) = self.by_key.get(&segment.key).copied() else { return false };
        let now = self.now();
        let taken = self.flows.get_mut(&id).is_some_and(|entry| entry.flow.take_bulk(&segment, frame, now));
        if taken {
            // Acknowledges all of a burst at once; see `run_timers`.
            self.acknowledged.insert(id);
        }
        taken
    }

    fn receive_bytes(&mut self, bytes: &[u8]) {
        match ethernet::parse(bytes, &self.addresses) {
            Some(Payload::Neighbour(reply)) => self.queue([reply]),
            Some(Payload::Packet(packet)) => self.receive_packet(&packet),
            Some(Payload::Fragment(fragment)) => {
                let whole = self.fragments.take(fragment, Clock::now());
                if let Some(packet) = whole.as_deref().and_then(Packet::parse) {
                    self.receive_packet(&packet);
                }
            }
            None => {}
        }
    }

    fn receive_packet(&mut self, packet: &Packet<'_>) {
        match packet.protocol {
            IpProtocol::Tcp => self.receive_tcp(packet),
            IpProtocol::Udp => self.receive_udp(packet),
            // Containers behind bridges share the guest's address, which masquerading gives them.
            IpProtocol::Icmp | IpProtocol::Icmpv6 if self.addresses.is_guest(packet.source) => {
                let reply = self.echo.receive(&self.epoll, &self.addresses, packet);
                self.queue(reply);
            }
            _ => {}
        }
    }

    fn receive_udp(&mut self, packet: &Packet<'_>) {
        let Some((key, data)) = udp::parse(packet) else { return };
        // Only the guest's own addresses open associations. Addresses behind it, such as a container's, can only answer
        // a published port's client, so no container can pose as another machine towards the host's network.
        let guest = self.addresses.is_guest(packet.source);
        if guest && self.addresses.is_dns(key.peer) {
            let mut out = Vec::new();
            self.dns.receive_query(&self.epoll, &self.addresses, key, data, &mut out);
            self.queue(out);
        } else {
            self.udp.send(&self.epoll, &self.addresses, key, data, guest);
        }
    }

    fn receive_tcp(&mut self, packet: &Packet<'_>) {
        // RFC 9293, 3.9.2.3 (MUST-57): TCP to or from multicast, broadcast and unspecified addresses is discarded.
        // smoltcp takes that for granted.
        if !is_unicast(packet.source) || !is_unicast(packet.destination) {
            return;
        }
        let Ok(tcp) = TcpPacket::new_checked(packet.payload()) else { return };
        // Port 0 names no endpoint, and smoltcp refuses to listen on it.
        if tcp.src_port() == 0 || tcp.dst_port() == 0 {
            return;
        }
        let key = Key {
            guest: SocketAddr::new(packet.source, tcp.src_port()),
            peer: SocketAddr::new(packet.destination, tcp.dst_port()),
        };
        let now = self.now();
        if let Some(id) = self.by_key.get(&key).copied() {
            // A burst of acknowledgements costs one turn of the connection, not one for each; see `run_timers`.
            if self.flows.get_mut(&id).is_some_and(|entry| entry.flow.receive(packet.bytes, tcp.syn(), now)) {
                self.acknowledged.insert(id);
            } else {
                self.advance(id);
            }
        } else if self.addresses.is_guest(packet.source) {
            // Everything but a SYN is left from a connection of an earlier process or before a reset: the answer is a
            // reset, and so is it to a SYN that leads nowhere.
            let opens = tcp.syn() && !tcp.ack() && !tcp.rst();
            if !opens || !self.connect(key, packet.bytes, now) {
                self.queue(Flow::refuse(packet.bytes.to_vec(), key, now));
            }
        }
    }

    /// Opens a connection for the guest; false if it has to be refused.
    fn connect(&mut self, key: Key, syn: &[u8], now: Instant) -> bool {
        if self.flows.len() >= MAX_FLOWS {
            return false;
        }
        if self.addresses.is_dns(key.peer) {
            let flow = Flow::name_server(key, syn.to_vec(), SMALL_BUFFER, self.offload, now);
            let id = self.insert(flow);
            self.advance(id);
            return true;
        }
        // The guest's SYN is answered when the host's socket is connected; see `Flow`.
        let Some(host) = self.addresses.on_host(key.peer).and_then(|address| socket::connect_tcp(address).ok()) else {
            return false;
        };
        let flow = Flow::outbound(key, syn.to_vec(), host, self.buffer(), self.offload, now);
        self.watch_and_insert(flow).is_some()
    }

    /// Connects to the host's name server for a connection with a query that is not answered here.
    fn connect_name_server(&mut self, id: u64) {
        let server = socket::connect_tcp(self.dns.server()).ok();
        let watched = server.filter(|server| events::watch_edges(&self.epoll, server, Token::Tcp(id)).is_ok());
        if let Some(entry) = self.flows.get_mut(&id) {
            match watched {
                Some(server) => entry.flow.pass_on(server),
                None => entry.flow.abort(),
            }
        }
    }

    /// Size of a new connection's buffers.
    fn buffer(&self) -> usize {
        let fits = |(most, size): &(usize, usize)| (self.flows.len() < *most).then_some(*size);
        BUFFERS.iter().find_map(fits).unwrap_or(BUFFERS[BUFFERS.len() - 1].1)
    }

    fn watch_and_insert(&mut self, flow: Flow) -> Option<u64> {
        events::watch_edges(&self.epoll, flow.host()?, Token::Tcp(self.next)).ok()?;
        Some(self.insert(flow))
    }

    fn insert(&mut self, flow: Flow) -> u64 {
        let id = self.next;
        self.next += 1;
        self.by_key.insert(flow.key, id);
        self.flows.insert(id, Entry { flow, timer: None, queued: false });
        id
    }

    /// Publishes a socket, which is listening (TCP) or bound (UDP).
    pub(super) fn publish(&mut self, id: u64, transport: Transport, socket: OwnedFd, target: SocketAddr) {
        match transport {
            Transport::Tcp => self.listeners.add(&self.epoll, id, TcpListener::from(socket), target),
            Transport::Udp => self.udp.publish(&self.epoll, id, UdpSocket::from(socket), target),
        }
    }

    /// Closes a published port, and ends what came through it.
    pub(super) fn forget(&mut self, id: u64) {
        // Numbers are unique over both protocols, and only one of the tables has this one.
        self.udp.forget(&self.epoll, id);
        if self.listeners.remove(&self.epoll, id) {
            let mut drained = Vec::new();
            for (flow_id, entry) in &mut self.flows {
                if entry.flow.published == Some(id) {
                    entry.flow.drain();
                    drained.push(*flow_id);
                }
            }
            for id in drained {
                self.advance(id);
            }
        }
    }

    /// The port to show a client with that has the gateway's address: the one that was not used for the longest time,
    /// so that the container's TCP is least likely to remember an earlier connection from it.
    fn next_port(&mut self) -> u16 {
        self.last_port = self.last_port.checked_add(1).unwrap_or(FIRST_PORT);
        self.last_port
    }

    /// Accepts clients of a published TCP port.
    fn accept(&mut self, published: u64) {
        let room = MAX_FLOWS.saturating_sub(self.flows.len());
        for Accepted { stream, client, target } in self.listeners.accept(&self.epoll, published, room) {
            let shown = self.addresses.as_client(client.ip(), target.ip());
            let port = if shown == client.ip().to_canonical() { client.port() } else { self.next_port() };
            let shown = SocketAddr::new(shown, port);
            let key = udp::free_key(target, shown, |key| self.by_key.contains_key(key));
            socket::tune(&stream);
            let (buffer, offload, now) = (self.buffer(), self.offload, self.now());
            let flow = stream
                .set_nonblocking(true)
                .ok()
                .and(key)
                .and_then(|key| Flow::inbound(key, stream, published, buffer, offload, now));
            if let Some(id) = flow.and_then(|flow| self.watch_and_insert(flow)) {
                self.advance(id);
            }
        }
    }

    /// Handles an event of a host's socket; `ending` as [`events::ending`] says.
    pub(super) fn host_ready(&mut self, token: Token, ending: bool) {
        let mut out = Vec::new();
        match token {
            Token::Tcp(id) => {
                if let Some(entry) = self.flows.get_mut(&id) {
                    entry.flow.host_ready(ending);
                }
                self.advance(id);
            }
            Token::Udp(id) => self.udp.receive(id, &mut self.scratch, &mut out),
            Token::Dns(id) => self.dns.receive_answer(&self.epoll, id, &mut out),
            Token::Echo(id) => self.echo.receive_replies(id, &mut self.scratch, MTU, &mut out),
            Token::Published(id) => {
                // The token does not tell the protocol; the other table does not know the number.
                self.udp.receive_published(id, &self.addresses, &mut self.scratch, &mut out);
                self.accept(id);
            }
            // Handled by the event loop.
            Token::Control | Token::Frontend | Token::Kick(_) | Token::Tap => {}
        }
        self.queue(out);
    }

    /// Lets a connection move data, and updates its timer and its places in the queues.
    fn advance(&mut self, id: u64) {
        let now = self.now();
        let room = MAX_OUT.saturating_sub(self.out.len());
        let Some(entry) = self.flows.get_mut(&id) else { return };
        if entry.flow.answer_queries(&mut self.dns.names(&self.addresses), now) {
            self.connect_name_server(id);
        }
        let Some(Entry { flow, timer, queued }) = self.flows.get_mut(&id) else { return };
        let mut out = Vec::new();
        let outcome = flow.advance(now, room, &mut out);
        if let Some(at) = timer.take() {
            self.timers.remove(&(at, id));
        }
        // Stopped by the limit, it may have more: it continues when the guest has taken frames.
        if out.len() >= room {
            self.waiting.insert(id);
        }
        if !*queued && matches!(outcome, Outcome::Open(_)) && flow.wants_to_send() {
            *queued = true;
            self.senders.push_back(id);
        }
        match outcome {
            Outcome::Open(at) => {
                *timer = at;
                if let Some(at) = at {
                    self.timers.insert((at, id));
                }
            }
            Outcome::Over => {
                if let Some(entry) = self.flows.remove(&id) {
                    self.by_key.remove(&entry.flow.key);
                }
                self.waiting.remove(&id);
                // A client that waits in a backlog may have its place. `senders` skips numbers that are gone.
                self.listeners.resume(&self.epoll);
            }
        }
        // Not through `queue`: a connection keeps to its room, and its frames must not be dropped.
        self.out.extend(out);
    }

    /// Sends the host's data to the guest, one burst for each connection in turn; tells if there is more, or no room
    /// for it.
    pub(super) fn send(&mut self, sink: &mut dyn FrameSink) -> Sent {
        let now = self.now();
        for _ in 0..self.senders.len() {
            let Some(id) = self.senders.pop_front() else { break };
            let Some(Entry { flow, timer, queued }) = self.flows.get_mut(&id) else { continue };
            // Its reason to send may be gone, for example because the guest has closed its window.
            let sent = if flow.wants_to_send() { flow.send(now, sink) } else { Sent::Idle };
            *queued = matches!(sent, Sent::More | Sent::Blocked);
            // Sending starts the retransmission timer, which may be due before everything else of the connection.
            if let Some(at) = flow.timer().filter(|at| timer.is_none_or(|timer| *at < timer)) {
                if let Some(timer) = timer.replace(at) {
                    self.timers.remove(&(timer, id));
                }
                self.timers.insert((at, id));
            }
            match sent {
                Sent::Idle => {}
                Sent::More => self.senders.push_back(id),
                // It keeps its turn for when the guest has buffers again.
                Sent::Blocked => {
                    self.senders.push_front(id);
                    return Sent::Blocked;
                }
                // The end of the data, or an error, is passed on right away.
                Sent::End => self.advance(id),
            }
        }
        if self.senders.is_empty() { Sent::Idle } else { Sent::More }
    }

    /// True if something waits for nothing but the guest's buffers.
    pub(super) fn has_output(&self) -> bool {
        !self.out.is_empty() || !self.senders.is_empty()
    }

    /// Queues frames of protocols without retransmission, which are dropped when the guest takes none.
    fn queue(&mut self, frames: impl IntoIterator<Item = Frame>) {
        for frame in frames {
            if self.out.len() < 2 * MAX_OUT {
                self.out.push_back(frame);
            }
        }
    }

    /// Advances connections that waited for room.
    pub(super) fn resume(&mut self) {
        // Only at half the limit, so that each gets more than a single frame through.
        if self.out.len() < MAX_OUT / 2 {
            for id in std::mem::take(&mut self.waiting) {
                self.advance(id);
            }
        }
    }

    /// Runs everything that is due.
    pub(super) fn run_timers(&mut self) {
        for id in std::mem::take(&mut self.acknowledged) {
            self.advance(id);
        }
        let now = self.now();
        let room = self.out.len() < MAX_OUT;
        while let Some((at, id)) = self.timers.first().copied()
            && at <= now
            && room
        {
            self.timers.remove(&(at, id));
            self.advance(id);
            if let Some((first, again)) = self.timers.first()
                && *again == id
                && *first <= now
            {
                // smoltcp is due again at once because it had no room: the next round continues.
                break;
            }
        }
        let mut out = Vec::new();
        if self.last_sweep.elapsed() > SWEEP_INTERVAL {
            self.last_sweep = Clock::now();
            self.udp.expire(self.last_sweep);
            self.echo.expire(self.last_sweep);
            // Accepting may have stopped for want of memory or descriptors elsewhere, which nothing here reports.
            self.listeners.resume(&self.epoll);
        }
        self.dns.expire(&self.epoll, Clock::now(), &mut out);
        self.queue(out);
    }

    /// Milliseconds until something is due, or -1 if nothing is.
    pub(super) fn timeout(&self) -> i32 {
        let tcp = self.timers.first().map(|(at, _)| (at.total_micros() - self.now().total_micros()).max(0) / 1000 + 1);
        let dns = self.dns.deadline().map(|at| at.saturating_duration_since(Clock::now()).as_millis() as i64 + 1);
        // A guest that takes no frames has to be waited for, whatever is due: else the loop would spin.
        let tcp = tcp.filter(|_| self.out.len() < MAX_OUT);
        let sweeps = !self.udp.is_empty() || !self.echo.is_empty() || self.listeners.is_paused();
        let sweep = sweeps.then_some(SWEEP_INTERVAL.as_millis() as i64);
        [tcp, dns, sweep].into_iter().flatten().min().map_or(-1, |ms| ms.clamp(0, 60_000) as i32)
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl Stack {
    /// Takes a frame of the guest that is not in guest memory.
    pub(super) fn receive_copy(&mut self, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        self.receive(&GuestFrame::in_slice(bytes.as_mut_slice().into()));
    }
}

#[cfg(test)]
impl Stack {
    /// True if no TCP connection is left, in any table.
    pub(super) fn is_empty(&self) -> bool {
        self.flows.is_empty() && self.by_key.is_empty() && self.timers.is_empty() && self.waiting.is_empty()
    }

    /// TCP connections at the moment.
    pub(super) fn flows(&self) -> usize {
        self.flows.len()
    }
}
