//! Windows that close over what is already on its way.
//!
//! Linux takes its window back when the memory of a socket is short, and drops what it has promised room for. The stack
//! then waits for the window with a timer that takes the place of the one that repeats; when the window opens as far as
//! it was, there is nothing new to send and what was dropped is never sent again. Told of the smallest window instead of
//! none, the stack goes on repeating, as RFC 9293, 3.8.6, wants it for a window that shrinks; the repetitions also ask
//! for the window (3.8.6.1).

use smoltcp::wire::{TcpPacket, TcpSeqNumber};

/// How far a connection's data is on its way to the guest.
#[derive(Debug, Default)]
pub(super) struct Sent {
    /// The sequence number behind the last byte.
    end: Option<TcpSeqNumber>,
}

impl Sent {
    /// Notes a segment to the guest.
    pub(super) fn note(&mut self, segment: &[u8]) {
        let Ok(tcp) = TcpPacket::new_checked(segment) else { return };
        let end = tcp.seq_number() + tcp.segment_len();
        // A new beginning has nothing to do with what was.
        if tcp.syn() || self.end.is_none_or(|last| last < end) {
            self.end = Some(end);
        }
    }

    /// Opens the closed window of a segment from the guest by the least there is, while something is on its way.
    pub(super) fn keep_open(&self, segment: &mut [u8]) {
        let Ok(mut tcp) = TcpPacket::new_checked(segment) else { return };
        let on_its_way = self.end.is_some_and(|end| tcp.ack_number() < end);
        if tcp.ack() && !tcp.syn() && !tcp.rst() && tcp.window_len() == 0 && on_its_way {
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

    fn kept(sent: &Sent, ack: i32, flags: u8, window: u16) -> u16 {
        let mut bytes = segment(5, ack, flags, window, 0);
        sent.keep_open(&mut bytes);
        TcpPacket::new_unchecked(&bytes).window_len()
    }

    #[test]
    fn a_window_closes_only_when_all_is_acknowledged() {
        let mut sent = Sent::default();
        assert_eq!(kept(&sent, 0, ACK, 0), 0);
        // Over the end of the numbers, and once more from the beginning.
        sent.note(&segment(i32::MAX - 9, 0, ACK, 0, 20));
        sent.note(&segment(i32::MAX - 9, 0, ACK, 0, 10));
        let end = i32::MIN + 10;
        assert_eq!((kept(&sent, end - 1, ACK, 0), kept(&sent, end, ACK, 0)), (1, 0));
        assert_eq!((kept(&sent, end - 1, ACK, 9), kept(&sent, end - 1, ACK | RST, 0)), (9, 0));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let mut sent = Sent::default();
            sent.note(&bytes);
            sent.keep_open(&mut bytes.clone());
        }
    }
}
