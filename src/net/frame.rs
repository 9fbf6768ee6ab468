//! Frames on the wire to the guest: Ethernet, ARP, IPv4, and the header that virtio puts before each.

use std::net::{Ipv4Addr, SocketAddrV4};

use smoltcp::wire::{IPV4_HEADER_LEN, IpAddress, IpProtocol, Ipv4Packet, TcpPacket, UDP_HEADER_LEN, UdpPacket};

use super::addresses::{GATEWAY_MAC, GUEST_MAC, is_ours};

/// `struct virtio_net_hdr` with `num_buffers` (virtio 1.3, 5.1.6).
pub(super) const VIRTIO_HEADER: usize = 12;
/// Destination, source, type.
pub(super) const ETHERNET_HEADER: usize = 14;
/// Largest frame: an IP packet cannot be longer than its length field says.
pub(super) const MOST: usize = ETHERNET_HEADER + 65_535;

const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const ETHERTYPE_IPV4: [u8; 2] = [8, 0];
const ETHERTYPE_ARP: [u8; 2] = [8, 6];
/// Offset of the checksum in a TCP header.
const TCP_CHECKSUM: u16 = 16;

/// A frame for the guest.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame {
    /// virtio's header; `num_buffers` is set when the buffers are known.
    pub(super) header: [u8; VIRTIO_HEADER],
    /// The Ethernet frame.
    pub(super) bytes: Vec<u8>,
}

/// What a frame of the guest carries.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Payload<'a> {
    /// A question for the hardware address of one of our addresses, ready to be answered.
    Arp {
        /// Who asks.
        sender_mac: [u8; 6],
        /// From which address.
        sender: Ipv4Addr,
        /// Whom it looks for.
        target: Ipv4Addr,
    },
    /// A whole IPv4 packet of the guest, cut to its length.
    Ipv4(&'a [u8]),
}

/// Reads a frame; `None` for all that this network does not carry.
pub(super) fn parse(frame: &[u8]) -> Option<Payload<'_>> {
    let (header, rest) = frame.split_at_checked(ETHERNET_HEADER)?;
    match [header[12], header[13]] {
        ETHERTYPE_IPV4 => {
            let packet = Ipv4Packet::new_checked(rest).ok()?;
            let header = usize::from(packet.header_len());
            // Fragments of datagrams are not put together here.
            let whole = packet.version() == 4 && header >= IPV4_HEADER_LEN && !packet.more_frags();
            let len = usize::from(packet.total_len());
            (whole && packet.frag_offset() == 0).then_some(Payload::Ipv4(rest.get(..len)?))
        }
        ETHERTYPE_ARP => {
            let arp = rest.get(..28)?;
            // Ethernet, IPv4, sizes 6 and 4, request (RFC 826).
            if arp[..8] != [0, 1, 8, 0, 6, 4, 0, 1] {
                return None;
            }
            let address = |at: usize| Ipv4Addr::new(arp[at], arp[at + 1], arp[at + 2], arp[at + 3]);
            let target = address(24);
            let sender_mac = arp[8..14].try_into().ok()?;
            is_ours(target).then_some(Payload::Arp { sender_mac, sender: address(14), target })
        }
        _ => None,
    }
}

/// "It is me", for one of our addresses.
pub(super) fn arp_reply(sender_mac: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Frame {
    let mut bytes = ethernet(28, ETHERTYPE_ARP);
    bytes[..6].copy_from_slice(&sender_mac);
    let arp = &mut bytes[ETHERNET_HEADER..];
    arp[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
    arp[8..14].copy_from_slice(&GATEWAY_MAC);
    arp[14..18].copy_from_slice(&target.octets());
    arp[18..24].copy_from_slice(&sender_mac);
    arp[24..28].copy_from_slice(&sender.octets());
    Frame { header: [0; VIRTIO_HEADER], bytes }
}

/// An Ethernet frame to the guest with room for `len` bytes.
fn ethernet(len: usize, ethertype: [u8; 2]) -> Vec<u8> {
    let mut bytes = vec![0; ETHERNET_HEADER + len];
    bytes[..6].copy_from_slice(&GUEST_MAC);
    bytes[6..12].copy_from_slice(&GATEWAY_MAC);
    bytes[12..14].copy_from_slice(&ethertype);
    bytes
}

/// A frame for an IPv4 packet of this length, to be filled from [`ETHERNET_HEADER`] on.
pub(super) fn ipv4(len: usize) -> Frame {
    Frame { header: [0; VIRTIO_HEADER], bytes: ethernet(len, ETHERTYPE_IPV4) }
}

/// Leaves a TCP segment's checksum to the guest, and its segmentation when it is longer than `segment` bytes of data.
///
/// Without `checksum_offload` the checksum is made here.
pub(super) fn offload_tcp(frame: &mut Frame, segment: u16, checksum_offload: bool) {
    let Some((ip, tcp)) =
        frame.bytes.get_mut(ETHERNET_HEADER..).and_then(|bytes| bytes.split_at_mut_checked(IPV4_HEADER_LEN))
    else {
        return;
    };
    let packet = Ipv4Packet::new_unchecked(&*ip);
    let (source, destination) = (packet.src_addr(), packet.dst_addr());
    let len = tcp.len();
    let Ok(mut segment_view) = TcpPacket::new_checked(tcp) else { return };
    if !checksum_offload {
        segment_view.fill_checksum(&IpAddress::Ipv4(source), &IpAddress::Ipv4(destination));
        return;
    }
    let pseudo = pseudo_header_sum(source, destination, len as u16);
    segment_view.set_checksum(pseudo);
    let tcp_header = usize::from(segment_view.header_len());
    let start = (ETHERNET_HEADER + IPV4_HEADER_LEN) as u16;
    frame.header[0] = NEEDS_CSUM;
    frame.header[6..8].copy_from_slice(&start.to_le_bytes());
    frame.header[8..10].copy_from_slice(&TCP_CHECKSUM.to_le_bytes());
    if len.saturating_sub(tcp_header) > usize::from(segment) {
        frame.header[1] = GSO_TCPV4;
        frame.header[2..4].copy_from_slice(&(start + tcp_header as u16).to_le_bytes());
        frame.header[4..6].copy_from_slice(&segment.to_le_bytes());
    }
}

/// The not inverted sum over the pseudo-header, where a checksum is to be completed (RFC 9293, 3.1).
fn pseudo_header_sum(source: Ipv4Addr, destination: Ipv4Addr, len: u16) -> u16 {
    let word = |address: Ipv4Addr| {
        let [a, b, c, d] = address.octets();
        u32::from(u16::from_be_bytes([a, b])) + u32::from(u16::from_be_bytes([c, d]))
    };
    let sum = word(source) + word(destination) + u32::from(u8::from(IpProtocol::Tcp)) + u32::from(len);
    let folded = (sum & 0xffff) + (sum >> 16);
    ((folded & 0xffff) + (folded >> 16)) as u16
}

/// An IPv4 header at the front of `packet`.
fn fill_ipv4(packet: &mut [u8], source: Ipv4Addr, destination: Ipv4Addr, protocol: IpProtocol) {
    let len = packet.len() as u16;
    let mut ip = Ipv4Packet::new_unchecked(packet);
    ip.set_version(4);
    ip.set_header_len(IPV4_HEADER_LEN as u8);
    ip.set_total_len(len);
    ip.set_hop_limit(64);
    ip.set_next_header(protocol);
    ip.set_src_addr(source);
    ip.set_dst_addr(destination);
    ip.fill_checksum();
}

/// A datagram to the guest.
pub(super) fn udp(source: SocketAddrV4, destination: SocketAddrV4, data: &[u8]) -> Frame {
    let mut frame = ipv4(IPV4_HEADER_LEN + UDP_HEADER_LEN + data.len());
    let packet = &mut frame.bytes[ETHERNET_HEADER..];
    fill_ipv4(packet, *source.ip(), *destination.ip(), IpProtocol::Udp);
    let mut udp = UdpPacket::new_unchecked(&mut packet[IPV4_HEADER_LEN..]);
    udp.set_src_port(source.port());
    udp.set_dst_port(destination.port());
    udp.set_len((UDP_HEADER_LEN + data.len()) as u16);
    udp.payload_mut().copy_from_slice(data);
    udp.fill_checksum(&IpAddress::Ipv4(*source.ip()), &IpAddress::Ipv4(*destination.ip()));
    frame
}

/// The answer to an ICMP echo request; `None` for every other packet (RFC 792).
pub(super) fn echo_reply(packet: &[u8]) -> Option<Frame> {
    let request = Ipv4Packet::new_checked(packet).ok()?;
    let message = request.payload();
    if request.next_header() != IpProtocol::Icmp || message.len() < 8 || message[..2] != [8, 0] {
        return None;
    }
    let mut frame = ipv4(IPV4_HEADER_LEN + message.len());
    let reply = &mut frame.bytes[ETHERNET_HEADER..];
    fill_ipv4(reply, request.dst_addr(), request.src_addr(), IpProtocol::Icmp);
    reply[IPV4_HEADER_LEN..].copy_from_slice(message);
    let mut icmp = smoltcp::wire::Icmpv4Packet::new_unchecked(&mut reply[IPV4_HEADER_LEN..]);
    icmp.set_msg_type(smoltcp::wire::Icmpv4Message::EchoReply);
    icmp.fill_checksum();
    Some(frame)
}

/// Raises the maximum segment size that a SYN announces to `size` and returns the one that was there (536 if none).
///
/// The stack then makes segments of that size, and offload cuts them to what the peer takes.
pub(super) fn raise_segment_size(packet: &mut [u8], size: u16) -> u16 {
    const DEFAULT: u16 = 536;
    let Some(ip_header) = packet.first().map(|first| usize::from(first & 15) * 4) else { return DEFAULT };
    let Some(tcp) = packet.get_mut(ip_header..) else { return DEFAULT };
    let Some(len) = tcp.get(12).map(|byte| usize::from(byte >> 4) * 4) else { return DEFAULT };
    let Some(options) = tcp.get_mut(20..len.max(20)) else { return DEFAULT };
    let mut at = 0;
    while let Some(kind) = options.get(at) {
        match kind {
            0 => break,
            1 => at += 1,
            _ => {
                let Some(len) = options.get(at + 1).copied().filter(|len| *len >= 2) else { break };
                if *kind == 2
                    && len == 4
                    && let Some(value) = options.get_mut(at + 2..at + 4)
                {
                    let announced = u16::from_be_bytes([value[0], value[1]]);
                    value.copy_from_slice(&size.to_be_bytes());
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
    use crate::net::addresses::{GATEWAY, GUEST, HOST};

    fn request(target: Ipv4Addr) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend(GUEST_MAC);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(GUEST_MAC);
        frame.extend(GUEST.octets());
        frame.extend([0; 6]);
        frame.extend(target.octets());
        frame
    }

    #[test]
    fn arp_is_answered_for_the_gateway_and_the_host_only() {
        for address in [GATEWAY, HOST] {
            let Some(Payload::Arp { sender_mac, sender, target }) = parse(&request(address)).map(|p| match p {
                Payload::Arp { .. } => p,
                Payload::Ipv4(_) => panic!("{p:?}"),
            }) else {
                panic!("no question")
            };
            let reply = arp_reply(sender_mac, sender, target).bytes;
            assert_eq!(
                (&reply[..6], &reply[22..28], &reply[28..32]),
                (&GUEST_MAC[..], &GATEWAY_MAC[..], &address.octets()[..])
            );
        }
        assert_eq!(parse(&request(GUEST)), None);
    }

    #[test]
    fn an_echo_comes_back_with_its_data_from_where_it_was_sent() {
        let mut ping = ipv4(IPV4_HEADER_LEN + 12);
        let packet = &mut ping.bytes[ETHERNET_HEADER..];
        fill_ipv4(packet, GUEST, GATEWAY, IpProtocol::Icmp);
        packet[20..].copy_from_slice(&[8, 0, 0, 0, 1, 2, 0, 9, b'd', b'a', b't', b'a']);
        let reply = echo_reply(packet).unwrap();
        let reply = Ipv4Packet::new_checked(&reply.bytes[ETHERNET_HEADER..]).unwrap();
        assert_eq!((reply.src_addr(), reply.dst_addr()), (GATEWAY, GUEST));
        assert!(reply.verify_checksum());
        assert_eq!((reply.payload()[0], &reply.payload()[4..]), (0, &[1, 2, 0, 9, b'd', b'a', b't', b'a'][..]));
    }

    #[test]
    fn a_long_segment_is_left_to_be_cut_to_what_the_peer_takes() {
        let mut frame = ipv4(IPV4_HEADER_LEN + 20 + 3000);
        fill_ipv4(&mut frame.bytes[ETHERNET_HEADER..], HOST, GUEST, IpProtocol::Tcp);
        frame.bytes[ETHERNET_HEADER + IPV4_HEADER_LEN + 12] = 5 << 4;
        offload_tcp(&mut frame, 1460, true);
        assert_eq!(frame.header, [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0]);
        offload_tcp(&mut frame, 3000, true);
    }

    proptest! {
        #[test]
        fn no_frame_makes_the_parsers_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0_usize..3) {
            if let Some(place) = bytes.get_mut(12..14) {
                place.copy_from_slice(&[ETHERTYPE_IPV4, ETHERTYPE_ARP, [0x86, 0xdd]][kind]);
            }
            if let Some(first) = bytes.get_mut(14) {
                *first = 0x40 | *first & 15;
            }
            if let Some(Payload::Ipv4(packet)) = parse(&bytes) {
                echo_reply(packet);
                raise_segment_size(&mut packet.to_vec(), 9000);
            }
        }

        #[test]
        fn a_completed_partial_checksum_is_the_whole_checksum(data in prop::collection::vec(any::<u8>(), 0..100), address in any::<u32>()) {
            let make = |offload| {
                let mut frame = ipv4(IPV4_HEADER_LEN + 20 + data.len());
                fill_ipv4(&mut frame.bytes[ETHERNET_HEADER..], address.into(), GUEST, IpProtocol::Tcp);
                frame.bytes[ETHERNET_HEADER + IPV4_HEADER_LEN + 12] = 5 << 4;
                frame.bytes[ETHERNET_HEADER + 40..].copy_from_slice(&data);
                offload_tcp(&mut frame, 65_000, offload);
                frame.bytes[ETHERNET_HEADER + IPV4_HEADER_LEN..].to_vec()
            };
            let mut partial = make(true);
            let sum = partial.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum::<u32>();
            let sum = (sum & 0xffff) + (sum >> 16);
            let completed = !(((sum & 0xffff) + (sum >> 16)) as u16);
            partial[16..18].copy_from_slice(&completed.to_be_bytes());
            prop_assert_eq!(partial, make(false));
        }

        #[test]
        fn the_segment_size_is_found_among_any_options(before in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..4), 0..4), size in 64_u16..) {
            let mut options = Vec::new();
            for data in before {
                options.extend([200, data.len() as u8 + 2]);
                options.extend(data);
                options.push(1);
            }
            options.extend([2, 4, (size >> 8) as u8, size as u8]);
            options.resize(options.len().next_multiple_of(4), 0);
            prop_assume!(options.len() <= 40);
            let mut packet = vec![0; IPV4_HEADER_LEN + 20];
            packet[0] = 0x45;
            packet[32] = ((20 + options.len()) as u8 / 4) << 4;
            packet.extend(&options);
            prop_assert_eq!(raise_segment_size(&mut packet, 65_495), size);
            prop_assert_eq!(raise_segment_size(&mut packet, 1), 65_495);
        }
    }
}
