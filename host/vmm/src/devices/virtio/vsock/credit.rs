//! Credit-based flow control of one connection (virtio 1.3, 5.10.6.3), as numbers only.

use std::{collections::VecDeque, num::Wrapping};

/// Bytes of the guest's data held for a host reader that is slower than the guest.
pub(super) const BUF_ALLOC: u32 = 256 << 10;

/// What a guest charges against its buffer for each queued packet besides the payload (`SKB_TRUESIZE(0)` of Linux).
pub(super) const PACKET_OVERHEAD: u32 = 576;

/// Most packets in flight on a connection, whatever space the guest claims.
pub(super) const MAX_PACKETS: usize = 4096;

/// No packet smaller than this is sent only because credit is nearly used up.
const MIN_WINDOW: u32 = 1024;

/// What the guest lets us send.
///
/// A guest may charge [`PACKET_OVERHEAD`] bytes for each packet that it holds and resets the stream when the sum passes
/// its buffer. So the packets that may still be queued there are counted, not only their bytes.
#[derive(Debug)]
pub(super) struct PeerCredit {
    buf_alloc: u32,
    fwd_cnt: Wrapping<u32>,
    /// Lengths of the packets not wholly read yet, oldest first; of the oldest only what is unread.
    packets: VecDeque<u32>,
    /// Their sum.
    unread: u32,
}

impl PeerCredit {
    /// The credit of a connection on which nothing was sent yet.
    pub(super) fn new(buf_alloc: u32) -> Self {
        Self { buf_alloc, fwd_cnt: Wrapping(0), packets: VecDeque::new(), unread: 0 }
    }

    /// Takes over what a packet of the guest says. Counts that claim more than was sent are lies or older than what is
    /// known (a guest may queue packets in another order than it stamps them) and change nothing.
    pub(super) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        let mut read = (Wrapping(fwd_cnt) - self.fwd_cnt).0;
        if read > self.unread {
            return;
        }
        self.fwd_cnt = Wrapping(fwd_cnt);
        self.unread -= read;
        while let Some(oldest) = self.packets.front_mut() {
            if read < *oldest {
                *oldest -= read;
                break;
            }
            read -= *oldest;
            self.packets.pop_front();
        }
    }

    /// Payload bytes that the next packet may carry. With nothing in flight there is always room for one packet in
    /// whatever buffer the guest has.
    pub(super) fn room(&self) -> usize {
        if self.packets.is_empty() {
            return if self.buf_alloc > PACKET_OVERHEAD { self.buf_alloc - PACKET_OVERHEAD } else { self.buf_alloc }
                as usize;
        }
        if self.packets.len() >= MAX_PACKETS {
            return 0;
        }
        // At most MAX_PACKETS + 1 packets, so the product is far below 2^32.
        let overhead = (self.packets.len() as u32 + 1) * PACKET_OVERHEAD;
        let room = self.buf_alloc.saturating_sub(self.unread).saturating_sub(overhead);
        if room < MIN_WINDOW { 0 } else { room as usize }
    }

    /// A packet with this much payload, at most [`Self::room`], went out.
    pub(super) fn sent(&mut self, len: usize) {
        self.packets.push_back(len as u32);
        self.unread = self.unread.saturating_add(len as u32);
    }

    /// True if the guest will hardly tell by itself that it read something: in bytes its buffer is still half empty.
    pub(super) fn must_ask(&self) -> bool {
        self.unread < self.buf_alloc / 2
    }
}

/// The guest sent more than it was allowed to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overrun;

/// What we let the guest send.
#[derive(Debug, Default)]
pub(super) struct OwnCredit {
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    advertised: Wrapping<u32>,
}

impl OwnCredit {
    /// The guest sent this much payload.
    pub(super) fn receive(&mut self, len: usize) -> Result<(), Overrun> {
        let held = (self.received - self.forwarded).0;
        let fits = u32::try_from(len).ok().and_then(|len| held.checked_add(len)).is_some_and(|sum| sum <= BUF_ALLOC);
        if !fits {
            return Err(Overrun);
        }
        self.received += len as u32;
        Ok(())
    }

    /// This much of it left our buffer.
    pub(super) fn forward(&mut self, len: usize) {
        self.forwarded += len as u32;
    }

    /// The `buf_alloc` and `fwd_cnt` of a packet that goes out now.
    pub(super) fn stamp(&mut self) -> (u32, u32) {
        self.advertised = self.forwarded;
        (BUF_ALLOC, self.forwarded.0)
    }

    /// True if the guest sees less than half of the buffer free, and news would change that noticeably.
    pub(super) fn update_due(&self) -> bool {
        let seen_used = (self.received - self.advertised).0;
        let news = (self.forwarded - self.advertised).0;
        seen_used > BUF_ALLOC / 2 && (news >= BUF_ALLOC / 8 || (news > 0 && self.forwarded == self.received))
    }
}
