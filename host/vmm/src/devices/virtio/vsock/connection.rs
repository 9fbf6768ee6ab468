//! One connection's state machine: no thread, no clock, no queue. The caller brings events, packets and the time.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{
    credit::{OwnCredit, PeerCredit},
    hybrid,
    packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND},
    segments::{self, Segment},
    stream::HostStream,
};

/// How long the guest may take to answer a request. Generous: the guest may run under emulation.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the guest may take to confirm an end that both sides know of.
pub(super) const LINGER_TIMEOUT: Duration = Duration::from_secs(30);

/// Pause before the first and between the last attempts to learn whether a guest made room.
const MIN_PROBE_INTERVAL: Duration = Duration::from_millis(2);
const MAX_PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// Buffers that grew beyond this are given back when they are empty.
const MAX_IDLE_CAPACITY: usize = 16 << 10;

/// Names a connection: the two ports. The context ids are fixed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The host's port.
    pub(super) host_port: u32,
    /// The guest's port.
    pub(super) guest_port: u32,
}

/// Where the connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host asked; the guest has not answered.
    Requested,
    /// Data may flow in the directions that are open.
    Established,
    /// Nothing is left to transfer, the guest is told so, its RST is awaited.
    Closing,
    /// The guest is owed an RST; nothing else happens any more.
    Reset,
    /// The guest knows nothing of it any more, but its last bytes wait for a slow host reader.
    Orphaned,
    /// To be removed.
    Gone,
}

/// The direction from the guest to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inbound {
    Open,
    /// The guest sends no more; buffered bytes have yet to be written.
    Draining,
    /// All written, and the host reader was given the end of the stream.
    Closed,
    /// The host reads no more; what still comes is thrown away.
    Refused,
}

/// The direction from the host to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outbound {
    Open,
    /// The host sent the end of the stream, and all before it is on its way.
    Ended,
    /// The guest receives no more.
    Refused,
}

/// A packet for the guest; its payload is in guest memory already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    /// Operation.
    pub(super) op: Op,
    /// Flags of a shutdown.
    pub(super) flags: u32,
    /// Bytes of payload.
    pub(super) len: usize,
}

impl Reply {
    fn control(op: Op) -> Self {
        Self { op, flags: 0, len: 0 }
    }
}

/// Asking a guest for credit.
#[derive(Debug)]
struct Probe {
    /// When to ask; `None` while the guest has room.
    at: Option<Instant>,
    interval: Duration,
}

/// What happened on the host's side.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Readiness {
    /// Bytes or the end of the stream can be read.
    pub(super) readable: bool,
    /// Bytes can be written.
    pub(super) writable: bool,
    /// Both directions are over, or the stream failed.
    pub(super) hung_up: bool,
}

/// A stream between a port of the guest and a host stream.
#[derive(Debug)]
pub(super) struct Connection<S> {
    key: Key,
    stream: S,
    phase: Phase,
    inbound: Inbound,
    outbound: Outbound,
    /// Write `OK <port>` to the host when the guest accepts.
    announce: bool,
    peer: PeerCredit,
    own: OwnCredit,
    /// Bytes for the host that it did not take yet, at most `BUF_ALLOC` of the guest's.
    buffer: VecDeque<u8>,
    /// How many of them, in front, are not the guest's.
    uncounted: usize,
    readable: bool,
    writable: bool,
    /// Both directions of the stream are over; said once, so it is kept for when it matters.
    hung_up: bool,
    guest_shutdown: u32,
    shutdown_sent: u32,
    request_owed: bool,
    response_owed: bool,
    update_owed: bool,
    credit_request_owed: bool,
    deadline: Option<Instant>,
    probe: Probe,
}

impl<S: HostStream> Connection<S> {
    /// A connection that the host opens. With `announce`, the host is told `OK <port>` when the guest accepts.
    pub(super) fn from_host(key: Key, stream: S, announce: bool, now: Instant) -> Self {
        let mut connection = Self::new(key, stream, Phase::Requested, PeerCredit::new(0));
        connection.announce = announce;
        connection.request_owed = true;
        connection.deadline = Some(now + REQUEST_TIMEOUT);
        connection
    }

    /// A connection that the guest opened with the packet `request`, and whose host end is open already.
    pub(super) fn from_guest(key: Key, stream: S, request: &Header) -> Self {
        let mut connection = Self::new(key, stream, Phase::Established, PeerCredit::new(request.buf_alloc));
        connection.response_owed = true;
        connection
    }

    fn new(key: Key, stream: S, phase: Phase, peer: PeerCredit) -> Self {
        Self {
            key,
            stream,
            phase,
            inbound: Inbound::Open,
            outbound: Outbound::Open,
            announce: false,
            peer,
            own: OwnCredit::default(),
            buffer: VecDeque::new(),
            uncounted: 0,
            // Optimistic: the first attempt finds out.
            readable: true,
            writable: true,
            hung_up: false,
            guest_shutdown: 0,
            shutdown_sent: 0,
            request_owed: false,
            response_owed: false,
            update_owed: false,
            credit_request_owed: false,
            deadline: None,
            probe: Probe { at: None, interval: MIN_PROBE_INTERVAL },
        }
    }

    pub(super) fn key(&self) -> Key {
        self.key
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn stream(&self) -> &S {
        &self.stream
    }

    /// Bytes held for the host reader.
    #[cfg(test)]
    pub(super) fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// The `buf_alloc` and `fwd_cnt` for a packet that goes out now.
    pub(super) fn stamp(&mut self) -> (u32, u32) {
        self.own.stamp()
    }

    /// When [`Self::expire`] has something to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        match (self.deadline, self.probe.at) {
            (Some(deadline), Some(probe)) => Some(deadline.min(probe)),
            (deadline, probe) => deadline.or(probe),
        }
    }

    /// Lets time pass.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.abort();
        }
        if self.probe.at.is_some_and(|at| at <= now) {
            self.credit_request_owed = true;
            self.probe.at = Some(now + self.probe.interval);
            self.probe.interval = (self.probe.interval * 2).min(MAX_PROBE_INTERVAL);
        }
    }

    /// A packet of the guest for this connection. `payload` is the packet's, and only looked at for [`Op::Rw`].
    pub(super) fn receive(&mut self, op: Op, header: &Header, payload: &[Segment<'_>], now: Instant) {
        match (self.phase, op) {
            (Phase::Orphaned | Phase::Gone, _) => return,
            (_, Op::Rst) => return self.reset_by_guest(),
            (Phase::Reset, _) => return,
            (Phase::Requested, Op::Response) => {
                self.peer.update(header.buf_alloc, header.fwd_cnt);
                self.accepted();
            }
            (Phase::Requested, _) | (_, Op::Request | Op::Response) => self.abort(),
            (Phase::Established | Phase::Closing, _) => {
                self.peer.update(header.buf_alloc, header.fwd_cnt);
                match op {
                    Op::Rw => self.take_data(payload),
                    Op::Shutdown => self.shut_down_by_guest(header.flags),
                    Op::CreditRequest => self.update_owed = true,
                    _ => {}
                }
            }
        }
        self.settle(now);
    }

    /// Something happened to the host stream.
    pub(super) fn ready(&mut self, readiness: Readiness, now: Instant) {
        self.readable |= readiness.readable || readiness.hung_up;
        self.writable |= readiness.writable || readiness.hung_up;
        self.hung_up |= readiness.hung_up;
        if readiness.hung_up {
            match self.phase {
                Phase::Requested if self.stream.is_abandoned() => self.abort(),
                Phase::Established | Phase::Orphaned => self.refuse_inbound(),
                _ => {}
            }
        }
        self.flush();
        self.settle(now);
    }

    /// Ends the connection at once; the guest, if it ever heard of it, gets an RST.
    pub(super) fn abort(&mut self) {
        match self.phase {
            Phase::Orphaned | Phase::Gone | Phase::Reset => {}
            Phase::Requested if self.request_owed => self.finish(Phase::Gone),
            Phase::Requested | Phase::Established | Phase::Closing => self.finish(Phase::Reset),
        }
    }

    /// True if [`Self::next_packet`] is likely to answer with a packet.
    pub(super) fn wants_to_send(&self) -> bool {
        match self.phase {
            Phase::Requested => self.request_owed,
            Phase::Reset => true,
            Phase::Established | Phase::Closing => {
                self.response_owed
                    || self.shutdown_owed() != 0
                    || self.update_owed
                    || self.own.update_due()
                    || self.credit_request_owed
                    || (self.wants_to_read() && self.peer.room() > 0)
            }
            Phase::Orphaned | Phase::Gone => false,
        }
    }

    /// The next packet for the guest. Its payload, if any, is read from the host into `space`.
    pub(super) fn next_packet(&mut self, space: &[Segment<'_>], now: Instant) -> Option<Reply> {
        if self.phase == Phase::Requested {
            return std::mem::take(&mut self.request_owed).then_some(Reply::control(Op::Request));
        }
        if matches!(self.phase, Phase::Orphaned | Phase::Gone) {
            return None;
        }
        if std::mem::take(&mut self.response_owed) && self.phase != Phase::Reset {
            return Some(Reply::control(Op::Response));
        }
        let reply = self.read_packet(space);
        self.settle(now);
        reply.or_else(|| self.control_packet())
    }

    fn control_packet(&mut self) -> Option<Reply> {
        if self.phase == Phase::Reset {
            self.phase = Phase::Gone;
            return Some(Reply::control(Op::Rst));
        }
        let flags = self.shutdown_owed();
        if flags != 0 {
            self.shutdown_sent |= flags;
            return Some(Reply { op: Op::Shutdown, flags: self.shutdown_sent, len: 0 });
        }
        if std::mem::take(&mut self.update_owed) || self.own.update_due() {
            return Some(Reply::control(Op::CreditUpdate));
        }
        std::mem::take(&mut self.credit_request_owed).then_some(Reply::control(Op::CreditRequest))
    }

    fn wants_to_read(&self) -> bool {
        self.phase == Phase::Established && self.outbound == Outbound::Open && self.readable
    }

    /// Reads from the host straight into guest memory: one call, one packet.
    fn read_packet(&mut self, space: &[Segment<'_>]) -> Option<Reply> {
        let room = self.peer.room();
        if !self.wants_to_read() || room == 0 || space.is_empty() {
            return None;
        }
        let result = if segments::total(space) <= room {
            self.stream.read(space)
        } else {
            let mut allowed = Vec::with_capacity(space.len());
            segments::window(space, 0, room, &mut allowed);
            self.stream.read(&allowed)
        };
        match result {
            Ok(0) => self.outbound = Outbound::Ended,
            Ok(len) => {
                self.peer.sent(len);
                return Some(Reply { op: Op::Rw, flags: 0, len });
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => self.readable = false,
            Err(_) => {
                self.outbound = Outbound::Ended;
                self.refuse_inbound();
            }
        }
        None
    }

    fn accepted(&mut self) {
        self.phase = Phase::Established;
        self.deadline = None;
        if self.announce {
            let answer = hybrid::answer(self.key.host_port);
            self.uncounted = answer.len();
            self.buffer.extend(answer);
            self.flush();
        }
        if self.hung_up {
            self.refuse_inbound();
        }
    }

    fn take_data(&mut self, payload: &[Segment<'_>]) {
        let len = segments::total(payload);
        let open = self.guest_shutdown & SHUTDOWN_SEND == 0;
        if !open || self.own.receive(len).is_err() {
            return self.abort();
        }
        let mut done = 0;
        let mut rest = Vec::new();
        while done < len && self.inbound == Inbound::Open && self.buffer.is_empty() && self.writable {
            let result = if done == 0 {
                self.stream.write(payload)
            } else {
                segments::window(payload, done, len - done, &mut rest);
                self.stream.write(&rest)
            };
            done += self.written(result);
        }
        self.own.forward(done);
        if self.inbound == Inbound::Open {
            self.hold(payload, done, len - done);
        } else {
            self.own.forward(len - done);
        }
    }

    /// Keeps what the host did not take yet.
    fn hold(&mut self, payload: &[Segment<'_>], skip: usize, len: usize) {
        if len == 0 {
            return;
        }
        let mut rest = Vec::new();
        segments::window(payload, skip, len, &mut rest);
        let mut bytes = vec![0; len];
        segments::copy_out(&rest, &mut bytes);
        self.buffer.extend(bytes);
    }

    /// Writes buffered bytes as far as the host takes them.
    fn flush(&mut self) {
        while !self.buffer.is_empty() && self.writable {
            let (first, second) = self.buffer.as_slices();
            let result = self.stream.write_bytes(first, second);
            let len = self.written(result);
            // A failed write has emptied the buffer.
            self.drop_buffered(len.min(self.buffer.len()));
        }
        if self.buffer.is_empty() && self.buffer.capacity() > MAX_IDLE_CAPACITY {
            self.buffer = VecDeque::new();
        }
    }

    /// Judges a write; returns the bytes written.
    fn written(&mut self, result: std::io::Result<usize>) -> usize {
        match result {
            Ok(len) if len > 0 => return len,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => self.writable = false,
            Ok(_) | Err(_) => self.refuse_inbound(),
        }
        0
    }

    /// Removes bytes from the front of the buffer and gives the guest its credit back.
    fn drop_buffered(&mut self, len: usize) {
        self.buffer.drain(..len);
        let uncounted = len.min(self.uncounted);
        self.uncounted -= uncounted;
        self.own.forward(len - uncounted);
    }

    fn refuse_inbound(&mut self) {
        if self.inbound != Inbound::Closed {
            self.inbound = Inbound::Refused;
        }
        self.drop_buffered(self.buffer.len());
    }

    fn shut_down_by_guest(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && self.inbound == Inbound::Open {
            self.inbound = Inbound::Draining;
        }
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 && self.outbound == Outbound::Open {
            self.outbound = Outbound::Refused;
            if self.phase == Phase::Established {
                self.stream.shutdown_read();
            }
        }
    }

    fn reset_by_guest(&mut self) {
        let bytes_wait = !self.buffer.is_empty() && self.inbound != Inbound::Refused;
        if matches!(self.phase, Phase::Established) && bytes_wait {
            // What the guest wrote before it left still reaches a slow reader.
            self.inbound = Inbound::Draining;
            self.stream.shutdown_read();
            self.enter_phase(Phase::Orphaned);
        } else {
            self.finish(Phase::Gone);
        }
    }

    /// `SHUTDOWN` flags that the guest has yet to hear.
    fn shutdown_owed(&self) -> u32 {
        let mut flags = 0;
        if self.outbound == Outbound::Ended {
            flags |= SHUTDOWN_SEND;
        }
        if self.inbound == Inbound::Refused {
            flags |= SHUTDOWN_RECEIVE;
        }
        if self.phase == Phase::Closing {
            flags = SHUTDOWN_BOTH;
        }
        flags & !self.shutdown_sent
    }

    /// Draws the conclusions from whatever changed.
    fn settle(&mut self, now: Instant) {
        // The end of the stream needs no credit, so it must not wait for any.
        if self.wants_to_read() && self.peer.room() == 0 && self.stream.is_at_end() {
            self.outbound = Outbound::Ended;
        }
        if self.inbound == Inbound::Draining && self.buffer.is_empty() {
            self.inbound = Inbound::Closed;
            self.stream.shutdown_write();
        }
        let inbound_done = matches!(self.inbound, Inbound::Closed | Inbound::Refused);
        match self.phase {
            Phase::Orphaned if inbound_done => self.finish(Phase::Gone),
            Phase::Established if inbound_done && self.outbound != Outbound::Open => {
                self.finish(Phase::Closing);
                self.deadline = Some(now + LINGER_TIMEOUT);
            }
            _ => {}
        }
        if self.phase == Phase::Closing && self.guest_shutdown == SHUTDOWN_BOTH {
            self.finish(Phase::Reset);
        }
        self.watch_credit(now);
    }

    /// Starts or stops asking for credit.
    fn watch_credit(&mut self, now: Instant) {
        if !self.wants_to_read() || self.peer.room() > 0 {
            self.probe = Probe { at: None, interval: MIN_PROBE_INTERVAL };
            self.credit_request_owed = false;
        } else if self.probe.at.is_none() {
            self.credit_request_owed = self.peer.must_ask();
            self.probe.at = Some(now + self.probe.interval);
        }
    }

    /// Ends the host stream and goes to a phase in which no data flows.
    fn finish(&mut self, phase: Phase) {
        if matches!(self.phase, Phase::Requested | Phase::Established | Phase::Orphaned) {
            self.stream.finish();
        }
        self.buffer = VecDeque::new();
        self.uncounted = 0;
        self.enter_phase(phase);
    }

    /// Goes to a phase in which the guest is told nothing more but what belongs to the phase.
    fn enter_phase(&mut self, phase: Phase) {
        self.phase = phase;
        self.deadline = None;
        self.probe.at = None;
        self.update_owed = false;
        self.credit_request_owed = false;
    }
}
