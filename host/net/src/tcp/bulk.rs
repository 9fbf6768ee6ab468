//! Data of the guest, straight from the guest's buffers to the host's socket.
//!
//! A segment that is the next one of its connection, while everything before it is with the host's socket already, is
//! given to that socket where it lies: one copy, the kernel's, and one system call for up to 64 KiB. smoltcp sees nothing
//! of such data; [`super::sender`] moves the sequence numbers of everything else between the guest and smoltcp by as much,
//! and acknowledges the data with the connection's next frame. All other segments go through smoltcp: the first and the
//! last, what the host's socket has no room for, and what is out of order.

use std::net::{IpAddr, SocketAddr};

use smoltcp::wire::{IPV4_HEADER_LEN, IPV6_HEADER_LEN, IpProtocol, Ipv4Packet, Ipv6Packet};

use crate::{
    frame::{ETHERNET_HEADER, ETHERTYPE_IPV4, ETHERTYPE_IPV6},
    key::Key,
};

/// Bytes of a frame that hold all headers of a segment: Ethernet's, the longest of IPv4 and of TCP.
pub(crate) const HEAD: usize = ETHERNET_HEADER + 60 + 60;

const TCP_HEADER: usize = 20;
/// The flags of a segment that only carries data: ACK, with or without PSH.
const ACK: u8 = 16;
const PSH: u8 = 8;

/// A TCP segment with data, and nothing else that has to be acted upon (RFC 9293, 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) key: Key,
    pub(crate) sequence: u32,
    pub(crate) ack: u32,
    /// As it is in the segment, not scaled.
    pub(crate) window: u16,
    /// The data's place in the frame.
    pub(crate) at: usize,
    /// Length of the data; never 0.
    pub(crate) len: usize,
}

impl Segment {
    /// Reads the first bytes, at most [`HEAD`], of a frame of `len` bytes. `None` for every other kind of frame, among
    /// them malformed ones and those with IPv6's extension headers.
    pub(crate) fn parse(head: &[u8], len: usize) -> Option<Self> {
        let (ethernet, packet) = head.split_at_checked(ETHERNET_HEADER)?;
        let len = len.checked_sub(ETHERNET_HEADER)?;
        let (source, destination, start, end) = match [ethernet[12], ethernet[13]] {
            ETHERTYPE_IPV4 => ipv4(packet)?,
            ETHERTYPE_IPV6 => ipv6(packet)?,
            _ => return None,
        };
        let tcp = packet.get(start..).filter(|tcp| tcp.len() >= TCP_HEADER)?;
        let word = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
        let long = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
        let header = usize::from(tcp[12] >> 4) * 4;
        if tcp[13] & !PSH != ACK || header < TCP_HEADER || header > tcp.len() || end > len {
            return None;
        }
        let data = start + header;
        Some(Self {
            key: Key { guest: SocketAddr::new(source, word(0)), peer: SocketAddr::new(destination, word(2)) },
            sequence: long(4),
            ack: long(8),
            window: word(14),
            at: ETHERNET_HEADER + data,
            len: end.checked_sub(data).filter(|len| *len > 0)?,
        })
    }
}

/// The addresses of an IPv4 packet with TCP, and the ends of its header and of the packet; `None` for a fragment.
fn ipv4(packet: &[u8]) -> Option<(IpAddr, IpAddr, usize, usize)> {
    let fixed = packet.get(..IPV4_HEADER_LEN)?;
    let ip = Ipv4Packet::new_unchecked(fixed);
    let header = usize::from(ip.header_len());
    let whole = header >= IPV4_HEADER_LEN && !ip.more_frags() && ip.frag_offset() == 0;
    (ip.version() == 4 && whole && ip.next_header() == IpProtocol::Tcp)
        .then(|| (ip.src_addr().into(), ip.dst_addr().into(), header, usize::from(ip.total_len())))
}

/// The same for IPv6.
fn ipv6(packet: &[u8]) -> Option<(IpAddr, IpAddr, usize, usize)> {
    let fixed = packet.get(..IPV6_HEADER_LEN)?;
    let ip = Ipv6Packet::new_unchecked(fixed);
    (ip.version() == 6 && ip.next_header() == IpProtocol::Tcp).then(|| {
        let end = IPV6_HEADER_LEN + usize::from(ip.payload_len());
        (ip.src_addr().into(), ip.dst_addr().into(), IPV6_HEADER_LEN, end)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::wire::TcpPacket;

    use super::*;
    use crate::ip::{self, Packet};

    fn frame(v6: bool, flags: u8, options: usize, data: usize) -> Vec<u8> {
        let [source, destination]: [IpAddr; 2] = if v6 {
            [1, 2].map(|host| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, host]))
        } else {
            [1, 2].map(|host| IpAddr::from([10, 0, 0, host]))
        };
        let len = TCP_HEADER + options + data;
        ip::frame(source, destination, IpProtocol::Tcp, len, |tcp| {
            tcp[..4].copy_from_slice(&[0, 7, 0, 9]);
            tcp[4..12].copy_from_slice(&[0, 0, 0, 5, 0, 0, 0, 6]);
            tcp[12..16].copy_from_slice(&[((TCP_HEADER + options) as u8 / 4) << 4, flags, 1, 0]);
        })
        .bytes
    }

    #[test]
    fn only_a_segment_with_data_and_no_other_meaning_is_one() {
        for (v6, options, ip) in [(false, 0, 20), (false, 12, 20), (true, 0, 40), (true, 40, 40)] {
            for flags in [ACK, ACK | PSH] {
                let frame = frame(v6, flags, options, 1000);
                let segment = Segment::parse(&frame[..HEAD.min(frame.len())], frame.len()).unwrap();
                assert_eq!((segment.key.guest.port(), segment.key.peer.port()), (7, 9));
                assert_eq!((segment.sequence, segment.ack, segment.window), (5, 6, 256));
                assert_eq!((segment.at, segment.len), (ETHERNET_HEADER + ip + TCP_HEADER + options, 1000));
            }
            // Without an acknowledgement; with the end, a beginning, a reset, urgent data or news of congestion.
            for flags in [0, PSH, 1, 2, 4, 32, 64, 128] {
                let frame = frame(v6, if flags == PSH { PSH } else { ACK & flags.wrapping_neg() | flags }, options, 9);
                assert_eq!(Segment::parse(&frame, frame.len()), None, "{flags}");
            }
            let empty = frame(v6, ACK, options, 0);
            assert_eq!(Segment::parse(&empty, empty.len()), None);
        }
    }

    proptest! {
        #[test]
        fn what_is_read_from_any_bytes_is_what_the_ordinary_way_reads(
            v6: bool, options in 0_usize..11, data in 0_usize..2000, changes in prop::collection::vec((0_usize..130, any::<u8>()), 0..4), cut in 0_usize..40
        ) {
            let mut bytes = frame(v6, ACK, options * 4, data);
            for (at, byte) in changes {
                if let Some(place) = bytes.get_mut(at) {
                    *place = byte;
                }
            }
            bytes.truncate(bytes.len().saturating_sub(cut));
            if let Some(segment) = Segment::parse(&bytes[..HEAD.min(bytes.len())], bytes.len()) {
                let packet = Packet::parse(&bytes[ETHERNET_HEADER..]).unwrap();
                prop_assert_eq!((packet.source, packet.destination), (segment.key.guest.ip(), segment.key.peer.ip()));
                let tcp = TcpPacket::new_checked(packet.payload()).unwrap();
                prop_assert_eq!((tcp.src_port(), tcp.dst_port()), (segment.key.guest.port(), segment.key.peer.port()));
                prop_assert_eq!(tcp.payload(), &bytes[segment.at..segment.at + segment.len]);
                prop_assert!(tcp.ack() && !tcp.syn() && !tcp.fin() && !tcp.rst() && !tcp.urg());
            }
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..HEAD), len in 0_usize..70_000) {
            let _ = Segment::parse(&bytes, len);
        }
    }
}
