//! One TCP connection: smoltcp's socket towards the guest, a socket of this process towards the world, and the state of
//! both directions between them.
//!
//! | Begun by                   | Host's end                                      | Guest's end                      |
//! |----------------------------|-------------------------------------------------|----------------------------------|
//! | the guest                  | connect(2) first, so that a refusal stays one   | its SYN waits for the result     |
//! | a published port's client  | accepted already; reset if the guest refuses    | our SYN, repeated if need be     |
//! | the guest, to name server  | none until a query has to be passed on          | accepted at once                 |
//!
//! No thread, no clock, no queue: the stack brings packets, events and the time, and takes frames.

use std::{io, net::TcpStream};

use smoltcp::{socket::tcp::State, time::Instant};

use super::{
    bulk::Segment,
    guest::{self, Guest, GuestEnd},
    host::{Connected, Host, HostEnd},
    sender::{Sender, Sent},
};
use crate::{
    dns::{Names, Next, QueryStream},
    frame::Frame,
    guest_frame::GuestFrame,
    key::Key,
    offload::Offload,
    sink::FrameSink,
};

/// The way to an early end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Teardown {
    /// Both directions go on until their ends.
    None,
    /// The published port is gone: the client still gets what the guest has sent, then both ends are closed.
    Draining,
    /// One end has failed: both are reset.
    Aborted,
}

/// A connection.
pub(crate) struct Flow {
    pub(crate) key: Key,
    /// The published port that it came through.
    pub(crate) published: Option<u64>,
    guest: GuestEnd,
    /// `None` for a connection to the name server, until a query has to be passed on.
    host: Option<HostEnd>,
    /// Queries to the name server, as long as the host's end is missing.
    queries: Option<QueryStream>,
    /// Queries that are passed on and that the host's socket has not taken yet.
    backlog: Vec<u8>,
    teardown: Teardown,
}

/// State of a connection after [`Flow::advance`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It goes on, and wants to be advanced again at this time.
    Open(Option<Instant>),
    /// It is over.
    Over,
}

impl Flow {
    /// A connection that the guest opens with this SYN, to a host's socket that is connecting.
    pub(crate) fn outbound(
        key: Key,
        mut syn: Vec<u8>,
        host: TcpStream,
        buffer: usize,
        offload: Offload,
        now: Instant,
    ) -> Self {
        let mut guest = GuestEnd::new(key, sender(key, &host, buffer, offload), buffer, offload, now);
        guest.on_syn(&mut syn, now);
        Self::new(key, guest, Some(HostEnd::new(host, Host::Connecting { syn })))
    }

    /// A connection that the guest opens to the name server with this SYN.
    pub(crate) fn name_server(key: Key, mut syn: Vec<u8>, buffer: usize, offload: Offload, now: Instant) -> Self {
        let mut guest = GuestEnd::new(key, None, buffer, offload, now);
        guest.on_syn(&mut syn, now);
        guest.accept(syn);
        Self { queries: Some(QueryStream::default()), ..Self::new(key, guest, None) }
    }

    /// A connection that came in through a published port.
    pub(crate) fn inbound(
        key: Key,
        host: TcpStream,
        published: u64,
        buffer: usize,
        offload: Offload,
        now: Instant,
    ) -> Option<Self> {
        let mut guest = GuestEnd::new(key, sender(key, &host, buffer, offload), buffer, offload, now);
        let host = HostEnd::new(host, Host::Open);
        guest.connect().then(|| Self { published: Some(published), ..Self::new(key, guest, Some(host)) })
    }

    fn new(key: Key, guest: GuestEnd, host: Option<HostEnd>) -> Self {
        let (published, queries, backlog) = (None, None, Vec::new());
        Self { key, published, guest, host, queries, backlog, teardown: Teardown::None }
    }

    /// Frames that refuse a packet that belongs to no connection.
    pub(crate) fn refuse(packet: Vec<u8>, key: Key, now: Instant) -> Vec<Frame> {
        guest::reset(packet, key, now)
    }

    /// The host's socket, to be watched.
    pub(crate) fn host(&self) -> Option<&TcpStream> {
        self.host.as_ref().map(|host| &host.stream)
    }

    /// Answers queries to the name server that can be answered here; true when the rest needs the host's name server,
    /// see [`Self::pass_on`].
    pub(crate) fn answer_queries(&mut self, names: &mut Names<'_>, now: Instant) -> bool {
        let Some(queries) = &mut self.queries else { return false };
        // Takes in the packet that brought the connection here.
        self.guest.poll(now, usize::MAX);
        let guest = self.guest.socket();
        loop {
            if guest.can_recv() && queries.room() > 0 {
                let room = queries.room();
                let _ = guest.recv(|data| {
                    let data = &data[..data.len().min(room)];
                    queries.push(data);
                    (data.len(), ())
                });
            }
            // One answer at a time, which always fits into the empty buffer. A guest that sends queries without reading
            // answers is held back by its own window.
            if guest.send_queue() > 0 {
                return false;
            }
            match queries.next(names) {
                Next::Wait => break,
                Next::Forward => return true,
                Next::Answer(bytes) => {
                    let _ = guest.send_slice(&bytes);
                }
            }
        }
        // The guest has ended and is answered.
        if guest.state() == State::CloseWait && guest.recv_queue() == 0 {
            guest.close();
        }
        false
    }

    /// Leaves the queries from the first unanswered one on to the host's name server, whose socket is connecting.
    pub(crate) fn pass_on(&mut self, server: TcpStream) {
        self.backlog = self.queries.take().map(QueryStream::into_bytes).unwrap_or_default();
        self.host = Some(HostEnd::new(server, Host::Open));
    }

    /// Takes a packet of the guest; `syn` if it opens or accepts a connection. True if it only acknowledges, which
    /// needs no [`Self::advance`] at once.
    pub(crate) fn receive(&mut self, packet: &[u8], syn: bool, now: Instant) -> bool {
        // While the host's socket is connecting the guest can only repeat its SYN.
        let connecting = self.host.as_ref().is_some_and(|host| matches!(host.state, Host::Connecting { .. }));
        !connecting && self.guest.receive(packet, syn, now)
    }

    /// Gives the data of a segment to the host's socket where it lies. True if all of it is there, or if the socket has
    /// failed; else the segment has to be received, too, and what has gone of it is left out then.
    pub(crate) fn take_bulk(&mut self, segment: &Segment, frame: &GuestFrame<'_>, now: Instant) -> bool {
        let Some(host) = self.host.as_mut().filter(|host| host.is_writable() && host.state == Host::Open) else {
            return false;
        };
        // The name server's queries are read here first.
        let free = self.teardown == Teardown::None && self.queries.is_none() && self.backlog.is_empty();
        if !free || !self.guest.may_bypass(segment, now) {
            return false;
        }
        let sent = host.write_parts(&frame.parts(segment.at, segment.len));
        let (Ok(len), Some(sender)) = (sent, &mut self.guest.sender) else {
            self.abort();
            return true;
        };
        sender.on_taken(len as u32);
        let all = len == segment.len;
        if all {
            sender.on_data(segment.ack, segment.window, now);
        }
        all
    }

    /// Notes an event of the host's socket; `ending` as [`crate::events::ending`] says.
    pub(crate) fn host_ready(&mut self, ending: bool) {
        if let Some(host) = &mut self.host {
            host.on_event(ending);
        }
    }

    /// True if [`Self::send`] has something to do.
    pub(crate) fn wants_to_send(&mut self) -> bool {
        let readable = self.host.as_ref().is_some_and(HostEnd::is_readable);
        self.guest.sender.as_ref().is_some_and(|sender| sender.has_work(readable))
            && self.teardown != Teardown::Aborted
            && self.guest.is_established()
    }

    /// Sends the host's data to the guest, without smoltcp.
    pub(crate) fn send(&mut self, now: Instant, sink: &mut dyn FrameSink) -> Sent {
        let (Some(sender), Some(host)) = (&mut self.guest.sender, &mut self.host) else { return Sent::Idle };
        match sender.send(&host.stream, (&mut host.readable, host.ending), self.guest.mss, now, sink) {
            Ok(Sent::End) => host.state = Host::Ended,
            Ok(sent) => return sent,
            Err(_) => self.abort(),
        }
        Sent::End
    }

    /// The time at which sent data counts as lost.
    pub(crate) fn timer(&mut self) -> Option<Instant> {
        if self.guest.is_established() { self.guest.sender.as_ref().and_then(Sender::timer) } else { None }
    }

    /// Ends the connection after the guest's data has reached the client: its published port is gone, and with it the
    /// container.
    pub(crate) fn drain(&mut self) {
        if self.teardown == Teardown::None {
            self.teardown = Teardown::Draining;
        }
    }

    /// Resets the connection on both sides.
    pub(crate) fn abort(&mut self) {
        self.teardown = Teardown::Aborted;
        self.guest.socket().abort();
    }

    /// Moves what can be moved between the ends, and emits at most `room` frames.
    pub(crate) fn advance(&mut self, now: Instant, room: usize, out: &mut Vec<Frame>) -> Outcome {
        match self.host.as_mut().and_then(HostEnd::poll_connect) {
            // The guest's SYN stays unanswered, so a guest behind a slow network waits as it would there.
            Some(Connected::Pending) => return Outcome::Open(None),
            // The answer is a reset, as a host without a listener gives.
            Some(Connected::No(syn)) => {
                self.guest.refuse(syn);
                self.guest.poll(now, usize::MAX);
                self.guest.drain_frames(now, out);
                return Outcome::Over;
            }
            Some(Connected::Yes(syn)) => {
                self.guest.accept(syn);
                self.guest.poll(now, usize::MAX);
            }
            None => {}
        }
        // Data taken from smoltcp's buffer opens its window, and a FIN taken from the host ends its half: each may let
        // more move, until neither side has or takes anything.
        loop {
            self.guest.poll(now, room);
            match self.transfer() {
                Ok(true) => {}
                Ok(false) => break,
                // The host's socket has failed. The guest sees a reset, and so does the host if it is still there.
                Err(_) => {
                    self.abort();
                    break;
                }
            }
        }
        // A published port that is gone: the client has everything, the guest's FIN included if there was one.
        let drained = self.teardown == Teardown::Draining
            && self.guest.socket().recv_queue() == 0
            && self.guest.state != Guest::Finished;
        if drained {
            self.guest.socket().abort();
        }
        // Emits what the last transfer has caused: a FIN, a reset, a larger window.
        self.guest.poll(now, room);
        self.guest.drain_frames(now, out);
        if drained {
            // In order, because a reset would take back what the client has yet to read.
            self.close(true);
            return Outcome::Over;
        }
        let fin_due = self.guest.repeat_fin(now, out);
        if self.guest.is_established()
            && let Some(sender) = &mut self.guest.sender
        {
            // A closed window is asked for here; lost data is sent by `send`, when it is this connection's turn.
            out.extend(sender.expire(now));
        }
        // The guest may be through with a connection whose last bytes the host's socket has yet to take.
        let draining = self.guest.state == Guest::Finished && self.host_ended() && self.teardown != Teardown::Aborted;
        if !self.guest.is_closed() || draining {
            let next = self.guest.poll_at(now);
            return Outcome::Open(next.into_iter().chain(fin_due).chain(self.timer()).min());
        }
        // Closed by both, or by a reset of the guest, a timeout or a failure, which the host's side sees as a reset.
        self.close(self.host_ended() && self.guest.state == Guest::Ended);
        Outcome::Over
    }

    /// Moves data both ways once; true when something moved.
    fn transfer(&mut self) -> io::Result<bool> {
        let Some(host) = &mut self.host else { return Ok(false) };
        // Queries that were read here go before everything that the guest has sent since.
        host.write_backlog(&mut self.backlog)?;
        let (socket, sender) = self.guest.parts();
        let mut moved = false;
        if self.backlog.is_empty() {
            moved |= host.write_from(socket)?;
        }
        if let Some(sender) = sender {
            // `send` reads; here the host's socket only forgets what the guest has. smoltcp's FIN stands behind all
            // data, so it waits until everything is acknowledged.
            let ended = host.state == Host::Ended;
            sender.discard(&host.stream, ended)?;
            if ended && sender.is_empty() && socket.may_send() {
                socket.close();
                moved = true;
            }
        } else {
            moved |= host.read_into(socket)?;
        }
        Ok(self.pass_fin()? || moved)
    }

    /// Passes the guest's FIN on once the host's socket has everything before it; true when it does.
    fn pass_fin(&mut self) -> io::Result<bool> {
        if self.guest.state == Guest::Open && self.guest.fin_received() {
            self.guest.state = Guest::Finished;
        }
        let all_written = self.guest.socket().recv_queue() == 0 && self.backlog.is_empty();
        let (Guest::Finished, true, Some(host)) = (self.guest.state, all_written, &self.host) else { return Ok(false) };
        self.guest.state = Guest::Ended;
        // Half-close: the far end may go on sending.
        host.end().map(|()| true)
    }

    fn host_ended(&self) -> bool {
        self.host.as_ref().is_some_and(|host| host.state == Host::Ended)
    }

    fn close(&mut self, orderly: bool) {
        if let Some(host) = self.host.take() {
            host.close(orderly);
        }
    }
}

/// The sender that takes smoltcp's place, where kernel and guest can do it: long segments need a guest that cuts them
/// and completes their checksums.
fn sender(key: Key, host: &TcpStream, buffer: usize, offload: Offload) -> Option<Sender> {
    if offload.segmentation && offload.checksum { Sender::new(key, host, buffer) } else { None }
}
