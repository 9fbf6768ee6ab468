//! What the guest sends, sorted to who serves it; the table of TCP connections with their timers.

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
    echo::Echo,
    events::{self, Token},
    fragments::Fragments,
    frame::{self, Frame, Payload},
    ip::Packet,
    published::{Arrival, Published},
    sender::{Receiver, Sent},
    socket,
    tcp::{Flow, Key, Offload, Outcome},
    udp::{self, Udp},
};

/// Most TCP connections at a time.
const MOST_FLOWS: usize = 8192;
/// Bytes held in each direction of a connection, by how many connections there are: all together at most half a
/// gigabyte, and only what was used is in memory.
const BUFFERS: [(usize, usize); 3] = [(128, 512 * 1024), (1024, 64 * 1024), (MOST_FLOWS, SMALL_BUFFER)];
const SMALL_BUFFER: usize = 16 * 1024;
/// Smallest port of a client that does not keep its own address.
const FIRST_PORT: u16 = 1024;
/// Frames that wait for the guest's buffers: TCP waits with them, everything else is dropped beyond.
const MOST_WAITING: usize = 256;
/// Pause between two looks for what is silent.
const SWEEP: Duration = Duration::from_secs(10);

/// Everything behind the wire.
pub(super) struct Stack {
    epoll: Arc<Epoll>,
    addresses: Addresses,
    begun: Clock,
    pub(super) offload: Offload,
    next: u64,
    flows: HashMap<u64, (Flow, Option<Instant>)>,
    by_key: HashMap<Key, u64>,
    timers: BTreeSet<(Instant, u64)>,
    /// Connections that had no room for their frames.
    waiting: BTreeSet<u64>,
    /// Connections that have data for the guest, in the order of their turns.
    senders: VecDeque<u64>,
    /// Connections whose data the guest has acknowledged.
    acknowledged: BTreeSet<u64>,
    published: Published,
    /// The last port of a client without an address of its own.
    port: u16,
    udp: Udp,
    echo: Echo,
    fragments: Fragments,
    swept: Clock,
    dns: Dns,
    /// Where one datagram is read at a time.
    scratch: Vec<u8>,
    /// Frames for the guest.
    pub(super) out: VecDeque<Frame>,
}

impl Stack {
    pub(super) fn new(epoll: Arc<Epoll>, addresses: Addresses) -> Self {
        Self {
            epoll,
            addresses,
            begun: Clock::now(),
            offload: Offload { checksum: false, segmentation: false },
            next: 0,
            flows: HashMap::new(),
            by_key: HashMap::new(),
            timers: BTreeSet::new(),
            waiting: BTreeSet::new(),
            senders: VecDeque::new(),
            acknowledged: BTreeSet::new(),
            published: Published::default(),
            port: FIRST_PORT,
            udp: Udp::default(),
            echo: Echo::default(),
            fragments: Fragments::default(),
            swept: Clock::now(),
            dns: Dns::default(),
            scratch: vec![0; usize::from(MTU)],
            out: VecDeque::new(),
        }
    }

    /// Whether no TCP connection is left.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.flows.is_empty() && self.by_key.is_empty() && self.timers.is_empty() && self.waiting.is_empty()
    }

    /// TCP connections at the moment.
    #[cfg(test)]
    pub(super) fn flows(&self) -> usize {
        self.flows.len()
    }

    fn now(&self) -> Instant {
        Instant::from_micros(self.begun.elapsed().as_micros() as i64)
    }

    /// A frame of the guest.
    pub(super) fn receive(&mut self, bytes: &[u8]) {
        match frame::parse(bytes, &self.addresses) {
            Some(Payload::Neighbour(reply)) => self.queue([reply]),
            Some(Payload::Packet(packet)) => self.receive_packet(&packet),
            Some(Payload::Part(part)) => {
                let whole = self.fragments.take(part, Clock::now());
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
            IpProtocol::Icmp | IpProtocol::Icmpv6 if self.addresses.is_guest(packet.source) => {
                let reply = self.echo.receive(&self.epoll, &self.addresses, packet);
                self.queue(reply);
            }
            _ => {}
        }
    }

    fn receive_udp(&mut self, packet: &Packet<'_>) {
        let Some((key, data)) = udp::parse(packet) else { return };
        // Only the guest itself begins something; what is behind it answers.
        let guest = self.addresses.is_guest(packet.source);
        if guest && self.addresses.is_dns(key.peer) {
            let mut out = Vec::new();
            self.dns.ask(&self.epoll, &self.addresses, key, data, &mut out);
            self.queue(out);
        } else {
            self.udp.send(&self.epoll, &self.addresses, key, data, guest);
        }
    }

    fn receive_tcp(&mut self, packet: &Packet<'_>) {
        // Nobody connects to a group, to everybody or to nobody, and the stack takes that for granted.
        if !is_unicast(packet.source) || !is_unicast(packet.destination) {
            return;
        }
        let Ok(tcp) = TcpPacket::new_checked(packet.payload()) else { return };
        if tcp.src_port() == 0 || tcp.dst_port() == 0 {
            return;
        }
        let key = Key {
            guest: SocketAddr::new(packet.source, tcp.src_port()),
            peer: SocketAddr::new(packet.destination, tcp.dst_port()),
        };
        let now = self.now();
        if let Some(id) = self.by_key.get(&key).copied() {
            // What only acknowledges is taken together with what else there is.
            if self.flows.get_mut(&id).is_some_and(|(flow, _)| flow.receive(packet.bytes, tcp.syn(), now)) {
                self.acknowledged.insert(id);
            } else {
                self.advance(id);
            }
        } else if self.addresses.is_guest(packet.source) {
            let begins = tcp.syn() && !tcp.ack() && !tcp.rst();
            if !begins || !self.connect(key, packet.bytes, now) {
                self.queue(Flow::refuse(packet.bytes.to_vec(), key, now));
            }
        }
    }

    /// Begins a connection; false when there can be none.
    fn connect(&mut self, key: Key, syn: &[u8], now: Instant) -> bool {
        if self.flows.len() >= MOST_FLOWS {
            return false;
        }
        if self.addresses.is_dns(key.peer) {
            let flow = Flow::names(key, syn.to_vec(), SMALL_BUFFER, self.offload, now);
            let id = self.insert(flow);
            self.advance(id);
            return true;
        }
        let Some(host) = self.addresses.on_host(key.peer).and_then(|address| socket::begin_tcp(address).ok()) else {
            return false;
        };
        let flow = Flow::outbound(key, syn.to_vec(), host, self.buffer(), self.offload, now);
        self.watch_and_insert(flow).is_some()
    }

    /// Connects to the host's name server for a connection whose question is not answered here.
    fn ask_server(&mut self, id: u64) {
        let server = socket::begin_tcp(self.dns.server()).ok();
        let watched = server.filter(|server| events::watch_edges(&self.epoll, server, Token::Tcp(id)).is_ok());
        if let Some((flow, _)) = self.flows.get_mut(&id) {
            match watched {
                Some(server) => flow.pass_on(server),
                None => flow.abort(),
            }
        }
    }

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
        self.flows.insert(id, (flow, None));
        id
    }

    /// Publishes a socket: listening for TCP, bound for UDP.
    pub(super) fn publish(&mut self, id: u64, transport: Transport, socket: OwnedFd, target: SocketAddr) {
        match transport {
            Transport::Tcp => self.published.add(&self.epoll, id, TcpListener::from(socket), target),
            Transport::Udp => self.udp.publish(&self.epoll, id, UdpSocket::from(socket), target),
        }
    }

    /// Ends a published port and what came through it.
    pub(super) fn forget(&mut self, id: u64) {
        self.udp.forget(&self.epoll, id);
        if self.published.remove(&self.epoll, id) {
            let flows = self.flows.iter_mut().filter(|(_, (flow, _))| flow.published == Some(id));
            let ended: Vec<_> = flows.map(|(id, (flow, _))| (flow.orphan(), *id).1).collect();
            for id in ended {
                self.advance(id);
            }
        }
    }

    /// A port for a client that does not keep its own address: the one that was not used for the longest time.
    fn turn_port(&mut self) -> u16 {
        self.port = self.port.checked_add(1).unwrap_or(FIRST_PORT);
        self.port
    }

    fn arrived(&mut self, published: u64) {
        let room = MOST_FLOWS.saturating_sub(self.flows.len());
        for Arrival { stream, client, target } in self.published.accept(&self.epoll, published, room) {
            let shown = self.addresses.as_client(client.ip(), target.ip());
            let port = if shown == client.ip().to_canonical() { client.port() } else { self.turn_port() };
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

    /// A host's socket has something to say; `ending` as [`events::ending`] says of it.
    pub(super) fn host_ready(&mut self, token: Token, ending: bool) {
        let mut out = Vec::new();
        match token {
            Token::Tcp(id) => {
                if let Some((flow, _)) = self.flows.get_mut(&id) {
                    flow.host_ready(ending);
                }
                self.advance(id);
            }
            Token::Udp(id) => self.udp.receive(id, &mut self.scratch, &mut out),
            Token::Dns(id) => self.dns.receive(&self.epoll, id, &mut out),
            Token::Echo(id) => self.echo.answered(id, &mut self.scratch, MTU, &mut out),
            Token::Published(id) => {
                self.udp.arrived(id, &self.addresses, &mut self.scratch, &mut out);
                self.arrived(id);
            }
            Token::Control | Token::Frontend | Token::Kick(_) | Token::Tap => {}
        }
        self.queue(out);
    }

    fn advance(&mut self, id: u64) {
        let now = self.now();
        let room = MOST_WAITING.saturating_sub(self.out.len());
        let Some((flow, _)) = self.flows.get_mut(&id) else { return };
        if flow.answer(&self.addresses, now) {
            self.ask_server(id);
        }
        let Some((flow, timer)) = self.flows.get_mut(&id) else { return };
        let mut out = Vec::new();
        let outcome = flow.advance(now, room, &mut out);
        if let Some(at) = timer.take() {
            self.timers.remove(&(at, id));
        }
        if out.len() >= room {
            self.waiting.insert(id);
        }
        if !flow.queued && matches!(outcome, Outcome::Open(_)) && flow.wants_to_send() {
            flow.queued = true;
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
                if let Some((flow, _)) = self.flows.remove(&id) {
                    self.by_key.remove(&flow.key);
                }
                self.waiting.remove(&id);
                self.published.resume(&self.epoll);
            }
        }
        // What a connection gives is bounded by its room.
        self.out.extend(out);
    }

    /// Gives the guest what the host's sockets have for it; whether there is more, or no room for it.
    pub(super) fn send(&mut self, receiver: &mut dyn Receiver) -> Sent {
        let now = self.now();
        for _ in 0..self.senders.len() {
            let Some(id) = self.senders.pop_front() else { break };
            let Some((flow, timer)) = self.flows.get_mut(&id) else { continue };
            let sent = if flow.wants_to_send() { flow.send(now, receiver) } else { Sent::Idle };
            flow.queued = matches!(sent, Sent::More | Sent::Blocked);
            if let Some(at) = flow.timer().filter(|at| timer.is_none_or(|timer| *at < timer)) {
                if let Some(timer) = timer.replace(at) {
                    self.timers.remove(&(timer, id));
                }
                self.timers.insert((at, id));
            }
            match sent {
                Sent::Idle => {}
                Sent::More => self.senders.push_back(id),
                Sent::Blocked => {
                    self.senders.push_front(id);
                    return Sent::Blocked;
                }
                Sent::End => self.advance(id),
            }
        }
        if self.senders.is_empty() { Sent::Idle } else { Sent::More }
    }

    /// Whether something waits for nothing but the guest's buffers.
    pub(super) fn has_output(&self) -> bool {
        !self.out.is_empty() || !self.senders.is_empty()
    }

    /// Frames that are not TCP data: dropped when the guest takes none.
    fn queue(&mut self, frames: impl IntoIterator<Item = Frame>) {
        for frame in frames {
            if self.out.len() < 2 * MOST_WAITING {
                self.out.push_back(frame);
            }
        }
    }

    /// Lets connections go on that waited for room.
    pub(super) fn resume(&mut self) {
        if self.out.len() < MOST_WAITING / 2 {
            for id in std::mem::take(&mut self.waiting) {
                self.advance(id);
            }
        }
    }

    /// Does what is due.
    pub(super) fn run_timers(&mut self) {
        for id in std::mem::take(&mut self.acknowledged) {
            self.advance(id);
        }
        let now = self.now();
        let room = self.out.len() < MOST_WAITING;
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
                // It has more to do than fits now; the next round continues.
                break;
            }
        }
        let mut out = Vec::new();
        if self.swept.elapsed() > SWEEP {
            self.swept = Clock::now();
            self.udp.sweep(self.swept);
            self.echo.sweep(self.swept);
            self.published.resume(&self.epoll);
        }
        self.dns.sweep(&self.epoll, Clock::now(), &mut out);
        self.queue(out);
    }

    /// Milliseconds until something is due, or -1.
    pub(super) fn timeout(&self) -> i32 {
        let tcp = self.timers.first().map(|(at, _)| (at.total_micros() - self.now().total_micros()).max(0) / 1000 + 1);
        let dns = self.dns.deadline().map(|at| at.saturating_duration_since(Clock::now()).as_millis() as i64 + 1);
        // A guest that takes no frames is waited for, whatever is due.
        let tcp = tcp.filter(|_| self.out.len() < MOST_WAITING);
        let silent = !self.udp.is_empty() || !self.echo.is_empty() || self.published.is_paused();
        let sweep = silent.then_some(SWEEP.as_millis() as i64);
        [tcp, dns, sweep].into_iter().flatten().min().map_or(-1, |ms| ms.clamp(0, 60_000) as i32)
    }
}
