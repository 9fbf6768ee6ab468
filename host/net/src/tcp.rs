//! One TCP connection: a stack's socket towards the guest, a host's socket towards the world.
//!
//! Of a connection that the guest begins, the host's part is made first: the guest's SYN waits for it, so that the guest
//! sees a refusal as a refusal. Of one that comes in through a published port, the host's part is there; when the guest
//! refuses its own, the client sees a reset. A connection to the name server gets a host's part when there is a question
//! that cannot be answered here.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
};

use smoltcp::{
    iface::{Interface, SocketHandle, SocketSet},
    socket::tcp::{Socket, SocketBuffer, State},
    time::{Duration, Instant},
};

use super::{
    addresses::Addresses,
    dns::{Next, Questions},
    frame::{self, ETHERNET_HEADER, Frame},
    offload::{offload_tcp, raise_segment_size, segment_of},
    sender::{Receiver, Sender, Sent},
    socket,
    window::Sent as Window,
    wire::{Wire, interface},
};

/// Data in one segment between the stack and the guest, at most: what is left of a packet by the longest headers.
pub(super) const SEGMENT: u16 = 65_475;

/// A guest that does not acknowledge for so long is gone.
const SILENCE: Duration = Duration::from_secs(300);
/// A container that does not answer for so long accepts no connection.
const CONNECT: Duration = Duration::from_secs(60);
/// First pause before a FIN is repeated.
const FIN_PAUSE: Duration = Duration::from_millis(1500);
/// New beginnings of a connection that a guest mistakes for an earlier one.
const RETRIES: u8 = 4;
/// How long the stack may not hear of acknowledgements of data that it knows nothing of: both are there.
const UNHEARD: Duration = Duration::from_secs(10);
/// Bytes of the stack's buffer for data that does not go through it.
const UNUSED: usize = 64;
/// A quiet connection is asked whether it is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(75);

/// The two ends as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The guest's end.
    pub(super) guest: SocketAddr,
    /// The end that the guest believes to be elsewhere.
    pub(super) peer: SocketAddr,
}

/// What the queues agreed on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offload {
    /// The guest completes checksums.
    pub(super) checksum: bool,
    /// The guest cuts segments.
    pub(super) segmentation: bool,
}

/// A connection.
pub(super) struct Flow {
    pub(super) key: Key,
    host: Option<TcpStream>,
    /// What the name server was asked and has not answered or passed on.
    questions: Option<Questions>,
    /// What was passed on and the host's socket has not taken.
    backlog: Vec<u8>,
    /// The guest's SYN, until the host's connection is made.
    syn: Option<Vec<u8>>,
    /// The published port that it came through.
    pub(super) published: Option<u64>,
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    wire: Wire,
    offload: Offload,
    /// Data in one segment as the guest's end announced it.
    segment: u16,
    /// What goes to the guest, where the host's kernel can do it without the stack.
    sender: Option<Sender>,
    /// Waits for its turn to send.
    pub(super) queued: bool,
    /// When the stack was last told of a packet.
    heard: Instant,
    readable: bool,
    writable: bool,
    /// The host's end may have more than one look shows, see [`super::events::ending`]: its last byte for instance …
    ending: bool,
    /// … and it was.
    host_ended: bool,
    /// The guest's end has.
    guest_fin: bool,
    /// The guest's end has, and the host's end knows.
    guest_ended: bool,
    /// The host's socket failed.
    broken: bool,
    /// The guest's end is gone; only what it sent is left to be handed on.
    orphaned: bool,
    /// Further SYNs after answers that belong to an earlier connection.
    retries: u8,
    /// Our last segment with a FIN that the guest has not acknowledged.
    fin: Option<Fin>,
    /// How far we have sent.
    sent: Window,
}

/// What repeats a FIN.
///
/// The stack forgets to when the segment is lost whose acknowledgements make it believe in a fast retransmission.
struct Fin {
    frame: Frame,
    again: Instant,
    pause: Duration,
}

/// What became of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It goes on; the stack wants to be called again at this time.
    Open(Option<Instant>),
    /// It is over.
    Over,
}

impl Flow {
    /// A connection that begins with this SYN, towards a host's connection that has begun.
    pub(super) fn outbound(
        key: Key,
        mut syn: Vec<u8>,
        host: TcpStream,
        buffer: usize,
        offload: Offload,
        now: Instant,
    ) -> Self {
        let mut flow = Self::new(key, Some(host), buffer, offload, now);
        flow.learn_segment(&mut syn);
        flow.hear(&mut syn, now);
        flow.syn = Some(syn);
        flow
    }

    /// A connection to the name server that begins with this SYN.
    pub(super) fn names(key: Key, mut syn: Vec<u8>, buffer: usize, offload: Offload, now: Instant) -> Self {
        let mut flow = Self::new(key, None, buffer, offload, now);
        flow.learn_segment(&mut syn);
        flow.questions = Some(Questions::default());
        let peer = flow.key.peer;
        let _ = flow.socket().listen(peer);
        flow.wire.incoming = Some(syn);
        flow
    }

    /// Answers what can be answered here; true when the rest needs a connection to the host's name server, see
    /// [`Self::pass_on`].
    pub(super) fn answer(&mut self, addresses: &Addresses, now: Instant) -> bool {
        if self.questions.is_none() {
            return false;
        }
        // What has arrived may be a question.
        self.poll(now, usize::MAX);
        let (guest, Some(questions)) = (self.sockets.get_mut::<Socket<'_>>(self.handle), &mut self.questions) else {
            return false;
        };
        loop {
            if guest.can_recv() && questions.room() > 0 {
                let room = questions.room();
                let _ = guest.recv(|data| {
                    let data = &data[..data.len().min(room)];
                    questions.take(data);
                    (data.len(), ())
                });
            }
            // An answer is shorter than the buffer for it, so it needs only time.
            if guest.send_queue() > 0 {
                return false;
            }
            match questions.next(addresses) {
                Next::Wait => break,
                Next::Forward => return true,
                Next::Answer(bytes) => {
                    let _ = guest.send_slice(&bytes);
                }
            }
        }
        if guest.state() == State::CloseWait && guest.recv_queue() == 0 {
            guest.close();
        }
        false
    }

    /// Lets the host's name server answer, to which a connection has begun.
    pub(super) fn pass_on(&mut self, server: TcpStream) {
        self.backlog = self.questions.take().map(Questions::into_bytes).unwrap_or_default();
        self.host = Some(server);
    }

    /// A connection that came in through a published port.
    pub(super) fn inbound(
        key: Key,
        host: TcpStream,
        published: u64,
        buffer: usize,
        offload: Offload,
        now: Instant,
    ) -> Option<Self> {
        let mut flow = Self::new(key, Some(host), buffer, offload, now);
        flow.published = Some(published);
        flow.socket().set_timeout(Some(CONNECT));
        flow.knock().then_some(flow)
    }

    fn new(key: Key, host: Option<TcpStream>, buffer: usize, offload: Offload, now: Instant) -> Self {
        let mut wire = Wire { incoming: None, outgoing: Vec::new(), room: usize::MAX };
        let interface = interface(key, &mut wire, now);
        let whole = offload.segmentation && offload.checksum;
        let sender = host.as_ref().filter(|_| whole).and_then(|host| Sender::new(key, host));
        let sent = if sender.is_some() { UNUSED } else { buffer };
        let mut socket = Socket::new(SocketBuffer::new(vec![0; buffer]), SocketBuffer::new(vec![0; sent]));
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket.set_timeout(Some(SILENCE));
        socket.set_keep_alive(Some(KEEP_ALIVE));
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Self {
            key,
            host,
            questions: None,
            backlog: Vec::new(),
            syn: None,
            published: None,
            interface,
            sockets,
            handle,
            wire,
            offload,
            segment: SEGMENT,
            sender,
            queued: false,
            heard: now,
            readable: false,
            writable: false,
            ending: false,
            host_ended: false,
            guest_fin: false,
            guest_ended: false,
            broken: false,
            orphaned: false,
            retries: 0,
            fin: None,
            sent: Window::default(),
        }
    }

    /// Takes from a SYN how long the segments may be that reach the guest's end.
    fn learn_segment(&mut self, syn: &mut [u8]) {
        if self.offload.segmentation {
            self.segment = raise_segment_size(syn, SEGMENT);
        }
    }

    /// The answer to a packet that belongs to no connection: a reset, unless it is one itself.
    pub(super) fn refuse(packet: Vec<u8>, key: Key, now: Instant) -> Vec<Frame> {
        let mut wire = Wire { incoming: Some(packet), outgoing: Vec::new(), room: usize::MAX };
        interface(key, &mut wire, now).poll(now, &mut wire, &mut SocketSet::new(Vec::new()));
        let mut frames = wire.outgoing;
        for frame in &mut frames {
            offload_tcp(frame, SEGMENT, false);
        }
        frames
    }

    /// The host's socket, to be watched.
    pub(super) fn host(&self) -> Option<&TcpStream> {
        self.host.as_ref()
    }

    /// Whether a packet of the guest says nothing but what the sender has taken from it.
    fn hear(&mut self, packet: &mut [u8], now: Instant) -> bool {
        let (Some(sender), Some(tcp)) = (&mut self.sender, segment_of(packet)) else { return false };
        sender.hear(tcp, now)
    }

    /// A packet of the guest; `syn` if it begins a connection or accepts one. True when it only acknowledges.
    pub(super) fn receive(&mut self, packet: &[u8], syn: bool, now: Instant) -> bool {
        // While the host's connection is being made the guest only repeats its SYN.
        if self.syn.is_some() {
            return false;
        }
        let mut buffer = frame::buffer(packet.len());
        buffer.copy_from_slice(packet);
        let mut packet = buffer;
        let knocking = self.socket().state() == State::SynSent;
        if syn && knocking {
            self.learn_segment(&mut packet);
            self.socket().set_timeout(Some(SILENCE));
        }
        if self.hear(&mut packet, now) && self.carries() && now < self.heard + UNHEARD {
            frame::recycle(packet);
            return true;
        }
        self.heard = now;
        if self.sender.is_none()
            && let Some(segment) = segment_of(&mut packet)
        {
            self.sent.keep_open(segment);
        }
        self.wire.incoming = Some(packet);
        self.poll(now, usize::MAX);
        if knocking && self.socket().state() == State::SynSent && self.retries < RETRIES {
            self.retries += 1;
            self.knock();
        }
        false
    }

    /// Whether data may go to the guest.
    fn carries(&mut self) -> bool {
        matches!(self.socket().state(), State::Established | State::CloseWait)
    }

    /// Whether [`Self::send`] has anything to do.
    pub(super) fn wants_to_send(&mut self) -> bool {
        let readable = self.readable && !self.host_ended;
        self.sender.as_ref().is_some_and(|sender| sender.wants(readable)) && !self.broken && self.carries()
    }

    /// Sends to the guest what the host's end has for it.
    pub(super) fn send(&mut self, now: Instant, receiver: &mut dyn Receiver) -> Sent {
        let (Some(sender), Some(host)) = (&mut self.sender, &self.host) else { return Sent::Idle };
        match sender.send(host, (&mut self.readable, self.ending), self.segment, now, receiver) {
            Ok(Sent::End) => self.host_ended = true,
            Ok(sent) => return sent,
            Err(_) => self.abort(),
        }
        Sent::End
    }

    /// When what was sent has to be looked after.
    pub(super) fn timer(&mut self) -> Option<Instant> {
        if self.carries() { self.sender.as_ref().and_then(Sender::timer) } else { None }
    }

    /// Begins the guest's part of an inbound connection, with a new sequence number each time.
    ///
    /// A guest that remembers an earlier connection of the same two ends answers a SYN that looks older with what it
    /// remembers, and forgets it with our reset (RFC 9293, 3.10.7.3; RFC 1122, 4.2.2.13): the next SYN is welcome,
    /// and need not wait for a time-out.
    fn knock(&mut self) -> bool {
        let (guest, peer) = (self.key.guest, self.key.peer);
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        socket.abort();
        socket.connect(self.interface.context(), guest, peer).is_ok()
    }

    /// Its published port is gone, and the container with it: what the container has sent still reaches the client.
    pub(super) fn orphan(&mut self) {
        self.orphaned = true;
    }

    /// Ends it, for both sides.
    pub(super) fn abort(&mut self) {
        self.broken = true;
        self.socket().abort();
    }

    /// The host's socket became ready; `ending` as its event says.
    pub(super) fn host_ready(&mut self, ending: bool) {
        self.ending |= ending;
        self.readable = true;
        self.writable = true;
    }

    /// Moves what can be moved; at most `room` frames go into `out`.
    pub(super) fn advance(&mut self, now: Instant, room: usize, out: &mut Vec<Frame>) -> Outcome {
        if self.syn.is_some() && !self.begin(now) {
            self.hand_over(now, out);
            return Outcome::Over;
        }
        if self.syn.is_some() {
            return Outcome::Open(None);
        }
        loop {
            self.poll(now, room);
            match self.move_data() {
                Ok(true) => {}
                Ok(false) => break,
                Err(_) => {
                    self.abort();
                    break;
                }
            }
        }
        let orphan_done = self.orphaned && self.socket().recv_queue() == 0 && (self.guest_ended || !self.guest_fin);
        if orphan_done {
            self.socket().abort();
        }
        self.poll(now, room);
        self.hand_over(now, out);
        if orphan_done {
            // A reset would take back what the client has yet to read.
            self.close(true);
            return Outcome::Over;
        }
        let again = self.repeat_fin(now, out);
        if self.carries()
            && let Some(sender) = &mut self.sender
        {
            out.extend(sender.expire(now));
        }
        // Nothing is lost between here and the guest, so nobody has to wait in TIME-WAIT for repetitions.
        let closed = matches!(self.socket().state(), State::Closed | State::TimeWait | State::Listen);
        // The guest may be done while the host's end has yet to take what it sent.
        let draining = self.guest_fin && self.host_ended && !self.guest_ended && !self.broken;
        if !closed || draining {
            let next = self.interface.poll_at(now, &self.sockets);
            return Outcome::Open(next.into_iter().chain(again).chain(self.timer()).min());
        }
        self.close(self.host_ended && self.guest_ended);
        Outcome::Over
    }

    /// Whether the host's connection is made or still can be; answers the SYN in both ends' cases.
    fn begin(&mut self, now: Instant) -> bool {
        if !self.writable {
            return true;
        }
        let Some(host) = &self.host else { return false };
        let refused = match host.take_error() {
            Ok(None) => host.peer_addr().is_err_and(|error| error.kind() != io::ErrorKind::NotConnected),
            _ => true,
        };
        if !refused && host.peer_addr().is_err() {
            self.writable = false;
            return true;
        }
        self.wire.incoming = self.syn.take();
        if !refused {
            let peer = self.key.peer;
            let _ = self.socket().listen(peer);
        }
        self.poll(now, usize::MAX);
        !refused
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    fn poll(&mut self, now: Instant, room: usize) {
        self.wire.room = room;
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
    }

    /// Moves data both ways once; true when something moved.
    fn move_data(&mut self) -> io::Result<bool> {
        let (guest, Some(host)) = (self.sockets.get_mut::<Socket<'_>>(self.handle), &mut self.host) else {
            return Ok(false);
        };
        let mut moved = false;
        while self.writable && !self.backlog.is_empty() {
            match host.write(&self.backlog) {
                Ok(len) => drop(self.backlog.drain(..len)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        while self.writable && self.backlog.is_empty() && guest.can_recv() {
            match guest.recv(|data| match host.write(data) {
                Ok(len) => (len, Ok(len)),
                Err(error) => (0, Err(error)),
            }) {
                Ok(Ok(len)) => moved |= len > 0,
                Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        if let Some(sender) = &mut self.sender {
            sender.discard(host, self.host_ended)?;
            if self.host_ended && sender.is_empty() && guest.may_send() {
                guest.close();
                moved = true;
            }
        }
        while self.sender.is_none() && self.readable && !self.host_ended && guest.can_send() {
            match guest.send(|space| match host.read(space) {
                Ok(len) => (len, Ok(len)),
                Err(error) => (0, Err(error)),
            }) {
                Ok(Ok(0)) => {
                    self.host_ended = true;
                    guest.close();
                    moved = true;
                }
                Ok(Ok(_)) => moved = true,
                Ok(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => break,
            }
        }
        self.guest_fin |= matches!(guest.state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
        if self.guest_fin && !self.guest_ended && guest.recv_queue() == 0 && self.backlog.is_empty() {
            self.guest_ended = true;
            moved = true;
            host.shutdown(Shutdown::Write)?;
        }
        Ok(moved)
    }

    fn hand_over(&mut self, now: Instant, out: &mut Vec<Frame>) {
        for mut frame in self.wire.outgoing.drain(..) {
            let mut fin = false;
            if let Some(segment) = segment_of(&mut frame.bytes[ETHERNET_HEADER..]) {
                fin = has_fin(segment);
                match &mut self.sender {
                    Some(sender) => sender.speak(segment),
                    None => self.sent.note(segment),
                }
            }
            offload_tcp(&mut frame, self.segment, self.offload.checksum);
            if fin {
                let pause = self.fin.as_ref().map_or(FIN_PAUSE, |fin| fin.pause);
                self.fin = Some(Fin { frame: frame.clone(), again: now + pause, pause });
            }
            out.push(frame);
        }
    }

    /// Sends a FIN again whose acknowledgement is overdue; when to look next.
    fn repeat_fin(&mut self, now: Instant, out: &mut Vec<Frame>) -> Option<Instant> {
        let state = self.socket().state();
        if !matches!(state, State::FinWait1 | State::Closing | State::LastAck) {
            self.fin = None;
        }
        let data = self.socket().send_queue();
        let fin = self.fin.as_mut()?;
        // As long as there is data before it, the stack repeats both.
        if data == 0 && fin.again <= now {
            fin.pause = (fin.pause * 2).min(FIN_PAUSE * 32);
            fin.again = now + fin.pause;
            out.push(fin.frame.clone());
        }
        Some(fin.again)
    }

    /// Closes the host's socket, in order or with a reset.
    fn close(&mut self, orderly: bool) {
        let Some(host) = self.host.take() else { return };
        if orderly {
            // What nobody has taken would make the kernel end the connection with a reset (RFC 2525, 2.17).
            let _ = socket::discard(&host, i32::MAX as usize);
        } else {
            socket::reset(host);
        }
    }
}

fn has_fin(segment: &[u8]) -> bool {
    const FIN: u8 = 1;
    segment.get(13).is_some_and(|flags| flags & FIN != 0)
}
