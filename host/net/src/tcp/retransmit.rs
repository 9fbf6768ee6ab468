//! Retransmits lost TCP segments: decides which data goes to the guest next, again after three duplicate
//! acknowledgements, a retransmission timeout or a window that reopens, and repeats a FIN.
//!
//! Data that goes through smoltcp's buffer instead (see [`super`]) is sent again by smoltcp.

use smoltcp::time::{Duration, Instant};

use crate::{frame::Frame, offload::SEGMENT};

/// First retransmission timeout (RFC 6298, 2.1).
const INITIAL_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest retransmission timeout. RFC 6298, 2.5 wants a minute at least to spare the network, but no network is
/// between here and the guest: a lost segment was dropped by a guest short of memory, which may have some again soon.
const MAX_TIMEOUT: Duration = Duration::from_secs(4);
/// Duplicate acknowledgements that mean a loss (RFC 5681, 3.2).
const DUPLICATES: u8 = 3;
/// First timeout after which a FIN is repeated.
const FIN_TIMEOUT: Duration = Duration::from_millis(1500);
/// Longest timeout after which a FIN is repeated.
const MAX_FIN_TIMEOUT: Duration = Duration::from_secs(48);

/// Distance from `b` to `a` in sequence space; negative when `a` is before `b` (RFC 9293, 3.4).
pub(super) fn distance(a: u32, b: u32) -> i32 {
    a.wrapping_sub(b).cast_signed()
}

/// The guest's acknowledgements and window against the data that was sent: the send sequence variables of RFC 9293,
/// 3.3.1, with NewReno's loss recovery (RFC 6582).
///
/// There is no congestion window: the path is memory, and the guest's own window bounds the flight.
#[derive(Debug)]
pub(super) struct Scoreboard {
    /// SND.UNA: the first byte that is not acknowledged.
    unacked: u32,
    /// SND.NXT: the next byte to send; before `max` while lost data is sent again.
    next: u32,
    /// The first byte that was never sent.
    max: u32,
    /// SND.WND: bytes from `unacked` on that the guest takes.
    window: u32,
    /// The largest window that the guest ever gave.
    max_window: u32,
    /// Acknowledgements in a row that acknowledged nothing new.
    duplicates: u8,
    /// `max` at the time of the loss that is being repaired (RFC 6582, 3.2: `recover`).
    recover: Option<u32>,
    /// The segment at `unacked` is lost and is sent before anything else.
    resend_first: bool,
    timeout: Duration,
    timer: Option<Instant>,
}

impl Scoreboard {
    /// Nothing sent, and a closed window.
    pub(super) fn new() -> Self {
        Self {
            unacked: 0,
            next: 0,
            max: 0,
            window: 0,
            max_window: 0,
            duplicates: 0,
            recover: None,
            resend_first: false,
            timeout: INITIAL_TIMEOUT,
            timer: None,
        }
    }

    /// Sets the sequence number of the first byte, which follows our SYN's.
    pub(super) fn start(&mut self, first: u32) {
        (self.unacked, self.next, self.max) = (first, first, first);
    }

    /// The first byte that is not acknowledged.
    pub(super) fn unacked(&self) -> u32 {
        self.unacked
    }

    /// The first byte that was never sent.
    pub(super) fn max(&self) -> u32 {
        self.max
    }

    /// Bytes that were sent and are not acknowledged.
    pub(super) fn in_flight(&self) -> u32 {
        self.max.wrapping_sub(self.unacked)
    }

    /// Bytes that still fit into the guest's window.
    pub(super) fn room(&self) -> u32 {
        self.window.saturating_sub(self.next.wrapping_sub(self.unacked))
    }

    /// The time for [`Self::expire`].
    pub(super) fn timer(&self) -> Option<Instant> {
        self.timer
    }

    /// True if there is something to send: lost data, or new data when the socket is `readable`.
    pub(super) fn has_work(&self, readable: bool) -> bool {
        self.resend_first || readable || self.next != self.max
    }

    /// True if the acknowledgement is for data in flight or repeats the last one (RFC 9293, 3.10.7.4).
    pub(super) fn accepts(&self, ack: u32) -> bool {
        ack.wrapping_sub(self.unacked) <= self.in_flight()
    }

    /// Applies an acceptable acknowledgement; `empty` if its segment carries no data and no flags. Returns the bytes
    /// that are newly acknowledged.
    pub(super) fn on_ack(&mut self, ack: u32, window: u32, empty: bool, now: Instant) -> u32 {
        // `accepts` has made sure that this is at most what is in flight.
        let acked = ack.wrapping_sub(self.unacked);
        let reopens = self.window == 0 && window > 0;
        if acked > 0 {
            self.unacked = ack;
            self.duplicates = 0;
            self.timeout = INITIAL_TIMEOUT;
            // After a timeout the guest may acknowledge more than was sent again: it had kept the rest.
            if distance(self.next, ack) < 0 {
                self.next = ack;
            }
            match self.recover {
                Some(point) if distance(ack, point) >= 0 => self.recover = None,
                // A partial acknowledgement ends where the next hole begins (RFC 6582, 3.2, step 3). While everything
                // is sent again from `next` on, that hole is on its way already.
                Some(_) => self.resend_first = self.next == self.max,
                None => {}
            }
            self.timer = (self.in_flight() > 0).then(|| now + self.timeout);
        } else if reopens && self.in_flight() > 0 {
            // Linux closes its window over data in flight when it drops that for want of memory, so the reopened window
            // means a loss, and data need not wait for the timer. The timeouts so far were window probes', not
            // losses', and do not make the next one longer.
            (self.next, self.recover) = (self.unacked, Some(self.max));
            (self.resend_first, self.duplicates) = (false, 0);
            (self.timer, self.timeout) = (None, INITIAL_TIMEOUT);
        } else if empty && window == self.window && self.in_flight() > 0 {
            // A duplicate by RFC 5681, 2: no data, no flags, the same window, and something is outstanding.
            self.duplicates = self.duplicates.saturating_add(1);
            if self.duplicates == DUPLICATES && self.recover.is_none() {
                self.recover = Some(self.max);
                self.resend_first = true;
            }
        }
        if window > 0 && self.in_flight() == 0 {
            (self.timer, self.timeout) = (None, INITIAL_TIMEOUT);
        }
        self.window = window;
        self.max_window = self.max_window.max(window);
        acked
    }

    /// Handles the timer when it is due. Data in flight counts as lost, and all of it is sent again. Returns true if
    /// the window is closed and has to be probed (RFC 9293, 3.8.6.1).
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        if self.timer.is_none_or(|at| at > now) {
            return false;
        }
        self.timer = None;
        if self.in_flight() > 0 {
            self.next = self.unacked;
            self.recover = Some(self.max);
        }
        (self.resend_first, self.duplicates) = (false, 0);
        self.timeout = (self.timeout * 2).min(MAX_TIMEOUT);
        if self.room() > 0 {
            // The next call of `next_segment` sends, which starts the timer again.
            return false;
        }
        self.timer = Some(now + self.timeout);
        true
    }

    /// Sequence number and largest length of the next segment, if one may be sent; `expected` bytes of new data are
    /// likely to be there.
    pub(super) fn next_segment(&mut self, readable: bool, expected: u32, now: Instant) -> Option<(u32, usize)> {
        let longest = u32::from(SEGMENT);
        // Sent regardless of the window: the guest has promised to take this once.
        if self.resend_first && self.in_flight() > 0 {
            return Some((self.unacked, self.in_flight().min(longest) as usize));
        }
        self.resend_first = false;
        let new = self.next == self.max;
        if new && !readable {
            return None;
        }
        let room = self.room();
        // Silly window avoidance (RFC 9293, 3.8.6.2.1): new data fills a segment or half of the largest window, unless
        // nothing is in flight. The timer runs meanwhile, because the window update that ends the wait may be lost.
        if room == 0 || new && self.in_flight() > 0 && room < longest.min(self.max_window / 2) {
            self.timer.get_or_insert(now + self.timeout);
            return None;
        }
        let most = if new { room.min(expected) } else { room.min(self.max.wrapping_sub(self.next)) };
        Some((self.next, most.min(longest) as usize))
    }

    /// Notes that the segment of [`Self::next_segment`] was sent with `len` bytes.
    pub(super) fn on_sent(&mut self, len: u32, now: Instant) {
        // The resent first segment is out of sequence and does not move `next`.
        if !std::mem::take(&mut self.resend_first) {
            self.next = self.next.wrapping_add(len);
            if distance(self.next, self.max) > 0 {
                self.max = self.next;
            }
        }
        self.timer.get_or_insert(now + self.timeout);
    }
}

/// Repeats a FIN whose acknowledgement is overdue, in smoltcp's place.
///
/// Three duplicate acknowledgements put a fast retransmission in the place of smoltcp's retransmission timer. That
/// sends data only: when the FIN alone is in flight nothing is sent, and the timer does not run again.
pub(super) struct FinTimer {
    frame: Frame,
    due: Instant,
    timeout: Duration,
}

impl FinTimer {
    /// A FIN that was sent now in this frame; `earlier` is the timer of the one before.
    pub(super) fn start(earlier: Option<&Self>, frame: Frame, now: Instant) -> Self {
        let timeout = earlier.map_or(FIN_TIMEOUT, |fin| fin.timeout);
        Self { frame, due: now + timeout, timeout }
    }

    /// The time for [`Self::expire`].
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// The frame to send again, if it is due.
    pub(super) fn expire(&mut self, now: Instant) -> Option<Frame> {
        if self.due > now {
            return None;
        }
        self.timeout = (self.timeout * 2).min(MAX_FIN_TIMEOUT);
        self.due = now + self.timeout;
        Some(self.frame.clone())
    }
}
