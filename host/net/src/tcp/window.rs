//! Keeps smoltcp retransmitting to a guest whose window closes over data in flight.
//!
//! Linux closes its window when a socket is short of memory, and drops data that it had promised room for. smoltcp then
//! replaces its retransmission timer by the one for window probes. When the window opens only as far as it was, there
//! is nothing new to send, and the dropped data is never sent again. With the smallest window instead of none, smoltcp
//! goes on retransmitting, as RFC 9293, 3.8.6 demands for a window that shrinks; that also probes the window (3.8.6.1).
//!
//! Only for data that goes through smoltcp; [`super::retransmit`] handles such a window by itself.

use smoltcp::wire::{TcpPacket, TcpSeqNumber};

/// The end of a connection's data on its way to the guest.
#[derive(Debug, Default)]
pub(super) struct WindowGuard {
    /// The sequence number after the last byte that was sent.
    end: Option<TcpSeqNumber>,
}

impl WindowGuard {
    /// Notes a segment of smoltcp's.
    pub(super) fn on_sent(&mut self, segment: &[u8]) {
        let Ok(tcp) = TcpPacket::new_checked(segment) else { return };
        let end = tcp.seq_number() + tcp.segment_len();
        // A retransmission is before the end. A SYN starts another sequence (see `GuestEnd::retry_connect`).
        if tcp.syn() || self.end.is_none_or(|last| last < end) {
            self.end = Some(end);
        }
    }

    /// Opens a closed window in a segment of the guest by the smallest unit while data is in flight.
    pub(super) fn keep_open(&self, segment: &mut [u8]) {
        // The checksum goes wrong with the change, but nothing checks it between the guest and here.
        let Ok(mut tcp) = TcpPacket::new_checked(segment) else { return };
        let in_flight = self.end.is_some_and(|end| tcp.ack_number() < end);
        if tcp.ack() && !tcp.syn() && !tcp.rst() && tcp.window_len() == 0 && in_flight {
            tcp.set_window_len(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A segment without options.
    fn segment(sequence: i32, ack: i32, flags: u8, window: u16, data: usize) -> Vec<u8> {
        let mut bytes = vec![0; 20 + data];
        let mut tcp = TcpPacket::new_unchecked(&mut bytes);
        tcp.set_src_port(1);
        tcp.set_dst_port(1);
        tcp.set_seq_number(TcpSeqNumber(sequence));
        tcp.set_ack_number(TcpSeqNumber(ack));
        tcp.set_header_len(20);
        tcp.set_window_len(window);
        bytes[13] = flags;
        bytes
    }

    const ACK: u8 = 16;
    const RST: u8 = 4;

    fn kept(sent: &WindowGuard, ack: i32, flags: u8, window: u16) -> u16 {
        let mut bytes = segment(5, ack, flags, window, 0);
        sent.keep_open(&mut bytes);
        TcpPacket::new_unchecked(&bytes).window_len()
    }

    #[test]
    fn a_window_closes_only_when_all_is_acknowledged() {
        let mut sent = WindowGuard::default();
        assert_eq!(kept(&sent, 0, ACK, 0), 0);
        // Over the end of the numbers, and once more from the beginning.
        sent.on_sent(&segment(i32::MAX - 9, 0, ACK, 0, 20));
        sent.on_sent(&segment(i32::MAX - 9, 0, ACK, 0, 10));
        let end = i32::MIN + 10;
        assert_eq!((kept(&sent, end - 1, ACK, 0), kept(&sent, end, ACK, 0)), (1, 0));
        assert_eq!((kept(&sent, end - 1, ACK, 9), kept(&sent, end - 1, ACK | RST, 0)), (9, 0));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let mut sent = WindowGuard::default();
            sent.on_sent(&bytes);
            sent.keep_open(&mut bytes.clone());
        }
    }
}
