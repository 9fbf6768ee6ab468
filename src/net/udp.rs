//! UDP: each pair of a guest's address and a destination has a connected socket of its own, so that the kernel lets in
//! only answers, and the loopback is no exception.

use std::{
    collections::HashMap,
    net::{SocketAddrV4, UdpSocket},
    time::{Duration, Instant},
};

use vmm_sys_util::epoll::Epoll;

use super::{
    addresses::{MTU, on_host},
    events::{self, Token},
    frame::{self, Frame},
    socket,
    tcp::Key,
};

/// Most associations at a time; a guest that wants more takes the oldest one's place.
const MOST: usize = 1024;
/// An association that is silent for so long is over (RFC 4787 wants two minutes at least).
const SILENCE: Duration = Duration::from_secs(120);
/// Datagrams taken from one socket before others have their turn.
const BURST: usize = 64;
/// IP and UDP headers.
const HEADERS: usize = 28;

struct Association {
    key: Key,
    socket: UdpSocket,
    used: Instant,
}

/// All associations.
#[derive(Default)]
pub(super) struct Udp {
    next: u64,
    associations: HashMap<u64, Association>,
    by_key: HashMap<Key, u64>,
}

impl Udp {
    /// A datagram of the guest.
    pub(super) fn send(&mut self, epoll: &Epoll, key: Key, data: &[u8]) {
        let Some(id) = self.by_key.get(&key).copied().or_else(|| self.associate(epoll, key)) else { return };
        if let Some(association) = self.associations.get_mut(&id) {
            association.used = Instant::now();
            // What the host does not take is lost, as datagrams may be.
            let _ = association.socket.send(data);
        }
    }

    fn associate(&mut self, epoll: &Epoll, key: Key) -> Option<u64> {
        if self.associations.len() >= MOST {
            let oldest = self.associations.iter().min_by_key(|(_, association)| association.used).map(|(id, _)| *id)?;
            self.remove(oldest);
        }
        let socket = socket::udp(on_host(key.destination)?).ok()?;
        let id = self.next;
        events::watch(epoll, &socket, Token::Udp(id)).ok()?;
        self.next += 1;
        self.associations.insert(id, Association { key, socket, used: Instant::now() });
        self.by_key.insert(key, id);
        Some(id)
    }

    /// Takes what arrived for an association.
    pub(super) fn receive(&mut self, id: u64, out: &mut Vec<Frame>) {
        let Some(association) = self.associations.get_mut(&id) else { return };
        let mut buffer = vec![0; usize::from(MTU)];
        for _ in 0..BURST {
            // An error is the answer to something that was sent; it is consumed with this.
            let Ok(len) = association.socket.recv(&mut buffer) else { return };
            association.used = Instant::now();
            if len + HEADERS <= usize::from(MTU) {
                out.push(frame::udp(association.key.destination, association.key.guest, &buffer[..len]));
            }
        }
    }

    /// Ends what is silent.
    pub(super) fn sweep(&mut self, now: Instant) {
        let old: Vec<_> = self
            .associations
            .iter()
            .filter(|(_, association)| now.duration_since(association.used) > SILENCE)
            .map(|(id, _)| *id)
            .collect();
        for id in old {
            self.remove(id);
        }
    }

    /// Whether anything could become silent.
    pub(super) fn is_empty(&self) -> bool {
        self.associations.is_empty()
    }

    fn remove(&mut self, id: u64) {
        if let Some(association) = self.associations.remove(&id) {
            self.by_key.remove(&association.key);
        }
    }
}

/// The destination's port and the data of a UDP packet.
pub(super) fn parse(packet: &[u8]) -> Option<(Key, &[u8])> {
    let ip = smoltcp::wire::Ipv4Packet::new_checked(packet).ok()?;
    let udp = smoltcp::wire::UdpPacket::new_checked(ip.payload()).ok()?;
    let key = Key {
        guest: SocketAddrV4::new(ip.src_addr(), udp.src_port()),
        destination: SocketAddrV4::new(ip.dst_addr(), udp.dst_port()),
    };
    let start = usize::from(ip.header_len()) + 8;
    let end = usize::from(ip.header_len()) + usize::from(udp.len());
    Some((key, packet.get(start..end)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::net::{addresses::GUEST, frame::ETHERNET_HEADER};

    #[test]
    fn a_guest_cannot_have_more_associations_than_the_bound() {
        let epoll = Epoll::new().unwrap();
        let mut udp = Udp::default();
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let destination = SocketAddrV4::new(crate::net::addresses::HOST, server.local_addr().unwrap().port());
        for port in 1..=200 + MOST as u16 {
            udp.send(&epoll, Key { guest: SocketAddrV4::new(GUEST, port), destination }, b"x");
            assert!(udp.associations.len() <= MOST && udp.by_key.len() == udp.associations.len());
        }
        udp.sweep(Instant::now() + SILENCE * 2);
        assert!(udp.is_empty() && udp.by_key.is_empty());
    }

    #[test]
    fn the_loopback_by_its_own_name_gets_no_datagram() {
        let epoll = Epoll::new().unwrap();
        let mut udp = Udp::default();
        for address in ["127.0.0.1:9", "0.0.0.0:9", "192.168.65.9:9", "255.255.255.255:9"] {
            udp.send(&epoll, Key { guest: SocketAddrV4::new(GUEST, 5), destination: address.parse().unwrap() }, b"x");
        }
        assert!(udp.is_empty());
    }

    proptest! {
        #[test]
        fn what_is_made_for_the_guest_reads_back(data in prop::collection::vec(any::<u8>(), 0..2000), port in 1_u16..) {
            let key = Key { guest: SocketAddrV4::new(GUEST, port), destination: "10.0.0.1:53".parse().unwrap() };
            let frame = frame::udp(key.guest, key.destination, &data);
            prop_assert_eq!(parse(&frame.bytes[ETHERNET_HEADER..]), Some((key, &data[..])));
        }

        #[test]
        fn no_packet_makes_the_parser_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Some(first) = bytes.first_mut() {
                *first = 0x40 | *first & 15;
            }
            let _ = parse(&bytes);
        }
    }
}
