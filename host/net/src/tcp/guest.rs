//! The guest's end of a TCP connection: smoltcp's socket, on an interface of its own, as the peer of the guest's TCP.

use smoltcp::{
    iface::{Interface, SocketHandle, SocketSet},
    socket::tcp::{Socket, SocketBuffer, State},
    time::{Duration, Instant},
};

use super::{bulk::Segment, retransmit::FinTimer, sender::Sender, window::WindowGuard};
use crate::{
    frame::{self, ETHERNET_HEADER, Frame},
    key::Key,
    offload::{Offload, SEGMENT, offload_tcp, raise_mss, segment_of},
    phy::{Wire, interface},
};

/// Time without an acknowledgement after which the guest counts as gone.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(300);
/// Time that a container has to answer the SYN of a published port's connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval at which a quiet guest is asked whether it still has the connection (RFC 9293, 3.8.4).
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(75);
/// Longest time for which acknowledgements are kept from smoltcp: well below both of the above, which need them.
const ACK_INTERVAL: Duration = Duration::from_secs(10);
/// SYNs that are sent again to a guest that takes them for an earlier connection's.
const MAX_RETRIES: u8 = 4;
/// Size of smoltcp's send buffer while a [`Sender`] does its work.
const UNUSED_BUFFER: usize = 64;

/// State of the guest's direction: what of its data has been passed on to the host's socket.
///
/// smoltcp's own state says what was agreed with the guest's TCP; it may be at the end before this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guest {
    /// Our SYN is not answered yet; only for a published port's connection.
    Connecting { retries: u8 },
    /// The guest may send.
    Open,
    /// The guest has sent a FIN; data before it may wait for the host's socket.
    Finished,
    /// Everything was passed on, and the host's socket is shut down for writing.
    Ended,
}

/// The guest's end of one connection.
pub(super) struct GuestEnd {
    pub(super) state: Guest,
    key: Key,
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    wire: Wire,
    offload: Offload,
    /// The maximum segment size that the guest's end announced, in bytes of data.
    pub(super) mss: u16,
    /// Sends to the guest in smoltcp's place, where the host's kernel and the guest can do it.
    pub(super) sender: Option<Sender>,
    window: WindowGuard,
    fin: Option<FinTimer>,
    /// The last time that smoltcp was given a packet.
    last_input: Instant,
}

impl GuestEnd {
    /// An end that is neither connected nor listening, with `buffer` bytes for each direction.
    pub(super) fn new(key: Key, sender: Option<Sender>, buffer: usize, offload: Offload, now: Instant) -> Self {
        let mut wire = Wire::new();
        let interface = interface(key, &mut wire, now);
        // smoltcp's send buffer holds nothing while a sender works, but smoltcp wants one.
        let send_buffer = if sender.is_some() { UNUSED_BUFFER } else { buffer };
        let mut socket = Socket::new(SocketBuffer::new(vec![0; buffer]), SocketBuffer::new(vec![0; send_buffer]));
        // Delays save packets on a network. Here they would only add to the round trip: the far end's TCP and the
        // host's have gathered the data already.
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        // A guest that was reset or has lost its container's network without a word ends its connections by these two.
        socket.set_timeout(Some(SILENCE_TIMEOUT));
        socket.set_keep_alive(Some(KEEP_ALIVE_INTERVAL));
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Self {
            state: Guest::Open,
            key,
            interface,
            sockets,
            handle,
            wire,
            offload,
            mss: SEGMENT,
            sender,
            window: WindowGuard::default(),
            fin: None,
            last_input: now,
        }
    }

    /// Learns from the guest's SYN or SYN|ACK, which is also prepared for smoltcp.
    pub(super) fn on_syn(&mut self, syn: &mut [u8], now: Instant) {
        self.learn_mss(syn);
        if let (Some(sender), Some(segment)) = (&mut self.sender, segment_of(syn)) {
            sender.on_ack(segment, now);
        }
    }

    /// Takes the maximum segment size from a SYN. smoltcp gets to see a larger one: it makes long segments, and the
    /// guest's kernel cuts them to the true size.
    fn learn_mss(&mut self, syn: &mut [u8]) {
        if self.offload.segmentation {
            self.mss = raise_mss(syn, SEGMENT);
        }
    }

    /// Listens for the guest's SYN, which the next [`Self::poll`] answers.
    pub(super) fn accept(&mut self, syn: Vec<u8>) {
        let peer = self.key.peer;
        // Fails only for a port of zero, whose packets go no further than the stack.
        let _ = self.socket().listen(peer);
        self.wire.incoming = Some(syn);
    }

    /// Has the next [`Self::poll`] answer the guest's SYN with a reset, because no socket listens.
    pub(super) fn refuse(&mut self, syn: Vec<u8>) {
        self.wire.incoming = Some(syn);
    }

    /// Connects to the guest, for a published port; false if that is impossible.
    pub(super) fn connect(&mut self) -> bool {
        self.state = Guest::Connecting { retries: 0 };
        self.socket().set_timeout(Some(CONNECT_TIMEOUT));
        self.send_syn()
    }

    /// Starts over with another SYN, whose sequence number is new.
    ///
    /// A guest that remembers an earlier connection of the same two ends answers a SYN that looks older with what it
    /// remembers, and forgets it with our reset (RFC 9293, 3.10.7.3; RFC 1122, 4.2.2.13). The next SYN is welcome, and
    /// the client does not have to wait for a timeout.
    fn retry_connect(&mut self, retries: u8) {
        self.state = Guest::Connecting { retries };
        self.send_syn();
    }

    fn send_syn(&mut self) -> bool {
        let (guest, peer) = (self.key.guest, self.key.peer);
        let socket = self.sockets.get_mut::<Socket<'_>>(self.handle);
        // `connect` demands a closed socket. Its reset is never sent, because the socket is in use again before the
        // next poll.
        socket.abort();
        socket.connect(self.interface.context(), guest, peer).is_ok()
    }

    /// Takes a packet of the guest; `syn` if it opens or accepts the connection. True if smoltcp did not have to see
    /// it, because it only acknowledges.
    pub(super) fn receive(&mut self, packet: &[u8], syn: bool, now: Instant) -> bool {
        let mut buffer = frame::buffer(packet.len());
        buffer.copy_from_slice(packet);
        let mut packet = buffer;
        // The guest's SYN|ACK. From here on the ordinary timeout holds.
        if syn && matches!(self.state, Guest::Connecting { .. }) {
            self.learn_mss(&mut packet);
            self.socket().set_timeout(Some(SILENCE_TIMEOUT));
        }
        // First to the sender, which takes in acknowledgements and rewrites the packet for smoltcp.
        let only_ack = match (&mut self.sender, segment_of(&mut packet)) {
            (Some(sender), Some(segment)) => sender.on_ack(segment, now),
            _ => false,
        };
        // During the handshake and the close an acknowledgement changes smoltcp's state. From time to time it has to
        // see one anyway, or it would take the guest for gone.
        if only_ack && self.is_established() && now < self.last_input + ACK_INTERVAL {
            frame::recycle(packet);
            return true;
        }
        self.last_input = now;
        if self.sender.is_none()
            && let Some(segment) = segment_of(&mut packet)
        {
            self.window.keep_open(segment);
        }
        // Not bounded by room: a packet brings one answer at most, and must not be lost here.
        self.wire.incoming = Some(packet);
        self.poll(now, usize::MAX);
        if let Guest::Connecting { retries } = self.state {
            // Accepted, or refused: then smoltcp is closed, and the connection ends with its next turn.
            if self.socket().state() != State::SynSent {
                self.state = Guest::Open;
            } else if retries < MAX_RETRIES {
                // smoltcp has answered with a reset and waits on.
                self.retry_connect(retries + 1);
            }
        }
        false
    }

    /// True if a segment may go to the host's socket without smoltcp: everything before it is there, and smoltcp has heard
    /// of the guest not long ago.
    pub(super) fn may_bypass(&mut self, segment: &Segment, now: Instant) -> bool {
        self.state == Guest::Open
            && self.sender.as_mut().is_some_and(|sender| sender.expects(segment.sequence))
            && now < self.last_input + ACK_INTERVAL
            && self.socket().state() == State::Established
            && self.socket().recv_queue() == 0
    }

    /// Lets smoltcp process what has arrived and emit packets, until `room` of them wait.
    pub(super) fn poll(&mut self, now: Instant, room: usize) {
        self.wire.room = room;
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
    }

    /// The next time that smoltcp has something to do.
    pub(super) fn poll_at(&mut self, now: Instant) -> Option<Instant> {
        self.interface.poll_at(now, &self.sockets)
    }

    pub(super) fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// smoltcp's socket, and the sender that takes its place.
    pub(super) fn parts(&mut self) -> (&mut Socket<'static>, Option<&mut Sender>) {
        (self.sockets.get_mut(self.handle), self.sender.as_mut())
    }

    /// True while data may go to the guest.
    pub(super) fn is_established(&mut self) -> bool {
        matches!(self.socket().state(), State::Established | State::CloseWait)
    }

    /// True if smoltcp needs nothing more from the guest.
    pub(super) fn is_closed(&mut self) -> bool {
        // A reset during the handshake brings a listening socket back to LISTEN. In TIME-WAIT a late repetition of the
        // guest's FIN would be answered, but nothing is lost between the guest and here that would make it repeat one.
        matches!(self.socket().state(), State::Closed | State::TimeWait | State::Listen)
    }

    /// True once the guest's FIN has arrived (RFC 9293, 3.3.2).
    pub(super) fn fin_received(&mut self) -> bool {
        matches!(self.socket().state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait)
    }

    /// Finishes the frames that smoltcp has emitted, and moves them to `out`.
    pub(super) fn drain_frames(&mut self, now: Instant, out: &mut Vec<Frame>) {
        for mut frame in self.wire.outgoing.drain(..) {
            let mut fin = false;
            if let Some(segment) = segment_of(&mut frame.bytes[ETHERNET_HEADER..]) {
                fin = carries_fin(segment);
                match &mut self.sender {
                    Some(sender) => sender.rewrite_seq(segment),
                    // The sequence numbers are smoltcp's own; only their end is of interest.
                    None => self.window.on_sent(segment),
                }
            }
            offload_tcp(&mut frame, self.mss, self.offload.checksum);
            if fin {
                // smoltcp may repeat it by itself, too; each time the timeout starts over.
                self.fin = Some(FinTimer::start(self.fin.as_ref(), frame.clone(), now));
            }
            out.push(frame);
        }
        // For data that smoltcp has not seen.
        if self.is_established() {
            out.extend(self.sender.as_mut().and_then(Sender::due_ack));
        }
    }

    /// Sends a FIN again whose acknowledgement is overdue; returns the time of the next check.
    pub(super) fn repeat_fin(&mut self, now: Instant, out: &mut Vec<Frame>) -> Option<Instant> {
        let state = self.socket().state();
        // The three states in which our FIN is sent and not acknowledged (RFC 9293, 3.3.2).
        if !matches!(state, State::FinWait1 | State::Closing | State::LastAck) {
            self.fin = None;
        }
        let unacked = self.socket().send_queue();
        let fin = self.fin.as_mut()?;
        // As long as there is data before it, smoltcp repeats both.
        if unacked == 0 {
            out.extend(fin.expire(now));
        }
        Some(fin.due())
    }
}

fn carries_fin(segment: &[u8]) -> bool {
    const FIN: u8 = 1;
    segment.get(13).is_some_and(|flags| flags & FIN != 0)
}

/// The answer to a packet that belongs to no connection: a reset, unless it is one itself (RFC 9293, 3.10.7.1).
pub(super) fn reset(packet: Vec<u8>, key: Key, now: Instant) -> Vec<Frame> {
    // An interface without sockets: smoltcp makes the reset as for a closed port.
    let mut wire = Wire::new();
    wire.incoming = Some(packet);
    interface(key, &mut wire, now).poll(now, &mut wire, &mut SocketSet::new(Vec::new()));
    let mut frames = wire.outgoing;
    for frame in &mut frames {
        offload_tcp(frame, SEGMENT, false);
    }
    frames
}
