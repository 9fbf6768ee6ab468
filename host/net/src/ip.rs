//! IP packets (RFC 791, RFC 8200) and UDP datagrams (RFC 768): reads the guest's, writes those for the guest.

use std::net::{IpAddr, SocketAddr};

use smoltcp::wire::{
    IPV4_HEADER_LEN, IPV6_HEADER_LEN, IpAddress, IpProtocol, Ipv4Packet, Ipv6Packet, UDP_HEADER_LEN, UdpPacket,
};

use super::frame::{ETHERNET_HEADER, Frame};

/// A packet that is not a fragment, cut to the length in its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packet<'a> {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) protocol: IpProtocol,
    /// Hop limit, or time to live.
    pub(super) hops: u8,
    /// The packet with its header, without Ethernet's padding.
    pub(super) bytes: &'a [u8],
    /// Length of its IP header in bytes.
    header: usize,
}

impl<'a> Packet<'a> {
    /// Reads a packet; `None` if it is malformed or a fragment. IPv6's extension headers stay part of the payload,
    /// whose protocol is then one that is not served.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => {
                let ip = Ipv4Packet::new_checked(bytes).ok()?;
                let header = usize::from(ip.header_len());
                let len = usize::from(ip.total_len());
                // IPv4 options are skipped, not interpreted. The header's checksum does not matter: the packet comes
                // from memory, and `offload` lets the guest leave checksums out.
                let whole = header >= IPV4_HEADER_LEN && header <= len && !ip.more_frags() && ip.frag_offset() == 0;
                whole.then_some(Self {
                    source: ip.src_addr().into(),
                    destination: ip.dst_addr().into(),
                    protocol: ip.next_header(),
                    hops: ip.hop_limit(),
                    bytes: bytes.get(..len)?,
                    header,
                })
            }
            6 => {
                let ip = Ipv6Packet::new_checked(bytes).ok()?;
                // Jumbograms (a length of 0 with an option) are not told apart: their payload counts as empty.
                Some(Self {
                    source: ip.src_addr().into(),
                    destination: ip.dst_addr().into(),
                    protocol: ip.next_header(),
                    hops: ip.hop_limit(),
                    bytes: bytes.get(..ip.total_len())?,
                    header: IPV6_HEADER_LEN,
                })
            }
            _ => None,
        }
    }

    /// The bytes after the IP header.
    pub(super) fn payload(&self) -> &'a [u8] {
        self.bytes.get(self.header..).unwrap_or_default()
    }
}

/// Length of the header that [`fill`] writes.
pub(super) fn header_len(address: IpAddr) -> usize {
    if address.is_ipv4() { IPV4_HEADER_LEN } else { IPV6_HEADER_LEN }
}

/// A frame to the guest with an IP header and `len` bytes after it, which `payload` writes.
///
/// Both addresses must be of one version, and header and payload must fit into a packet.
pub(super) fn frame(
    source: IpAddr,
    destination: IpAddr,
    protocol: IpProtocol,
    len: usize,
    payload: impl FnOnce(&mut [u8]),
) -> Frame {
    let header = header_len(source);
    let mut frame = Frame::ip(header + len);
    let packet = &mut frame.bytes[ETHERNET_HEADER..];
    // A reused buffer still has an earlier frame in it, and `fill` does not set every field.
    packet[..header].fill(0);
    payload(&mut packet[header..]);
    fill(packet, source, destination, protocol, len);
    frame.seal();
    frame
}

/// Writes an IP header for a payload of `len` bytes over zeros.
pub(super) fn fill(packet: &mut [u8], source: IpAddr, destination: IpAddr, protocol: IpProtocol, len: usize) {
    match (source, destination) {
        // No identification: it matters to fragments only, which are never made here (RFC 6864, 4.1).
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut ip = Ipv4Packet::new_unchecked(packet);
            ip.set_version(4);
            ip.set_header_len(IPV4_HEADER_LEN as u8);
            ip.set_total_len((IPV4_HEADER_LEN + len) as u16);
            // TCP's segments are cut to size; a datagram may have to be fragmented on its way to a container.
            ip.set_dont_frag(protocol == IpProtocol::Tcp);
            ip.set_hop_limit(64);
            ip.set_next_header(protocol);
            ip.set_src_addr(source);
            ip.set_dst_addr(destination);
            ip.fill_checksum();
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut ip = Ipv6Packet::new_unchecked(packet);
            ip.set_version(6);
            ip.set_payload_len(len as u16);
            // Neighbour discovery demands the largest value (RFC 4861, 7.1), and nothing forbids it elsewhere.
            ip.set_hop_limit(255);
            ip.set_next_header(protocol);
            ip.set_src_addr(source);
            ip.set_dst_addr(destination);
        }
        _ => debug_assert!(false, "addresses of two versions"),
    }
}

/// Largest datagram, in bytes of data, between two addresses of this version.
pub(super) fn max_datagram(address: IpAddr, mtu: u16) -> usize {
    usize::from(mtu) - header_len(address) - UDP_HEADER_LEN
}

/// A frame with a datagram to the guest.
pub(super) fn udp(source: SocketAddr, destination: SocketAddr, data: &[u8]) -> Frame {
    frame(source.ip(), destination.ip(), IpProtocol::Udp, UDP_HEADER_LEN + data.len(), |payload| {
        let mut udp = UdpPacket::new_unchecked(payload);
        udp.set_src_port(source.port());
        udp.set_dst_port(destination.port());
        udp.set_len((UDP_HEADER_LEN + data.len()) as u16);
        udp.payload_mut().copy_from_slice(data);
        // Datagrams are small or rare, so checksums are not left to the guest; IPv6 demands one (RFC 8200, 8.1).
        udp.fill_checksum(&IpAddress::from(source.ip()), &IpAddress::from(destination.ip()));
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::recycle;

    pub(crate) fn address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![any::<u32>().prop_map(|a| IpAddr::V4(a.into())), any::<u128>().prop_map(|a| IpAddr::V6(a.into()))]
    }

    #[test]
    fn a_large_datagram_shows_nothing_of_the_frame_before_it() {
        let data = vec![7; 20_000];
        for address in [IpAddr::from([10, 0, 0, 1]), IpAddr::from([0xfd00_u16, 0, 0, 0, 0, 0, 0, 1])] {
            let (source, destination) = (SocketAddr::new(address, 1), SocketAddr::new(address, 2));
            let fresh = udp(source, destination, &data);
            recycle(vec![0xff; 65_000]);
            assert!(udp(source, destination, &data) == fresh);
        }
    }

    proptest! {
        #[test]
        fn what_is_made_for_the_guest_reads_back(v6 in any::<bool>(), a in any::<u128>(), b in any::<u128>(), data in prop::collection::vec(any::<u8>(), 0..2000)) {
            let address = |bits: u128| if v6 { IpAddr::V6(bits.into()) } else { IpAddr::V4((bits as u32).into()) };
            let (source, destination) = (SocketAddr::new(address(a), 1), SocketAddr::new(address(b), 2));
            let frame = udp(source, destination, &data);
            let packet = Packet::parse(&frame.bytes[ETHERNET_HEADER..]).unwrap();
            prop_assert_eq!((packet.source, packet.destination), (source.ip(), destination.ip()));
            prop_assert_eq!(packet.protocol, IpProtocol::Udp);
            let datagram = UdpPacket::new_checked(packet.payload()).unwrap();
            prop_assert!(datagram.verify_checksum(&packet.source.into(), &packet.destination.into()));
            prop_assert_eq!(datagram.payload(), &data[..]);
            prop_assert_eq!(&frame.bytes[12..14], if v6 { &[0x86, 0xdd] } else { &[8, 0] });
        }

        #[test]
        fn no_bytes_make_the_parser_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..120), version in 3_u8..8) {
            if let Some(first) = bytes.first_mut() {
                *first = version << 4 | *first & 15;
            }
            if let Some(packet) = Packet::parse(&bytes) {
                prop_assert!(packet.bytes.len() <= bytes.len() && packet.payload().len() < packet.bytes.len());
            }
        }

        #[test]
        fn a_fragment_is_no_packet(address in address(), offset in 1_u16..8191) {
            let frame = udp(SocketAddr::new(address, 1), SocketAddr::new(address, 2), b"data");
            let mut bytes = frame.bytes[ETHERNET_HEADER..].to_vec();
            if address.is_ipv4() {
                bytes[6..8].copy_from_slice(&offset.to_be_bytes());
                prop_assert_eq!(Packet::parse(&bytes), None);
            } else {
                bytes[6] = 44;
                prop_assert_eq!(Packet::parse(&bytes).unwrap().protocol, IpProtocol::Ipv6Frag);
            }
        }
    }
}
