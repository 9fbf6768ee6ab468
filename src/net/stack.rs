//! What the guest sends, sorted to who serves it; the table of TCP connections with their timers.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    net::SocketAddrV4,
    sync::Arc,
    time::{Duration, Instant as Clock},
};

use smoltcp::{
    time::Instant,
    wire::{IpProtocol, Ipv4Packet, TcpPacket},
};
use vmm_sys_util::epoll::Epoll;

use super::{
    addresses::{DNS_PORT, GATEWAY, GUEST, is_ours, on_host},
    dns::Dns,
    events::{self, Token},
    frame::{self, Frame, Payload},
    socket,
    tcp::{Flow, Key, Offload, Outcome},
    udp::{self, Udp},
};

/// Most TCP connections at a time.
const MOST_FLOWS: usize = 4096;
/// Bytes held in each direction of a connection while there are few of them …
const LARGE_BUFFER: usize = 512 * 1024;
/// … and when there are many.
const SMALL_BUFFER: usize = 64 * 1024;
const FEW: usize = 128;
/// Frames that wait for the guest's buffers: TCP waits with them, everything else is dropped beyond.
const MOST_WAITING: usize = 256;
/// Pause between two looks for silent UDP associations.
const SWEEP: Duration = Duration::from_secs(10);

/// Everything behind the wire.
pub(super) struct Stack {
    epoll: Arc<Epoll>,
    begun: Clock,
    pub(super) offload: Offload,
    next: u64,
    flows: HashMap<u64, (Flow, Option<Instant>)>,
    by_key: HashMap<Key, u64>,
    timers: BTreeSet<(Instant, u64)>,
    /// Connections that had no room for their frames.
    waiting: BTreeSet<u64>,
    udp: Udp,
    swept: Clock,
    dns: Dns,
    /// Frames for the guest.
    pub(super) out: VecDeque<Frame>,
}

impl Stack {
    pub(super) fn new(epoll: Arc<Epoll>) -> Self {
        Self {
            epoll,
            begun: Clock::now(),
            offload: Offload { checksum: false, segmentation: false },
            next: 0,
            flows: HashMap::new(),
            by_key: HashMap::new(),
            timers: BTreeSet::new(),
            waiting: BTreeSet::new(),
            udp: Udp::default(),
            swept: Clock::now(),
            dns: Dns::default(),
            out: VecDeque::new(),
        }
    }

    /// Whether no TCP connection is left.
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.flows.is_empty() && self.by_key.is_empty() && self.timers.is_empty() && self.waiting.is_empty()
    }

    fn now(&self) -> Instant {
        Instant::from_micros(self.begun.elapsed().as_micros() as i64)
    }

    /// A frame of the guest.
    pub(super) fn receive(&mut self, bytes: &[u8]) {
        match frame::parse(bytes) {
            Some(Payload::Arp { sender_mac, sender, target }) => {
                self.queue([frame::arp_reply(sender_mac, sender, target)]);
            }
            Some(Payload::Ipv4(packet)) => self.receive_packet(packet),
            None => {}
        }
    }

    fn receive_packet(&mut self, packet: &[u8]) {
        let Ok(ip) = Ipv4Packet::new_checked(packet) else { return };
        if ip.src_addr() != GUEST {
            return;
        }
        match ip.next_header() {
            IpProtocol::Tcp => self.receive_tcp(packet),
            IpProtocol::Udp => self.receive_udp(packet),
            IpProtocol::Icmp if is_ours(ip.dst_addr()) => self.queue(frame::echo_reply(packet)),
            _ => {}
        }
    }

    fn receive_udp(&mut self, packet: &[u8]) {
        let Some((key, data)) = udp::parse(packet) else { return };
        if *key.destination.ip() == GATEWAY && key.destination.port() == DNS_PORT {
            let mut out = Vec::new();
            self.dns.ask(&self.epoll, key, data, &mut out);
            self.queue(out);
        } else {
            self.udp.send(&self.epoll, key, data);
        }
    }

    fn receive_tcp(&mut self, packet: &[u8]) {
        let Ok(ip) = Ipv4Packet::new_checked(packet) else { return };
        let Ok(tcp) = TcpPacket::new_checked(ip.payload()) else { return };
        if tcp.src_port() == 0 || tcp.dst_port() == 0 {
            return;
        }
        let key = Key {
            guest: SocketAddrV4::new(ip.src_addr(), tcp.src_port()),
            destination: SocketAddrV4::new(ip.dst_addr(), tcp.dst_port()),
        };
        let now = self.now();
        if let Some(id) = self.by_key.get(&key).copied() {
            if let Some((flow, _)) = self.flows.get_mut(&id) {
                flow.receive(packet, now);
            }
            self.advance(id);
        } else if tcp.syn() && !tcp.ack() && !tcp.rst() && self.connect(key, packet, now) {
        } else {
            self.queue(Flow::refuse(packet.to_vec(), key, now));
        }
    }

    /// Begins a connection; false when there can be none.
    fn connect(&mut self, key: Key, syn: &[u8], now: Instant) -> bool {
        if self.flows.len() >= MOST_FLOWS {
            return false;
        }
        let dns = *key.destination.ip() == GATEWAY && key.destination.port() == DNS_PORT;
        let destination = if dns { Some(self.dns.server()) } else { on_host(key.destination) };
        let Some(host) = destination.and_then(|address| socket::begin_tcp(address).ok()) else { return false };
        let buffer = if self.flows.len() < FEW { LARGE_BUFFER } else { SMALL_BUFFER };
        let flow = Flow::new(key, syn.to_vec(), host, buffer, self.offload, now);
        let id = self.next;
        self.next += 1;
        if flow.host().is_none_or(|host| events::watch_edges(&self.epoll, host, Token::Tcp(id)).is_err()) {
            return false;
        }
        self.by_key.insert(key, id);
        self.flows.insert(id, (flow, None));
        true
    }

    /// A host's socket has something to say.
    pub(super) fn host_ready(&mut self, token: Token) {
        let mut out = Vec::new();
        match token {
            Token::Tcp(id) => {
                if let Some((flow, _)) = self.flows.get_mut(&id) {
                    flow.host_ready();
                }
                self.advance(id);
            }
            Token::Udp(id) => self.udp.receive(id, &mut out),
            Token::Dns(id) => self.dns.receive(&self.epoll, id, &mut out),
            Token::Control | Token::Kick(_) => {}
        }
        self.queue(out);
    }

    fn advance(&mut self, id: u64) {
        let now = self.now();
        let room = MOST_WAITING.saturating_sub(self.out.len());
        let Some((flow, timer)) = self.flows.get_mut(&id) else { return };
        let mut out = Vec::new();
        let outcome = flow.advance(now, room, &mut out);
        if let Some(at) = timer.take() {
            self.timers.remove(&(at, id));
        }
        if out.len() >= room {
            self.waiting.insert(id);
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
            }
        }
        // What a connection gives is bounded by its room.
        self.out.extend(out);
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
        let udp = (!self.udp.is_empty()).then_some(SWEEP.as_millis() as i64);
        [tcp, dns, udp].into_iter().flatten().min().map_or(-1, |ms| ms.clamp(0, 60_000) as i32)
    }
}
