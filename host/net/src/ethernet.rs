//! Sorts the guest's Ethernet frames, and answers its requests for hardware addresses (ARP, RFC 826; neighbour
//! discovery, RFC 4861).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::wire::{Icmpv6Packet, IpProtocol};

use super::{
    addresses::{Addresses, GATEWAY_MAC},
    frame::{ETHERNET_HEADER, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Frame},
    ip::{self, Packet},
};

const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// The contents of a frame of the guest.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Payload<'a> {
    /// A request for the hardware address of one of our addresses, as its answer.
    Neighbour(Frame),
    /// An IP packet.
    Packet(Packet<'a>),
    /// A packet that may be a fragment.
    Fragment(&'a [u8]),
}

/// Reads a frame; `None` for everything that this network does not carry.
pub(super) fn parse<'a>(frame: &'a [u8], addresses: &Addresses) -> Option<Payload<'a>> {
    let (header, rest) = frame.split_at_checked(ETHERNET_HEADER)?;
    match [header[12], header[13]] {
        ETHERTYPE_IPV4 => {
            // Malformed packets take the same way as fragments, and end there.
            let Some(packet) = Packet::parse(rest) else { return Some(Payload::Fragment(rest)) };
            // The version nibble decides how a packet is read; it must not contradict the EtherType.
            packet.source.is_ipv4().then_some(Payload::Packet(packet))
        }
        ETHERTYPE_IPV6 => {
            let packet = Packet::parse(rest)?;
            if !packet.source.is_ipv6() {
                return None;
            }
            if packet.protocol == IpProtocol::Ipv6Frag {
                return Some(Payload::Fragment(rest));
            }
            match solicited(&packet) {
                // Solicitations for other addresses are the guest's checks that its own are not in use.
                Some(target) => addresses.is_ours(target.into()).then(|| advertise(&packet, target)).flatten(),
                None => Some(Payload::Packet(packet)),
            }
        }
        ETHERTYPE_ARP => {
            let arp = rest.get(..28)?;
            // Hardware Ethernet, protocol IPv4, address sizes 6 and 4, operation "request" (RFC 826).
            if arp[..8] != [0, 1, 8, 0, 6, 4, 0, 1] {
                return None;
            }
            let address = |at: usize| Ipv4Addr::new(arp[at], arp[at + 1], arp[at + 2], arp[at + 3]);
            let target = address(24);
            let sender = arp[8..14].try_into().ok()?;
            addresses.is_ours(target.into()).then(|| Payload::Neighbour(arp_reply(sender, address(14), target)))
        }
        _ => None,
    }
}

/// An ARP reply: the gateway's hardware address for one of our addresses.
fn arp_reply(sender_mac: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Frame {
    let mut frame = Frame::ethernet(28, ETHERTYPE_ARP);
    // The operation is "reply"; the rest mirrors the request.
    frame.bytes[..6].copy_from_slice(&sender_mac);
    let arp = &mut frame.bytes[ETHERNET_HEADER..];
    arp[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
    arp[8..14].copy_from_slice(&GATEWAY_MAC);
    arp[14..18].copy_from_slice(&target.octets());
    arp[18..24].copy_from_slice(&sender_mac);
    arp[24..28].copy_from_slice(&sender.octets());
    frame
}

/// The target address of a neighbour solicitation (RFC 4861, 4.3).
fn solicited(packet: &Packet<'_>) -> Option<Ipv6Addr> {
    let message = packet.payload();
    if packet.protocol != IpProtocol::Icmpv6 || message.len() < 24 || message[..2] != [NEIGHBOUR_SOLICITATION, 0] {
        return None;
    }
    let target: [u8; 16] = message[8..24].try_into().ok()?;
    Some(target.into())
}

/// The advertisement that answers a solicitation (RFC 4861, 4.4).
fn advertise(solicitation: &Packet<'_>, target: Ipv6Addr) -> Option<Payload<'static>> {
    // An unspecified source probes for duplicates of an address that it wants to use (RFC 4862, 5.4). A hop limit below
    // 255 means that a container's packet was forwarded, and the protocol is for neighbours only (RFC 4861, 7.1.1).
    if solicitation.source.is_unspecified() || solicitation.hops != 255 {
        return None;
    }
    let source = IpAddr::V6(target);
    let frame = ip::frame(source, solicitation.source, IpProtocol::Icmpv6, 32, |message| {
        // The flags: router, solicited, override. A target link-layer address option follows the target.
        message[..8].copy_from_slice(&[NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, 0xe0, 0, 0, 0]);
        message[8..24].copy_from_slice(&target.octets());
        message[24..26].copy_from_slice(&[2, 1]);
        message[26..32].copy_from_slice(&GATEWAY_MAC);
        if let IpAddr::V6(destination) = solicitation.source {
            Icmpv6Packet::new_unchecked(message).fill_checksum(&target, &destination);
        }
    });
    Some(Payload::Neighbour(frame))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::addresses::{GUEST_MAC, example};

    fn request(target: Ipv4Addr) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend(GUEST_MAC);
        frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend(GUEST_MAC);
        frame.extend(example().guest.octets());
        frame.extend([0; 6]);
        frame.extend(target.octets());
        frame
    }

    fn solicitation(source: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
        ip::frame(source.into(), target.into(), IpProtocol::Icmpv6, 24, |message| {
            message[0] = NEIGHBOUR_SOLICITATION;
            message[8..24].copy_from_slice(&target.octets());
        })
        .bytes
    }

    #[test]
    fn arp_is_answered_for_the_gateway_and_the_host_only() {
        let addresses = example();
        for address in [addresses.gateway, addresses.host] {
            let Some(Payload::Neighbour(reply)) = parse(&request(address), &addresses) else { panic!("no answer") };
            let reply = reply.bytes;
            assert_eq!(
                (&reply[..6], &reply[22..28], &reply[28..32]),
                (&GUEST_MAC[..], &GATEWAY_MAC[..], &address.octets()[..])
            );
        }
        assert_eq!(parse(&request(addresses.guest), &addresses), None);
    }

    #[test]
    fn neighbours_are_advertised_for_the_gateway_and_the_host_only() {
        let addresses = example();
        for address in [addresses.gateway6, addresses.host6] {
            let question = solicitation(addresses.guest6, address);
            let Some(Payload::Neighbour(reply)) = parse(&question, &addresses) else { panic!("no answer") };
            let packet = Packet::parse(&reply.bytes[ETHERNET_HEADER..]).unwrap();
            assert_eq!((packet.source, packet.hops), (address.into(), 255));
            let message = packet.payload();
            assert_eq!((message[0], &message[26..32]), (NEIGHBOUR_ADVERTISEMENT, &GATEWAY_MAC[..]));
            assert!(Icmpv6Packet::new_checked(message).unwrap().verify_checksum(&address, &addresses.guest6));
        }
        assert_eq!(parse(&solicitation(addresses.guest6, addresses.guest6), &addresses), None);
        assert_eq!(parse(&solicitation(Ipv6Addr::UNSPECIFIED, addresses.host6), &addresses), None);
    }

    proptest! {
        #[test]
        fn no_frame_makes_the_parser_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0_usize..3, message in any::<bool>()) {
            if let Some(place) = bytes.get_mut(12..14) {
                place.copy_from_slice(&[ETHERTYPE_IPV4, ETHERTYPE_ARP, ETHERTYPE_IPV6][kind]);
            }
            if let Some(first) = bytes.get_mut(14) {
                *first = if kind == 2 { 0x60 } else { 0x40 } | *first & 15;
            }
            if message && kind == 2 && bytes.len() > 55 {
                bytes[20] = 58;
                bytes[54..56].copy_from_slice(&[NEIGHBOUR_SOLICITATION, 0]);
            }
            let _ = parse(&bytes, &example());
        }
    }
}
