//! Credit-based flow control of a connection (virtio 1.3, 5.10.6.3), as numbers only.
//!
//! Each side announces the size of its buffer (`buf_alloc`) and the bytes that have left it (`fwd_cnt`), so the other
//! side can compute how much it may still send. All counters wrap at 2^32.

use std::{collections::VecDeque, num::Wrapping};

/// Maximum number of the guest's bytes that are held for a host reader that is slower than the guest.
pub(super) const BUF_ALLOC: u32 = 256 << 10;

/// Bytes that a Linux guest charges to its buffer for each queued packet besides the payload (`SKB_TRUESIZE(0)`).
pub(super) const PACKET_OVERHEAD: u32 = 576;

/// Maximum number of packets in flight on a connection, however large a buffer the guest claims: each takes memory
/// here.
pub(super) const MAX_PACKETS: usize = 4096;

/// Minimum credit for a packet while others are in flight: a nearly full buffer is not filled up with tiny packets.
const MIN_WINDOW: u32 = 1024;

/// The credit that the guest gives.
///
/// The specification counts payload only. Linux also charges [`PACKET_OVERHEAD`] bytes for each packet that it holds,
/// and resets the stream when the sum exceeds its buffer. So the packets that may still be queued there are counted,
/// too.
#[derive(Debug)]
pub(super) struct PeerCredit {
    buf_alloc: u32,
    fwd_cnt: Wrapping<u32>,
    /// Lengths of the packets that the guest has not read completely, oldest first; of the oldest the unread part.
    packets: VecDeque<u32>,
    /// Sum of `packets`.
    unread: u32,
}

impl PeerCredit {
    /// Creates the credit of a connection on which nothing was sent yet.
    pub(super) fn new(buf_alloc: u32) -> Self {
        Self { buf_alloc, fwd_cnt: Wrapping(0), packets: VecDeque::new(), unread: 0 }
    }

    /// Updates the credit from a packet of the guest.
    pub(super) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        // An increase by more than is unread is either a lie or a decrease modulo 2^32, that is an older count than the
        // one known: Linux may queue packets in another order than it stamps them. Neither changes anything.
        let mut read = (Wrapping(fwd_cnt) - self.fwd_cnt).0;
        if read > self.unread {
            return;
        }
        self.fwd_cnt = Wrapping(fwd_cnt);
        self.unread -= read;
        // The guest reads packets in order, so the bytes read complete the oldest ones.
        while let Some(oldest) = self.packets.front_mut() {
            if read < *oldest {
                *oldest -= read;
                break;
            }
            read -= *oldest;
            self.packets.pop_front();
        }
    }

    /// Returns the number of payload bytes that the next packet may carry. With nothing in flight one packet may always
    /// fill the guest's buffer, however small.
    pub(super) fn room(&self) -> usize {
        // Otherwise a guest whose whole buffer is smaller than the charge for a packet would never receive anything.
        if self.packets.is_empty() {
            return if self.buf_alloc > PACKET_OVERHEAD { self.buf_alloc - PACKET_OVERHEAD } else { self.buf_alloc }
                as usize;
        }
        // A bound on this list; a guest could claim a buffer of 4 GiB and leave millions of one-byte packets unread.
        if self.packets.len() >= MAX_PACKETS {
            return 0;
        }
        // At most MAX_PACKETS + 1 packets, so the product is far below 2^32.
        let overhead = (self.packets.len() as u32 + 1) * PACKET_OVERHEAD;
        // A guest may shrink its buffer below what is in flight.
        let room = self.buf_alloc.saturating_sub(self.unread).saturating_sub(overhead);
        if room < MIN_WINDOW { 0 } else { room as usize }
    }

    /// Records a sent packet with this much payload, at most [`Self::room`].
    pub(super) fn sent(&mut self, len: usize) {
        self.packets.push_back(len as u32);
        self.unread = self.unread.saturating_add(len as u32);
    }

    /// True if the guest must be asked for its credit. Linux sends an update by itself only when its buffer is nearly
    /// full in bytes of payload; here it is not, and only the charge for packets exhausts the credit.
    pub(super) fn must_ask(&self) -> bool {
        self.unread < self.buf_alloc / 2
    }
}

/// The guest exceeded its credit.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overrun;

/// The credit that the guest has.
#[derive(Debug, Default)]
pub(super) struct OwnCredit {
    /// Bytes received from the guest.
    received: Wrapping<u32>,
    /// Bytes that left the buffer, to the host or because it refused them.
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest last saw it.
    advertised: Wrapping<u32>,
}

impl OwnCredit {
    /// Records payload from the guest.
    pub(super) fn receive(&mut self, len: usize) -> Result<(), Overrun> {
        // The guest may send up to BUF_ALLOC bytes more than have left the buffer. This bounds what is held for it, so
        // it is enforced against a guest that ignores its credit.
        let held = (self.received - self.forwarded).0;
        let fits = u32::try_from(len).ok().and_then(|len| held.checked_add(len)).is_some_and(|sum| sum <= BUF_ALLOC);
        if !fits {
            return Err(Overrun);
        }
        self.received += len as u32;
        Ok(())
    }

    /// Records payload that left the buffer.
    pub(super) fn forward(&mut self, len: usize) {
        self.forwarded += len as u32;
    }

    /// Returns `buf_alloc` and `fwd_cnt` for a packet that is sent now. Every packet carries them, so each is an
    /// update.
    pub(super) fn stamp(&mut self) -> (u32, u32) {
        self.advertised = self.forwarded;
        (BUF_ALLOC, self.forwarded.0)
    }

    /// True if an update of its own is worthwhile: the guest sees less than half of the buffer free, and would see
    /// noticeably more, or all of it.
    pub(super) fn update_due(&self) -> bool {
        // Any packet to the guest carries the news, too. Updates are for connections on which nothing else is sent.
        let seen_used = (self.received - self.advertised).0;
        let news = (self.forwarded - self.advertised).0;
        seen_used > BUF_ALLOC / 2 && (news >= BUF_ALLOC / 8 || (news > 0 && self.forwarded == self.received))
    }
}
