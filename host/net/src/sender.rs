//! The data of a TCP connection on its way from the host's socket to the guest.
//!
//! It stays in the host's socket until the guest has acknowledged it: each segment is a look (`MSG_PEEK`) that the kernel
//! writes straight into the guest's buffers, at the place that `SO_PEEK_OFF` says. So a byte is copied once, nothing is
//! held here, and what is lost is looked at again.
//!
//! The connection's stack knows nothing of this data. It begins and ends the connection, receives and keeps it alive,
//! and its sequence numbers stand still meanwhile; [`Sender::speak`] and [`Sender::hear`] shift what it says and hears.
//! It ends its side when everything is acknowledged.
//!
//! Linux has `SO_PEEK_OFF` for TCP from 6.9 on; without it a connection's data goes through the stack.

use std::{io, net::TcpStream};

use smoltcp::{
    time::{Duration, Instant},
    wire::{TcpOption, TcpPacket, TcpSeqNumber},
};
use vm_memory::VolatileSlice;

use super::{
    frame::Frame,
    offload::{self, Head},
    socket,
    tcp::{Key, SEGMENT},
};

/// First pause before data is sent again (RFC 6298, 2.4) …
const PAUSE: Duration = Duration::from_secs(1);
/// … and the longest. No network is spared by the minute of RFC 6298, 2.5: what is lost was dropped by a guest that was
/// short of memory, and it may have some again soon.
const LONGEST_PAUSE: Duration = Duration::from_secs(4);
/// Acknowledgements of the same byte that mean a loss (RFC 5681, 3.2).
const DUPLICATES: u8 = 3;
/// Acknowledged bytes that are worth a call of the kernel: far less than what its sockets hold at least.
const MUCH: u32 = 16 * 1024;
/// Data for which there is room at least.
const SMALL: u32 = 4096;
/// Segments before others have their turn.
const BURST: usize = 8;

/// Whoever takes frames for the guest.
pub(super) trait Receiver {
    /// Takes a frame of `head` bytes of headers and at most `most` bytes of data, which `read` writes to where they
    /// belong and whose headers `seal` makes. What `read` says, also when it fails or is without data: then there is no
    /// frame. `None` when the guest has offered too little room.
    fn take(
        &mut self,
        head: usize,
        most: usize,
        read: &mut dyn FnMut(&[VolatileSlice<'_>]) -> io::Result<usize>,
        seal: &mut dyn FnMut(usize) -> Head,
    ) -> Option<io::Result<usize>>;
}

/// Where sending stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// There is nothing more to do for now.
    Idle,
    /// There is more.
    More,
    /// The guest has no buffers.
    Blocked,
    /// The host's end has sent its last byte.
    End,
}

/// One connection's. All positions are sequence numbers as the guest sees them (RFC 9293, 3.3.1).
#[derive(Debug)]
pub(super) struct Sender {
    key: Key,
    /// Where the stack believes to stand.
    base: u32,
    /// The first byte that is not acknowledged.
    first: u32,
    /// The next to be sent; behind `high` when lost ones are sent again.
    next: u32,
    /// The first that was never sent.
    high: u32,
    /// Where the next look begins.
    looking: u32,
    /// Acknowledged bytes that are still in the socket.
    done: u32,
    /// Bytes that the next look will hardly exceed: room for more would be looked for in vain.
    guess: u32,
    /// Bytes from `first` on that the guest takes, and the most there ever were.
    window: u32,
    widest: u32,
    scale: u8,
    duplicates: u8,
    /// What was sent before the loss that is being mended.
    recover: Option<u32>,
    /// The first segment is lost.
    again: bool,
    pause: Duration,
    timer: Option<Instant>,
    /// What the stack acknowledges and takes.
    acknowledged: u32,
    offered: u16,
}

/// How far `a` is ahead of `b`; negative when it is behind.
fn ahead(a: u32, b: u32) -> i32 {
    a.wrapping_sub(b).cast_signed()
}

fn window_scale(mut options: &[u8]) -> u8 {
    while let Ok((rest, option)) = TcpOption::parse(options) {
        match option {
            TcpOption::WindowScale(scale) => return scale.min(14),
            TcpOption::EndOfList => break,
            _ if rest.len() < options.len() => options = rest,
            _ => break,
        }
    }
    0
}

impl Sender {
    /// `None` when the host's kernel has not what this needs.
    pub(super) fn new(key: Key, host: &TcpStream) -> Option<Self> {
        socket::look_from(host, 0).ok()?;
        Some(Self {
            key,
            base: 0,
            first: 0,
            next: 0,
            high: 0,
            looking: 0,
            done: 0,
            guess: SMALL,
            window: 0,
            widest: 0,
            scale: 0,
            duplicates: 0,
            recover: None,
            again: false,
            pause: PAUSE,
            timer: None,
            acknowledged: 0,
            offered: 0,
        })
    }

    fn flight(&self) -> u32 {
        self.high.wrapping_sub(self.first)
    }

    /// Bytes that the guest still takes.
    fn room(&self) -> u32 {
        self.window.saturating_sub(self.next.wrapping_sub(self.first))
    }

    /// Whether everything that was sent is acknowledged.
    pub(super) fn is_empty(&self) -> bool {
        self.flight() == 0
    }

    /// When to call [`Self::expire`].
    pub(super) fn timer(&self) -> Option<Instant> {
        self.timer
    }

    /// Whether [`Self::send`] has anything to do.
    pub(super) fn wants(&self, readable: bool) -> bool {
        self.again || readable || self.next != self.high
    }

    /// Makes a segment of the stack one of the connection.
    pub(super) fn speak(&mut self, segment: &mut [u8]) {
        let Ok(tcp) = TcpPacket::new_checked(&*segment) else { return };
        let sequence = tcp.seq_number().0.cast_unsigned();
        if tcp.ack() && !tcp.rst() {
            self.acknowledged = tcp.ack_number().0.cast_unsigned();
            // The window of a SYN is not scaled, those after it are.
            let scale = if tcp.syn() { window_scale(tcp.options()) } else { 0 };
            self.offered = tcp.window_len() >> scale;
        }
        if tcp.syn() {
            self.base = sequence.wrapping_add(1);
            (self.first, self.next, self.high, self.looking) = (self.base, self.base, self.base, self.base);
            return;
        }
        // The stack's only data is the byte that asks whether the guest is there: it has to be one that the guest has.
        let at = if tcp.payload().is_empty() { self.high } else { self.first };
        let shifted = sequence.wrapping_add(at.wrapping_sub(self.base));
        let mut tcp = TcpPacket::new_unchecked(segment);
        tcp.set_seq_number(TcpSeqNumber(shifted.cast_signed()));
    }

    /// Takes from a segment of the guest what it says of this data, and makes it one for the stack; true when it says
    /// nothing else.
    pub(super) fn hear(&mut self, segment: &mut [u8], now: Instant) -> bool {
        let Ok(tcp) = TcpPacket::new_checked(&*segment) else { return false };
        if tcp.syn() {
            self.scale = window_scale(tcp.options());
        }
        if !tcp.ack() {
            return false;
        }
        let ack = tcp.ack_number().0.cast_unsigned();
        let window = u32::from(tcp.window_len()) << if tcp.syn() { 0 } else { self.scale };
        let empty = tcp.payload().is_empty() && !tcp.syn() && !tcp.fin() && !tcp.rst();
        let untouched = self.first == self.base && self.high == self.base;
        let beyond = ahead(ack, self.high);
        let known = ack.wrapping_sub(self.first) <= self.flight();
        // What does not stand where the stack does wants an answer (RFC 9293, 3.10.7.4).
        let only = known && empty && tcp.seq_number().0.cast_unsigned() == self.acknowledged;
        if known {
            self.learn(ack, window, empty, now);
        }
        if !untouched {
            let shown = self.base.wrapping_add(beyond.max(0).cast_unsigned());
            TcpPacket::new_unchecked(segment).set_ack_number(TcpSeqNumber(shown.cast_signed()));
        }
        only
    }

    fn learn(&mut self, ack: u32, window: u32, empty: bool, now: Instant) {
        let new = ack.wrapping_sub(self.first);
        let opens = self.window == 0 && window > 0;
        if new > 0 {
            self.first = ack;
            self.done += new;
            self.duplicates = 0;
            self.pause = PAUSE;
            if ahead(self.next, ack) < 0 {
                self.next = ack;
            }
            match self.recover {
                Some(point) if ahead(ack, point) >= 0 => self.recover = None,
                // The next hole (RFC 6582, 3.2), unless all is sent again anyway.
                Some(_) => self.again = self.next == self.high,
                None => {}
            }
            self.timer = (self.flight() > 0).then(|| now + self.pause);
        } else if opens && self.flight() > 0 {
            // Linux closes its window over what is on its way when it drops that for want of memory. The silence of a
            // closed window was none of lost segments, so it makes no further one longer.
            (self.next, self.recover) = (self.first, Some(self.high));
            (self.again, self.duplicates) = (false, 0);
            (self.timer, self.pause) = (None, PAUSE);
        } else if empty && window == self.window && self.flight() > 0 {
            self.duplicates = self.duplicates.saturating_add(1);
            if self.duplicates == DUPLICATES && self.recover.is_none() {
                self.recover = Some(self.high);
                self.again = true;
            }
        }
        if window > 0 && self.flight() == 0 {
            (self.timer, self.pause) = (None, PAUSE);
        }
        self.window = window;
        self.widest = self.widest.max(window);
    }

    /// Lets the host's socket forget what the guest has. A little of it waits for more that is under way, unless it has to
    /// be `all`; when nothing is under way nothing stays: a byte can keep a whole buffer of the kernel's, and with it the
    /// far end's window closed.
    pub(super) fn discard(&mut self, host: &TcpStream, all: bool) -> io::Result<()> {
        if !all && self.done < MUCH && self.flight() > 0 {
            return Ok(());
        }
        while self.done > 0 {
            let gone = socket::discard(host, self.done as usize)?;
            if gone == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.done -= gone as u32;
        }
        // The kernel's place stays where it is among what is left.
        if ahead(self.looking, self.first) < 0 {
            self.looking = self.first;
        }
        Ok(())
    }

    /// What silence means, when it has lasted for long enough: what is not acknowledged is lost, or the guest's window
    /// has opened without our knowledge. A frame that asks for it.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Frame> {
        self.timer.filter(|at| *at <= now)?;
        self.timer = None;
        if self.flight() > 0 {
            self.next = self.first;
            self.recover = Some(self.high);
        }
        (self.again, self.duplicates) = (false, 0);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        if self.room() > 0 {
            return None;
        }
        self.timer = Some(now + self.pause);
        // A byte that the guest has, and no data: it answers with where it stands.
        Some(self.head(self.first.wrapping_sub(1), 0, SEGMENT, false).into_frame())
    }

    /// The headers of a segment.
    fn head(&self, at: u32, len: usize, segment: u16, push: bool) -> Head {
        Head::new(self.key, (at, self.acknowledged), self.offered, push, len, segment)
    }

    /// Sends what can be sent, in segments that the guest cuts to `segment` bytes of data. `readable` becomes false when
    /// the socket has nothing more; with `ending` that is only true when a look finds nothing.
    pub(super) fn send(
        &mut self,
        host: &TcpStream,
        (readable, ending): (&mut bool, bool),
        segment: u16,
        now: Instant,
        receiver: &mut dyn Receiver,
    ) -> io::Result<Sent> {
        for _ in 0..BURST {
            let Some((at, most)) = self.turn(*readable, now) else { return Ok(Sent::Idle) };
            if self.looking != at {
                socket::look_from(host, at.wrapping_sub(self.first).wrapping_add(self.done))?;
                self.looking = at;
            }
            let mut room = 0;
            let read = &mut |parts: &[VolatileSlice<'_>]| {
                room = parts.iter().map(VolatileSlice::len).sum();
                socket::look(host, parts)
            };
            let seal = &mut |len| self.head(at, len, segment, len < most);
            match receiver.take(offload::head_len(&self.key), most, read, seal) {
                None => return Ok(Sent::Blocked),
                Some(Ok(0)) if at == self.high => {
                    *readable = false;
                    return Ok(Sent::End);
                }
                Some(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(Ok(len)) => {
                    // Less than there was room for is all: what comes now is told of.
                    *readable &= len >= room || ending || at != self.high;
                    self.sent(len as u32, room as u32, now);
                }
                Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock && at == self.high => *readable = false,
                Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Some(Err(error)) => return Err(error),
            }
        }
        Ok(Sent::More)
    }

    /// Where the next segment begins and its most bytes, if one may be sent.
    fn turn(&mut self, readable: bool, now: Instant) -> Option<(u32, usize)> {
        let longest = u32::from(SEGMENT);
        if self.again && self.flight() > 0 {
            return Some((self.first, self.flight().min(longest) as usize));
        }
        self.again = false;
        let new = self.next == self.high;
        if new && !readable {
            return None;
        }
        let room = self.room();
        // A small segment only when nothing is under way (RFC 9293, 3.8.6.2.1).
        if room == 0 || new && self.flight() > 0 && room < longest.min(self.widest / 2) {
            self.timer.get_or_insert(now + self.pause);
            return None;
        }
        let most = if new { room.min(self.guess) } else { room.min(self.high.wrapping_sub(self.next)) };
        Some((self.next, most.min(longest) as usize))
    }

    fn sent(&mut self, len: u32, room: u32, now: Instant) {
        self.guess = if len < room { (2 * len).max(SMALL) } else { u32::from(SEGMENT) };
        self.looking = self.looking.wrapping_add(len);
        if !std::mem::take(&mut self.again) {
            self.next = self.next.wrapping_add(len);
            if ahead(self.next, self.high) > 0 {
                self.high = self.next;
            }
        }
        self.timer.get_or_insert(now + self.pause);
    }
}
