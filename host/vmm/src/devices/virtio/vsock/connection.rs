//! The state machine of a connection, without a thread, a clock or a queue: the caller passes in events, packets and
//! the time.
//!
//! The two directions end independently. Bytes of the guest go straight to the host's stream, and through a buffer only
//! while the host is slower; bytes of the host go straight into a receive buffer of the guest when one is offered.
//! Packets that the connection owes the guest are flags, not a list, so a guest cannot make them pile up. Each is sent
//! when it is asked for one with [`Connection::next_packet`].

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

/// Time that the guest has to answer a request. Generous, since the guest may run under emulation.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Time that the guest has to confirm the end of a connection with an RST, before it is reset (5.10.6.5).
pub(super) const LINGER_TIMEOUT: Duration = Duration::from_secs(30);

/// Time until the first request for credit, and the maximum between later ones. The interval doubles in between.
const MIN_PROBE_INTERVAL: Duration = Duration::from_millis(2);
const MAX_PROBE_INTERVAL: Duration = Duration::from_millis(250);

/// Maximum capacity that an empty buffer keeps. A larger one is freed, or 1024 connections could hold 256 MiB for
/// nothing.
const MAX_IDLE_CAPACITY: usize = 16 << 10;

/// The identity of a connection: its two ports. The context IDs are fixed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

/// The phase of a connection's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host asks for a connection, and the guest has not answered.
    Requested,
    /// Data may flow in the directions that are open.
    Established,
    /// Nothing is left to transfer. The guest is informed by a SHUTDOWN, and its RST is awaited (5.10.6.5).
    Closing,
    /// An RST has to be sent to the guest, and nothing else happens any more.
    Reset,
    /// The guest has forgotten the connection, but its last bytes wait for a slow host reader.
    Orphaned,
    /// The connection is to be removed.
    Gone,
}

/// The direction from the guest to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inbound {
    Open,
    /// The guest sends no more, and buffered bytes have yet to be written.
    Draining,
    /// Everything is written, the end of the stream included.
    Closed,
    /// The host reads no more, and data is discarded.
    Refused,
}

/// The direction from the host to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outbound {
    Open,
    /// The end of the host's stream has been read, and everything before it is sent.
    Ended,
    /// The guest receives no more.
    Refused,
}

/// A packet for the guest, whose payload is in guest memory already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) op: Op,
    /// Flags of [`Op::Shutdown`].
    pub(super) flags: u32,
    /// Length of the payload in bytes.
    pub(super) len: usize,
}

impl Reply {
    fn control(op: Op) -> Self {
        Self { op, flags: 0, len: 0 }
    }
}

/// The requests for credit to a guest whose buffer is full.
#[derive(Debug)]
struct Probe {
    /// Time of the next request; `None` while there is credit.
    at: Option<Instant>,
    /// Time between that one and the one after it.
    interval: Duration,
}

/// An event of the host's stream.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Readiness {
    /// Bytes, or the end of the stream, can be read.
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// Both directions are over, or the stream failed.
    pub(super) hung_up: bool,
}

/// A connection between a port of the guest and a stream of the host.
#[expect(clippy::struct_excessive_bools, reason = "readiness and packets owed are independent; the phases are enums")]
#[derive(Debug)]
pub(super) struct Connection<S> {
    key: Key,
    stream: S,
    phase: Phase,
    inbound: Inbound,
    outbound: Outbound,
    /// The host is sent `OK <port>` when the guest accepts.
    announce: bool,
    peer: PeerCredit,
    own: OwnCredit,
    /// Bytes that the host has not accepted yet: at most `BUF_ALLOC` of the guest, and perhaps the `OK` line before
    /// them.
    buffer: VecDeque<u8>,
    /// Length of the part in front that is not the guest's and gives it no credit.
    uncounted: usize,
    /// The stream may have bytes to read; false only after it had none, until its next event.
    readable: bool,
    /// The stream may accept bytes; false only after it did not, until its next event.
    writable: bool,
    /// Both directions of the stream are over. The event comes once, so it is kept until it matters.
    hung_up: bool,
    /// Flags of the guest's SHUTDOWN packets. They are permanent (5.10.6.5).
    guest_shutdown: u32,
    /// Flags of the SHUTDOWN packets sent to the guest.
    shutdown_sent: u32,
    request_owed: bool,
    response_owed: bool,
    update_owed: bool,
    credit_request_owed: bool,
    /// The guest's answer is due, see [`REQUEST_TIMEOUT`] and [`LINGER_TIMEOUT`].
    deadline: Option<Instant>,
    probe: Probe,
}

impl<S: HostStream> Connection<S> {
    /// Creates a connection that the host opens. With `announce`, the host is sent `OK <port>` when the guest accepts.
    pub(super) fn from_host(key: Key, stream: S, announce: bool, now: Instant) -> Self {
        let mut connection = Self::new(key, stream, Phase::Requested, PeerCredit::new(0));
        connection.announce = announce;
        connection.request_owed = true;
        connection.deadline = Some(now + REQUEST_TIMEOUT);
        connection
    }

    /// Creates a connection that the guest opened with the packet `request`. Its host stream is open already. With
    /// `announce`, the host is sent `OK <port>`.
    pub(super) fn from_guest(key: Key, stream: S, announce: bool, request: &Header) -> Self {
        let mut connection = Self::new(key, stream, Phase::Established, PeerCredit::new(request.buf_alloc));
        connection.response_owed = true;
        if announce {
            connection.announce_port(key.guest_port);
        }
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
            // Assumed, since an event may have come before the stream was watched. The first attempt finds out.
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

    /// Returns `buf_alloc` and `fwd_cnt` for a packet that is sent now.
    pub(super) fn stamp(&mut self) -> (u32, u32) {
        self.own.stamp()
    }

    /// Time of the next action of [`Self::expire`].
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        match (self.deadline, self.probe.at) {
            (Some(deadline), Some(probe)) => Some(deadline.min(probe)),
            (deadline, probe) => deadline.or(probe),
        }
    }

    /// Handles the deadlines that have passed.
    pub(super) fn expire(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.abort();
        }
        if self.probe.at.is_some_and(|at| at <= now) {
            // The guest does not always announce that it made room, and may drop a request: so it is asked again and
            // again, ever more rarely, as long as the host has something for it.
            self.credit_request_owed = true;
            self.probe.at = Some(now + self.probe.interval);
            self.probe.interval = (self.probe.interval * 2).min(MAX_PROBE_INTERVAL);
        }
    }

    /// Handles a packet of the guest for this connection. `payload` is only used for [`Op::Rw`].
    pub(super) fn receive(&mut self, op: Op, header: &Header, payload: &[Segment<'_>], now: Instant) {
        match (self.phase, op) {
            (Phase::Orphaned | Phase::Gone, _) => return,
            // An RST ends the connection in every other phase, also one that is about to be reset.
            (_, Op::Rst) => return self.reset_by_guest(),
            (Phase::Reset, _) => return,
            (Phase::Requested, Op::Response) => {
                // The first announcement of the guest's buffer.
                self.peer.update(header.buf_alloc, header.fwd_cnt);
                self.accepted();
            }
            // Data before an answer, or an answer to nothing: the guest and this side disagree about the connection.
            (Phase::Requested, _) | (_, Op::Request | Op::Response) => self.abort(),
            (Phase::Established | Phase::Closing, _) => {
                // Every packet carries the credit, so CREDIT_UPDATE needs no more than this (5.10.6.3).
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

    /// Handles an event of the host stream.
    pub(super) fn ready(&mut self, readiness: Readiness, now: Instant) {
        // After a hangup calls do not block any more; they return what is left, and then errors.
        self.readable |= readiness.readable || readiness.hung_up;
        self.writable |= readiness.writable || readiness.hung_up;
        self.hung_up |= readiness.hung_up;
        if readiness.hung_up {
            match self.phase {
                // A client that closed its stream before the guest answered. One that has written something and left,
                // as `printf … | nc` does, is still served.
                Phase::Requested if self.stream.is_abandoned() => self.abort(),
                // Nothing reads the guest's bytes any more. The host's last bytes are still read and sent.
                Phase::Established | Phase::Orphaned => self.refuse_inbound(),
                _ => {}
            }
        }
        self.flush();
        self.settle(now);
    }

    /// Ends the connection at once. The guest is sent an RST, if it knows the connection.
    pub(super) fn abort(&mut self) {
        match self.phase {
            Phase::Orphaned | Phase::Gone | Phase::Reset => {}
            // The request was never sent.
            Phase::Requested if self.request_owed => self.finish(Phase::Gone),
            Phase::Requested | Phase::Established | Phase::Closing => self.finish(Phase::Reset),
        }
    }

    /// True if [`Self::next_packet`] probably returns a packet. The host's stream is not asked, so it may have nothing.
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

    /// Returns the next packet for the guest, whose payload, if any, has been read from the host into `space`.
    pub(super) fn next_packet(&mut self, space: &[Segment<'_>], now: Instant) -> Option<Reply> {
        if self.phase == Phase::Requested {
            return std::mem::take(&mut self.request_owed).then_some(Reply::control(Op::Request));
        }
        if matches!(self.phase, Phase::Orphaned | Phase::Gone) {
            return None;
        }
        // Before any data: the guest's socket is not connected until it has received this.
        if std::mem::take(&mut self.response_owed) && self.phase != Phase::Reset {
            return Some(Reply::control(Op::Response));
        }
        // Data before control packets, since each carries the credit as well. A SHUTDOWN must come after the last data
        // anyway.
        let reply = self.read_packet(space);
        self.settle(now);
        reply.or_else(|| self.control_packet())
    }

    fn control_packet(&mut self) -> Option<Reply> {
        // The last packet of the connection. Whatever else was owed is of no interest to the guest any more.
        if self.phase == Phase::Reset {
            self.phase = Phase::Gone;
            return Some(Reply::control(Op::Rst));
        }
        let flags = self.shutdown_owed();
        if flags != 0 {
            // The flags sent earlier are repeated; they are permanent in any case.
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

    /// Reads from the host straight into guest memory: one call for one packet.
    fn read_packet(&mut self, space: &[Segment<'_>]) -> Option<Reply> {
        let room = self.peer.room();
        if !self.wants_to_read() || room == 0 || space.is_empty() {
            return None;
        }
        // The guest's buffer may be larger than its credit.
        let result = if segments::total(space) <= room {
            self.stream.read(space)
        } else {
            let mut allowed = Vec::with_capacity(space.len());
            segments::window(space.iter().copied(), 0, room, &mut allowed);
            self.stream.read(&allowed)
        };
        match result {
            // `space` is not empty, so this is the end of the stream.
            Ok(0) => self.outbound = Outbound::Ended,
            Ok(len) => {
                self.peer.sent(len);
                return Some(Reply { op: Op::Rw, flags: 0, len });
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => self.readable = false,
            // A reset by the host's program. Then nothing reads the guest's bytes, either.
            Err(_) => {
                self.outbound = Outbound::Ended;
                self.refuse_inbound();
            }
        }
        None
    }

    /// Opens the connection: the guest has accepted it.
    fn accepted(&mut self) {
        self.phase = Phase::Established;
        self.deadline = None;
        if self.announce {
            self.announce_port(self.key.host_port);
        }
        // The client left meanwhile. Its bytes are still sent, but there is no reader for the guest's.
        if self.hung_up {
            self.refuse_inbound();
        }
    }

    /// Sends the host `OK <port>`, through the buffer like the guest's bytes, so that these come behind it.
    fn announce_port(&mut self, port: u32) {
        let answer = hybrid::answer(port);
        self.uncounted = answer.len();
        self.buffer.extend(answer);
        self.flush();
    }

    /// Passes the payload of a packet on to the host, as far as it accepts it, and keeps the rest.
    fn take_data(&mut self, payload: &[Segment<'_>]) {
        // Data after the guest announced its end, or beyond its credit, violates the protocol. Accepting the latter
        // would let the guest decide about this process's memory.
        let len = segments::total(payload);
        let open = self.guest_shutdown & SHUTDOWN_SEND == 0;
        if !open || self.own.receive(len).is_err() {
            return self.abort();
        }
        // Straight from guest memory. Not past bytes that already wait, or the order would change. A second round is
        // needed only for a payload of more pieces than one call takes, or when the stream accepts part of it.
        let mut done = 0;
        let mut rest = Vec::new();
        while done < len && self.inbound == Inbound::Open && self.buffer.is_empty() && self.writable {
            let result = if done == 0 {
                self.stream.write(payload)
            } else {
                segments::window(payload.iter().copied(), done, len - done, &mut rest);
                self.stream.write(&rest)
            };
            done += self.written(result);
        }
        // Written bytes are credit again at once, discarded ones as well. Buffered ones are when they are written.
        self.own.forward(done);
        if self.inbound == Inbound::Open {
            self.hold(payload, done, len - done);
        } else {
            self.own.forward(len - done);
        }
    }

    /// Copies the bytes that the host has not accepted into the buffer.
    fn hold(&mut self, payload: &[Segment<'_>], skip: usize, len: usize) {
        if len == 0 {
            return;
        }
        let mut rest = Vec::new();
        segments::window(payload.iter().copied(), skip, len, &mut rest);
        let mut bytes = vec![0; len];
        segments::copy_out(&rest, &mut bytes);
        self.buffer.extend(bytes);
    }

    /// Writes buffered bytes, as far as the host accepts them.
    fn flush(&mut self) {
        while !self.buffer.is_empty() && self.writable {
            // Both halves of the ring buffer in one call.
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

    /// Handles the result of a write and returns the number of bytes written.
    fn written(&mut self, result: std::io::Result<usize>) -> usize {
        match result {
            Ok(len) if len > 0 => return len,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => self.writable = false,
            // The host's program reads no more. That ends this direction only: it may still write.
            Ok(_) | Err(_) => self.refuse_inbound(),
        }
        0
    }

    /// Removes bytes from the front of the buffer, which returns their credit to the guest.
    fn drop_buffered(&mut self, len: usize) {
        self.buffer.drain(..len);
        let uncounted = len.min(self.uncounted);
        self.uncounted -= uncounted;
        self.own.forward(len - uncounted);
    }

    /// Ends the direction to the host, because nothing there reads any more. The guest is sent a SHUTDOWN (RECEIVE).
    fn refuse_inbound(&mut self) {
        // A direction that has ended properly needs no more than that.
        if self.inbound != Inbound::Closed {
            self.inbound = Inbound::Refused;
        }
        self.drop_buffered(self.buffer.len());
    }

    /// Handles a SHUTDOWN of the guest. Each direction ends when its flag has come.
    fn shut_down_by_guest(&mut self, flags: u32) {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && self.inbound == Inbound::Open {
            self.inbound = Inbound::Draining;
        }
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 && self.outbound == Outbound::Open {
            // The host's program finds out by its next write.
            self.outbound = Outbound::Refused;
            if self.phase == Phase::Established {
                self.stream.shutdown_read();
            }
        }
    }

    /// Handles an RST of the guest, which ends the connection there.
    fn reset_by_guest(&mut self) {
        let bytes_wait = !self.buffer.is_empty() && self.inbound != Inbound::Refused;
        if matches!(self.phase, Phase::Established) && bytes_wait {
            // The guest may end a connection this way as soon as it has sent everything. Its bytes still have to reach
            // a slow reader.
            self.inbound = Inbound::Draining;
            self.stream.shutdown_read();
            self.enter_phase(Phase::Orphaned);
        } else {
            self.finish(Phase::Gone);
        }
    }

    /// Flags that have to be sent to the guest in a SHUTDOWN.
    fn shutdown_owed(&self) -> u32 {
        let mut flags = 0;
        if self.outbound == Outbound::Ended {
            flags |= SHUTDOWN_SEND;
        }
        if self.inbound == Inbound::Refused {
            flags |= SHUTDOWN_RECEIVE;
        }
        // A direction that the guest ended is announced, too: both flags together ask it for its RST (5.10.6.5).
        if self.phase == Phase::Closing {
            flags = SHUTDOWN_BOTH;
        }
        flags & !self.shutdown_sent
    }

    /// Makes the transitions that follow from a change. Must be called after each event and packet.
    fn settle(&mut self, now: Instant) {
        // Without credit nothing is read, so the end of the stream is looked for: it needs no credit and must not wait
        // for it.
        if self.wants_to_read() && self.peer.room() == 0 && self.stream.is_at_end() {
            self.outbound = Outbound::Ended;
        }
        // The guest's half-close reaches the host behind its last byte.
        if self.inbound == Inbound::Draining && self.buffer.is_empty() {
            self.inbound = Inbound::Closed;
            self.stream.shutdown_write();
        }
        let inbound_done = matches!(self.inbound, Inbound::Closed | Inbound::Refused);
        match self.phase {
            Phase::Orphaned if inbound_done => self.finish(Phase::Gone),
            // Both directions are over. The guest confirms it with an RST, so that neither side uses the ports again
            // while the other still knows the old connection (5.10.6.5).
            Phase::Established if inbound_done && self.outbound != Outbound::Open => {
                self.finish(Phase::Closing);
                self.deadline = Some(now + LINGER_TIMEOUT);
            }
            _ => {}
        }
        // The guest has announced both ends itself, so it waits for the RST of this side.
        if self.phase == Phase::Closing && self.guest_shutdown == SHUTDOWN_BOTH {
            self.finish(Phase::Reset);
        }
        self.watch_credit(now);
    }

    /// Starts or stops the requests for credit.
    fn watch_credit(&mut self, now: Instant) {
        if !self.wants_to_read() || self.peer.room() > 0 {
            self.probe = Probe { at: None, interval: MIN_PROBE_INTERVAL };
            self.credit_request_owed = false;
        } else if self.probe.at.is_none() {
            // At once only if no update can be expected. Otherwise the guest sends one when it has read a good part,
            // and a request for each filled buffer would double the packets.
            self.credit_request_owed = self.peer.must_ask();
            self.probe.at = Some(now + self.probe.interval);
        }
    }

    /// Ends the host stream and enters a phase in which no data flows.
    fn finish(&mut self, phase: Phase) {
        if matches!(self.phase, Phase::Requested | Phase::Established | Phase::Orphaned) {
            self.stream.finish();
        }
        self.buffer = VecDeque::new();
        self.uncounted = 0;
        self.enter_phase(phase);
    }

    /// Enters a phase in which only packets that belong to the phase are sent.
    fn enter_phase(&mut self, phase: Phase) {
        self.phase = phase;
        self.deadline = None;
        self.probe.at = None;
        self.update_owed = false;
        self.credit_request_owed = false;
    }
}

#[cfg(test)]
impl<S> Connection<S> {
    /// Number of bytes held for the host reader.
    pub(super) fn buffered(&self) -> usize {
        self.buffer.len()
    }
}
