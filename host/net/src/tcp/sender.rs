//! Sends the host's data to the guest, straight from the host's socket into the guest's buffers.
//!
//! The data stays in the host's socket until the guest has acknowledged it: each segment is a peek (`MSG_PEEK`) that
//! the kernel writes into the guest's buffers, from the position that `SO_PEEK_OFF` sets. So a byte is copied once,
//! nothing is held here, and lost data is peeked at again; [`super::retransmit`] decides when.
//!
//! smoltcp knows nothing of this data. It opens, closes and keeps the connection alive, and receives. Its own sequence
//! number stands still after the SYN, so [`Sender::rewrite_seq`] moves its segments to where the data is, and
//! [`Sender::on_ack`] hides the acknowledgements of data from it. It sends its FIN once everything is acknowledged.
//! The guest's data that [`super::bulk`] takes is hidden in the same way, in the other direction.
//!
//! Linux has `SO_PEEK_OFF` for TCP since 6.9 (6.11 for IPv6); on older kernels the data goes through smoltcp.

use std::{io, net::TcpStream};

use smoltcp::{
    time::Instant,
    wire::{TcpOption, TcpPacket, TcpSeqNumber},
};
use vm_memory::VolatileSlice;

use super::retransmit::{Scoreboard, distance};
use crate::{
    frame::Frame,
    key::Key,
    offload::{self, Head, SEGMENT},
    sink::FrameSink,
    socket,
};

/// Acknowledged bytes that are worth a system call to discard: far less than a socket's smallest buffer.
const MIN_DISCARD: u32 = 16 * 1024;
/// Smallest number of bytes to offer room for when new data is peeked at.
const MIN_EXPECTED: u32 = 4096;
/// Segments sent before other connections have their turn.
const BURST: usize = 8;

/// Result of sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    /// Nothing more can be sent for now.
    Idle,
    /// There is more to send.
    More,
    /// The guest has no buffers.
    Blocked,
    /// The host's end has sent its last byte.
    End,
}

/// The sending half of one connection. Positions are sequence numbers as the guest sees them (RFC 9293, 3.3.1).
#[derive(Debug)]
pub(crate) struct Sender {
    key: Key,
    /// smoltcp's send sequence number: the one after its SYN.
    base: u32,
    board: Scoreboard,
    /// Position of the kernel's peek offset.
    peek_at: u32,
    /// Acknowledged bytes that are still in the socket, before `board.unacked()`.
    undiscarded: u32,
    /// New data that the next peek is likely to find; to describe room for more costs time and gains nothing.
    expected: u32,
    /// Shift of the guest's window (RFC 7323, 2.2).
    window_scale: u8,
    /// RCV.NXT; every segment from here repeats it.
    ack: u32,
    /// RCV.WND as smoltcp last sent it, scaled.
    receive_window: u16,
    /// Size of smoltcp's receive buffer.
    buffer: usize,
    /// Bytes of the guest that smoltcp has not seen.
    taken: u32,
    /// The end of the data that smoltcp has seen, as long as some before it may be missing. What smoltcp keeps out of order
    /// has its place there, so nothing may be taken meanwhile.
    seen: Option<u32>,
    /// The guest has yet to be told that some of the bytes taken have arrived.
    ack_due: bool,
}

/// The window scale among a SYN's options; at most 14 (RFC 7323, 2.3).
fn window_scale(mut options: &[u8]) -> u8 {
    while let Ok((rest, option)) = TcpOption::parse(options) {
        match option {
            TcpOption::WindowScale(scale) => return scale.min(14),
            TcpOption::EndOfList => break,
            // An option of length zero would keep a hostile guest's list from ever ending.
            _ if rest.len() < options.len() => options = rest,
            _ => break,
        }
    }
    0
}

/// Moves the blocks of a selective acknowledgement (RFC 2018, 3) among a segment's options.
fn shift_blocks(options: &mut [u8], by: u32) {
    const END: u8 = 0;
    const NOTHING: u8 = 1;
    const SACK: u8 = 5;
    let mut at = 0;
    while let Some(kind) = options.get(at).copied().filter(|kind| *kind != END) {
        let len = if kind == NOTHING { 1 } else { options.get(at + 1).map_or(0, |len| usize::from(*len)) };
        let Some(option) = options.get_mut(at..at + len).filter(|option| !option.is_empty()) else { return };
        if kind == SACK {
            for edge in option[2..].chunks_exact_mut(4) {
                let value = u32::from_be_bytes([edge[0], edge[1], edge[2], edge[3]]).wrapping_add(by);
                edge.copy_from_slice(&value.to_be_bytes());
            }
        }
        at += len;
    }
}

impl Sender {
    /// `buffer` is the size of smoltcp's receive buffer. `None` when the host's kernel cannot peek at an offset.
    pub(crate) fn new(key: Key, host: &TcpStream, buffer: usize) -> Option<Self> {
        socket::set_peek_offset(host, 0).ok()?;
        Some(Self {
            key,
            base: 0,
            board: Scoreboard::new(),
            peek_at: 0,
            undiscarded: 0,
            expected: MIN_EXPECTED,
            window_scale: 0,
            ack: 0,
            receive_window: 0,
            buffer,
            taken: 0,
            seen: None,
            ack_due: false,
        })
    }

    /// True if everything that was sent is acknowledged.
    pub(crate) fn is_empty(&self) -> bool {
        self.board.in_flight() == 0
    }

    /// The time for [`Self::expire`].
    pub(crate) fn timer(&self) -> Option<Instant> {
        self.board.timer()
    }

    /// True if [`Self::send`] has something to do.
    pub(crate) fn has_work(&self, readable: bool) -> bool {
        self.board.has_work(readable)
    }

    /// Moves a segment of smoltcp's to the connection's place in sequence space, and remembers the acknowledgement and
    /// window in it for the segments that are made here.
    pub(crate) fn rewrite_seq(&mut self, segment: &mut [u8]) {
        let Ok(tcp) = TcpPacket::new_checked(&*segment) else { return };
        let sequence = tcp.seq_number().0.cast_unsigned();
        let acknowledged = tcp.ack_number().0.cast_unsigned().wrapping_add(self.taken);
        if tcp.ack() && !tcp.rst() {
            self.ack = acknowledged;
            self.ack_due = false;
            self.receive_window = tcp.window_len();
            if tcp.syn() {
                // The window in a SYN is not scaled, the later ones are (RFC 7323, 2.2).
                let whole = self.buffer >> window_scale(tcp.options());
                self.receive_window = whole.try_into().unwrap_or(u16::MAX);
            }
        }
        if tcp.syn() {
            // smoltcp chooses the initial sequence number; the data begins one after it.
            self.base = sequence.wrapping_add(1);
            self.board.start(self.base);
            self.peek_at = self.base;
            return;
        }
        // Acknowledgements and the FIN stand behind all data. A payload can only be a keep-alive's garbage byte, one
        // before smoltcp's place (RFC 9293, 3.8.4): it has to be a byte that the guest has, or the guest would take it.
        let at = if tcp.payload().is_empty() { self.board.max() } else { self.board.unacked() };
        let shifted = sequence.wrapping_add(at.wrapping_sub(self.base));
        let has_ack = tcp.ack();
        let mut tcp = TcpPacket::new_unchecked(segment);
        tcp.set_seq_number(TcpSeqNumber(shifted.cast_signed()));
        if has_ack {
            tcp.set_ack_number(TcpSeqNumber(acknowledged.cast_signed()));
            shift_blocks(tcp.options_mut(), self.taken);
        }
    }

    /// True for the guest's next byte, if smoltcp has nothing of the guest behind it.
    pub(crate) fn expects(&mut self, sequence: u32) -> bool {
        self.seen = self.seen.filter(|end| distance(*end, self.ack) > 0);
        sequence == self.ack && self.seen.is_none()
    }

    /// Notes that bytes of a segment went to the host's socket, which smoltcp does not see. The next frame acknowledges
    /// them.
    pub(crate) fn on_taken(&mut self, len: u32) {
        self.taken = self.taken.wrapping_add(len);
        self.ack = self.ack.wrapping_add(len);
        self.ack_due = true;
    }

    /// Applies the acknowledgement and window in a segment with data, none of which smoltcp sees.
    pub(crate) fn on_data(&mut self, ack: u32, window: u16, now: Instant) {
        if self.board.accepts(ack) {
            self.undiscarded += self.board.on_ack(ack, u32::from(window) << self.window_scale, false, now);
        }
    }

    /// The acknowledgement of what was taken, if no frame has brought it yet.
    pub(crate) fn due_ack(&mut self) -> Option<Frame> {
        std::mem::take(&mut self.ack_due).then(|| self.head(self.board.max(), 0, SEGMENT, false).into_frame())
    }

    /// Applies the acknowledgement and window in a segment of the guest, and rewrites the acknowledgement for smoltcp.
    /// Returns true if the segment has nothing for smoltcp.
    pub(crate) fn on_ack(&mut self, segment: &mut [u8], now: Instant) -> bool {
        let Ok(tcp) = TcpPacket::new_checked(&*segment) else { return false };
        if tcp.syn() {
            self.window_scale = window_scale(tcp.options());
        }
        let sequence = tcp.seq_number().0.cast_unsigned();
        let (has_ack, ack) = (tcp.ack(), tcp.ack_number().0.cast_unsigned());
        let window = u32::from(tcp.window_len()) << if tcp.syn() { 0 } else { self.window_scale };
        let end = sequence.wrapping_add(tcp.payload().len() as u32);
        if end != sequence && self.seen.is_none_or(|seen| distance(end, seen) > 0) {
            self.seen = Some(end);
        }
        let empty = tcp.payload().is_empty() && !tcp.syn() && !tcp.fin() && !tcp.rst();
        // A reset may come without an acknowledgement.
        let mut tcp = TcpPacket::new_unchecked(&mut *segment);
        tcp.set_seq_number(TcpSeqNumber(sequence.wrapping_sub(self.taken).cast_signed()));
        if !has_ack {
            return false;
        }
        let nothing_sent = self.board.unacked() == self.base && self.board.max() == self.base;
        let beyond = distance(ack, self.board.max());
        let acceptable = self.board.accepts(ack);
        // A segment that is not where smoltcp expects it, such as a keep-alive or one out of order, wants an answer
        // (RFC 9293, 3.10.7.4), so smoltcp has to see it.
        let only_ack = acceptable && empty && sequence == self.ack;
        if acceptable {
            self.undiscarded += self.board.on_ack(ack, window, empty, now);
        }
        if !nothing_sent {
            // smoltcp has sent no data, so acknowledgements of data stand still for it. Its FIN is one beyond the data.
            let shown = self.base.wrapping_add(beyond.max(0).cast_unsigned());
            tcp.set_ack_number(TcpSeqNumber(shown.cast_signed()));
        }
        only_ack
    }

    /// Discards acknowledged data from the host's socket.
    ///
    /// A little of it waits for more, unless `all` has to go. When nothing is in flight nothing stays, since a single
    /// byte can keep a whole buffer of the kernel's and with it the far end's window closed.
    pub(crate) fn discard(&mut self, host: &TcpStream, all: bool) -> io::Result<()> {
        if !all && self.undiscarded < MIN_DISCARD && self.board.in_flight() > 0 {
            return Ok(());
        }
        while self.undiscarded > 0 {
            let gone = socket::discard(host, self.undiscarded as usize)?;
            // These bytes were peeked at, so they are missing only if the socket was reset meanwhile.
            if gone == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.undiscarded -= gone as u32;
        }
        // The kernel moves its peek offset back by what is read, down to zero: it still points to the same byte, or to
        // the first one that is left.
        if distance(self.peek_at, self.board.unacked()) < 0 {
            self.peek_at = self.board.unacked();
        }
        Ok(())
    }

    /// Handles the timer when it is due; returns a window probe if one is due.
    pub(crate) fn expire(&mut self, now: Instant) -> Option<Frame> {
        // The probe stands before the first unacknowledged byte and is empty. It is outside the window, so the guest
        // answers with its acknowledgement and window (RFC 9293, 3.10.7.4), as Linux's own probes make it do.
        let probe = self.board.expire(now);
        probe.then(|| self.head(self.board.unacked().wrapping_sub(1), 0, SEGMENT, false).into_frame())
    }

    fn head(&self, at: u32, len: usize, mss: u16, push: bool) -> Head {
        Head::new(self.key, (at, self.ack), self.receive_window, push, len, mss)
    }

    /// Sends what can be sent, in segments that the guest cuts to `mss` bytes of data.
    ///
    /// `readable` becomes false when the socket has nothing more. While `ending` is set (see
    /// [`crate::events::ending`]), that takes a peek that finds nothing.
    pub(crate) fn send(
        &mut self,
        host: &TcpStream,
        (readable, ending): (&mut bool, bool),
        mss: u16,
        now: Instant,
        sink: &mut dyn FrameSink,
    ) -> io::Result<Sent> {
        for _ in 0..BURST {
            let Some((at, most)) = self.board.next_segment(*readable, self.expected, now) else {
                return Ok(Sent::Idle);
            };
            // In order, the kernel's peek offset follows by itself; only repeated data needs a system call.
            if self.peek_at != at {
                socket::set_peek_offset(host, at.wrapping_sub(self.board.unacked()).wrapping_add(self.undiscarded))?;
                self.peek_at = at;
            }
            let mut room = 0;
            let peek = &mut |parts: &[VolatileSlice<'_>]| {
                room = parts.iter().map(VolatileSlice::len).sum();
                socket::peek(host, parts)
            };
            let seal = &mut |len| self.head(at, len, mss, len < most);
            let new = at == self.board.max();
            match sink.take(offload::head_len(&self.key), most, peek, seal) {
                None => return Ok(Sent::Blocked),
                Some(Ok(0)) if new => {
                    *readable = false;
                    return Ok(Sent::End);
                }
                // Data that was there for the first peek is gone: the socket was reset.
                Some(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(Ok(len)) => {
                    // A short peek has found everything, and epoll reports new data as another edge.
                    *readable &= len >= room || ending || !new;
                    self.on_sent(len as u32, room as u32, now);
                }
                Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock && new => *readable = false,
                Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Some(Err(error)) => return Err(error),
            }
        }
        Ok(Sent::More)
    }

    fn on_sent(&mut self, len: u32, room: u32, now: Instant) {
        // A full peek means bulk data; a short one measures what an interactive peer writes at a time.
        self.expected = if len < room { (2 * len).max(MIN_EXPECTED) } else { u32::from(SEGMENT) };
        self.peek_at = self.peek_at.wrapping_add(len);
        self.board.on_sent(len, now);
    }
}
