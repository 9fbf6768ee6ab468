//! Offloads towards the guest: TCP headers whose checksums the guest's kernel completes and whose long segments it cuts
//! (virtio 1.3, 5.1.6.4).

use std::net::IpAddr;

use smoltcp::wire::{IpAddress, IpProtocol, TcpPacket};

use super::{
    addresses::{GATEWAY_MAC, GUEST_MAC},
    frame::{ETHERNET_HEADER, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Frame, VIRTIO_HEADER},
    ip::{self, Packet},
    key::Key,
};

/// Largest amount of data in one segment, in bytes: an IP packet less IPv6's and TCP's headers.
pub(super) const SEGMENT: u16 = 65_475;

/// Offloads that the guest's driver has negotiated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Offload {
    /// The guest completes checksums (`VIRTIO_NET_F_GUEST_CSUM`).
    pub(super) checksum: bool,
    /// The guest cuts long segments (`VIRTIO_NET_F_GUEST_TSO4` and `6`).
    pub(super) segmentation: bool,
}

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV4`.
const GSO_TCPV4: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV6`.
const GSO_TCPV6: u8 = 4;
/// Offset of the checksum in a TCP header.
const TCP_CHECKSUM: u16 = 16;

/// Leaves a TCP segment's checksum to the guest, and its segmentation if it has more than `mss` bytes of data.
///
/// Without `checksum_offload` the checksum is made here. Then no segment is longer than the guest takes, because the
/// driver may negotiate segmentation only together with checksums (virtio 1.3, 5.1.3.1).
pub(super) fn offload_tcp(frame: &mut Frame, mss: u16, checksum_offload: bool) {
    let Some(packet) = frame.bytes.get(ETHERNET_HEADER..).and_then(Packet::parse) else { return };
    let (source, destination) = (packet.source, packet.destination);
    // smoltcp writes no options into IP headers.
    let start = ETHERNET_HEADER + ip::header_len(source);
    let Some(tcp) = frame.bytes.get_mut(start..) else { return };
    let len = tcp.len();
    // Other packets than TCP's never come from smoltcp here.
    let Ok(mut view) = TcpPacket::new_checked(tcp) else { return };
    if !checksum_offload {
        view.fill_checksum(&IpAddress::from(source), &IpAddress::from(destination));
        return;
    }
    view.set_checksum(pseudo_header_sum(source, destination, len));
    let tcp_header = usize::from(view.header_len());
    frame.header = virtio_header(source, start, tcp_header, len.saturating_sub(tcp_header), mss);
}

/// The sum over the pseudo-header (RFC 9293, 3.1; RFC 8200, 8.1), not inverted: the guest's kernel adds the rest to
/// what stands in the checksum field (virtio 1.3, 5.1.6.2).
fn pseudo_header_sum(source: IpAddr, destination: IpAddr, len: usize) -> u16 {
    let words = |address: IpAddr| -> u32 {
        let sum = |bytes: &[u8]| bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
        match address {
            IpAddr::V4(address) => sum(&address.octets()),
            IpAddr::V6(address) => sum(&address.octets()),
        }
    };
    let mut sum = words(source) + words(destination) + u32::from(u8::from(IpProtocol::Tcp)) + len as u32;
    // One's complement addition: carries go back in at the lower end (RFC 1071).
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Length of a TCP header without options.
const TCP_HEADER: usize = 20;
/// Length of the longest headers, IPv6's.
const MAX_HEAD: usize = ETHERNET_HEADER + 40 + TCP_HEADER;

/// Length of the headers of a connection's data segments, without virtio's.
pub(super) fn head_len(key: &Key) -> usize {
    ETHERNET_HEADER + ip::header_len(key.peer.ip()) + TCP_HEADER
}

/// All headers of a TCP data segment to the guest, separate from the data.
pub(super) struct Head {
    /// virtio's header.
    pub(super) header: [u8; VIRTIO_HEADER],
    bytes: [u8; MAX_HEAD],
    len: usize,
}

impl Head {
    /// The headers of a segment of `len` bytes with this sequence number, acknowledgement and (scaled) window. The
    /// guest completes the checksum, and cuts data longer than `mss`.
    pub(super) fn new(
        key: Key,
        (sequence, acknowledged): (u32, u32),
        window: u16,
        push: bool,
        len: usize,
        mss: u16,
    ) -> Self {
        const ACK: u8 = 16;
        const PSH: u8 = 8;
        let (source, destination) = (key.peer.ip(), key.guest.ip());
        let start = ETHERNET_HEADER + ip::header_len(source);
        let mut head = Self { header: [0; VIRTIO_HEADER], bytes: [0; MAX_HEAD], len: start + TCP_HEADER };
        head.bytes[..6].copy_from_slice(&GUEST_MAC);
        head.bytes[6..12].copy_from_slice(&GATEWAY_MAC);
        head.bytes[12..14].copy_from_slice(if source.is_ipv4() { &ETHERTYPE_IPV4 } else { &ETHERTYPE_IPV6 });
        ip::fill(&mut head.bytes[ETHERNET_HEADER..start], source, destination, IpProtocol::Tcp, TCP_HEADER + len);
        // No options: none of those that smoltcp negotiates has to be in every segment. The urgent pointer stays zero,
        // since urgent data travels as ordinary data (RFC 6093, 6).
        let tcp = &mut head.bytes[start..];
        tcp[..2].copy_from_slice(&key.peer.port().to_be_bytes());
        tcp[2..4].copy_from_slice(&key.guest.port().to_be_bytes());
        tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
        tcp[8..12].copy_from_slice(&acknowledged.to_be_bytes());
        tcp[12..14].copy_from_slice(&[(TCP_HEADER as u8 / 4) << 4, if push { ACK | PSH } else { ACK }]);
        tcp[14..16].copy_from_slice(&window.to_be_bytes());
        let sum = pseudo_header_sum(source, destination, TCP_HEADER + len);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        head.header = virtio_header(source, start, TCP_HEADER, len, mss);
        head
    }

    /// The headers after virtio's.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// A frame without data.
    pub(super) fn into_frame(self) -> Frame {
        Frame { header: self.header, bytes: self.bytes().to_vec() }
    }
}

/// `struct virtio_net_hdr` for a TCP segment of `len` bytes of data whose own header starts at `start` (virtio 1.3,
/// 5.1.6).
fn virtio_header(source: IpAddr, start: usize, tcp_header: usize, len: usize, mss: u16) -> [u8; VIRTIO_HEADER] {
    let mut header = [0; VIRTIO_HEADER];
    // `flags`, `csum_start` and `csum_offset`: the checksum covers everything from the TCP header on.
    header[0] = NEEDS_CSUM;
    header[6..8].copy_from_slice(&(start as u16).to_le_bytes());
    header[8..10].copy_from_slice(&TCP_CHECKSUM.to_le_bytes());
    if len > usize::from(mss) {
        // `gso_type`, `hdr_len` (all headers, which each piece repeats) and `gso_size`.
        header[1] = if source.is_ipv4() { GSO_TCPV4 } else { GSO_TCPV6 };
        header[2..4].copy_from_slice(&((start + tcp_header) as u16).to_le_bytes());
        header[4..6].copy_from_slice(&mss.to_le_bytes());
    }
    header
}

/// The TCP segment of an IP packet.
pub(super) fn segment_of(packet: &mut [u8]) -> Option<&mut [u8]> {
    let header = match packet.first()? {
        // IHL counts words of 4 bytes. IPv6's own header has 40 bytes, and TCP behind extension headers is not served.
        first if first >> 4 == 4 => usize::from(first & 15) * 4,
        _ => 40,
    };
    packet.get_mut(header..)
}

/// Raises the maximum segment size that a SYN announces to `size`, and returns the announced one (RFC 9293, 3.7.1).
///
/// smoltcp then makes segments of `size`, and the guest's kernel cuts them to the announced one.
pub(super) fn raise_mss(packet: &mut [u8], size: u16) -> u16 {
    /// For a SYN without the option.
    const DEFAULT: u16 = 536;
    let Some(tcp) = segment_of(packet) else { return DEFAULT };
    let Some(len) = tcp.get(12).map(|byte| usize::from(byte >> 4) * 4) else { return DEFAULT };
    let Some(options) = tcp.get_mut(20..len.max(20)) else { return DEFAULT };
    let mut at = 0;
    while let Some(kind) = options.get(at) {
        match kind {
            // End of option list, no-operation; all others have a length (RFC 9293, 3.1).
            0 => break,
            1 => at += 1,
            _ => {
                // A length below 2 would never get past this option.
                let Some(len) = options.get(at + 1).copied().filter(|len| *len >= 2) else { break };
                if *kind == 2
                    && len == 4
                    && let Some(value) = options.get_mut(at + 2..at + 4)
                {
                    let announced = u16::from_be_bytes([value[0], value[1]]);
                    value.copy_from_slice(&size.to_be_bytes());
                    // A tiny size, which only a hostile guest announces, would cost it thousands of pieces for each
                    // segment.
                    return announced.max(64);
                }
                at += usize::from(len);
            }
        }
    }
    DEFAULT
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::addresses::example;

    /// A segment from the host to the guest.
    fn segment(v6: bool, data: &[u8]) -> Frame {
        let addresses = example();
        let (source, destination): (IpAddr, IpAddr) = if v6 {
            (addresses.host6.into(), addresses.guest6.into())
        } else {
            (addresses.host.into(), addresses.guest.into())
        };
        ip::frame(source, destination, IpProtocol::Tcp, 20 + data.len(), |tcp| {
            tcp[12] = 5 << 4;
            tcp[20..].copy_from_slice(data);
        })
    }

    #[test]
    fn a_long_segment_is_left_to_be_cut_to_what_the_peer_takes() {
        let mut frame = segment(false, &[0; 3000]);
        offload_tcp(&mut frame, 1460, true);
        assert_eq!(frame.header, [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0]);
        let mut frame = segment(true, &[0; 3000]);
        offload_tcp(&mut frame, 1440, true);
        assert_eq!(frame.header, [1, 4, 74, 0, 0xa0, 5, 54, 0, 16, 0, 0, 0]);
        let mut frame = segment(false, &[0; 3000]);
        offload_tcp(&mut frame, 3000, true);
        assert_eq!(frame.header[1], 0);
    }

    proptest! {
        #[test]
        fn a_completed_partial_checksum_is_the_whole_checksum(data in prop::collection::vec(any::<u8>(), 0..100), v6 in any::<bool>()) {
            let make = |offload| {
                let mut frame = segment(v6, &data);
                offload_tcp(&mut frame, 65_000, offload);
                frame.bytes[ETHERNET_HEADER + if v6 { 40 } else { 20 }..].to_vec()
            };
            let mut partial = make(true);
            let sum = partial.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum::<u32>();
            let sum = (sum & 0xffff) + (sum >> 16);
            let completed = !(((sum & 0xffff) + (sum >> 16)) as u16);
            partial[16..18].copy_from_slice(&completed.to_be_bytes());
            prop_assert_eq!(partial, make(false));
        }

        #[test]
        fn the_segment_size_is_found_among_any_options(before in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..4), 0..4), size in 64_u16.., v6 in any::<bool>()) {
            let mut options = Vec::new();
            for data in before {
                options.extend([200, data.len() as u8 + 2]);
                options.extend(data);
                options.push(1);
            }
            options.extend([2, 4, (size >> 8) as u8, size as u8]);
            options.resize(options.len().next_multiple_of(4), 0);
            prop_assume!(options.len() <= 40);
            let header = if v6 { 40 } else { 20 };
            let mut packet = vec![0; header + 20];
            packet[0] = if v6 { 0x60 } else { 0x45 };
            packet[header + 12] = ((20 + options.len()) as u8 / 4) << 4;
            packet.extend(&options);
            prop_assert_eq!(raise_mss(&mut packet, 65_495), size);
            prop_assert_eq!(raise_mss(&mut packet, 1), 65_495);
        }

        #[test]
        fn no_packet_makes_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..120), v6 in any::<bool>()) {
            if let Some(first) = bytes.first_mut() {
                *first = if v6 { 0x60 } else { 0x40 } | *first & 15;
            }
            raise_mss(&mut bytes, 9000);
        }
    }
}
