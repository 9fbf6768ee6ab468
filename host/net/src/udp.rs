//! UDP: an association for each pair of a guest's address and a far one.
//!
//! An association that the guest opens has a connected socket of its own. So the kernel lets in only datagrams of that
//! far end, also on the loopback, where any process of the host could send one. A client of a published port is
//! answered through that port's socket, from the address that the client used.

use std::{
    collections::HashMap,
    net::{SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use smoltcp::wire::UdpPacket;
use vmm_sys_util::epoll::Epoll;

use super::{
    addresses::{Addresses, MTU},
    associations::Associations,
    events::{self, Token},
    frame::Frame,
    ip::{self, Packet},
    key::Key,
    socket::{self, Local},
};

/// Number of associations; one more takes the place of the least recently used one.
const MAX_ASSOCIATIONS: usize = 2048;
/// Time without a datagram after which an association expires (RFC 4787, 4.3: two minutes at least).
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);
/// Datagrams taken from one socket before others have their turn.
const BURST: usize = 64;
/// Ports tried for a client whose own port is in use by another client of the same container.
const MAX_PORT_TRIES: u16 = 64;

/// The far end.
enum Remote {
    /// Reached through a socket that is connected to it.
    Connected(UdpSocket),
    /// A client of a published port.
    ///
    /// `local` is the host's address that the client has sent to.
    Client { published: u64, address: SocketAddr, local: Option<Local> },
}

/// A published port.
struct Published {
    socket: UdpSocket,
    target: SocketAddr,
    /// Associations by their clients' true addresses.
    clients: HashMap<SocketAddr, u64>,
}

/// All associations and published ports.
pub(super) struct Udp {
    associations: Associations<Key, Remote>,
    published: HashMap<u64, Published>,
}

impl Default for Udp {
    fn default() -> Self {
        Self { associations: Associations::new(MAX_ASSOCIATIONS, IDLE_TIMEOUT), published: HashMap::new() }
    }
}

impl Udp {
    /// Sends a datagram of the guest, which may open an association if `may_open`.
    pub(super) fn send(&mut self, epoll: &Epoll, addresses: &Addresses, key: Key, data: &[u8], may_open: bool) {
        let known = self.associations.find(&key);
        let Some(id) = known.or_else(|| may_open.then(|| self.associate(epoll, addresses, key)).flatten()) else {
            return;
        };
        let Some((_, remote)) = self.associations.touch(id) else { return };
        // A datagram that the socket does not take is lost, as datagrams may be. Nothing is queued here, so a guest
        // that sends faster than the host's network loses its own datagrams.
        match remote {
            Remote::Connected(socket) => {
                let _ = socket.send(data);
            }
            // From the address that the client used; a connected client drops answers from others.
            Remote::Client { published, address, local } => {
                if let Some(published) = self.published.get(published) {
                    let _ = socket::send_to(&published.socket, data, *address, *local);
                }
            }
        }
    }

    fn associate(&mut self, epoll: &Epoll, addresses: &Addresses, key: Key) -> Option<u64> {
        // Loopback, multicast and broadcast addresses end here.
        let socket = socket::udp(addresses.on_host(key.peer)?).ok()?;
        // Watched before it is in the table: a socket that is not watched would never deliver an answer.
        events::watch(epoll, &socket, Token::Udp(self.associations.next())).ok()?;
        Some(self.insert(key, Remote::Connected(socket)))
    }

    fn insert(&mut self, key: Key, remote: Remote) -> u64 {
        let id = self.associations.next();
        // A flood of the guest's own pushes out its oldest associations. A published port's client whose association
        // gives way gets another one with its next datagram.
        if let Some(gone) = self.associations.insert(key, remote) {
            self.forget_client(gone);
        }
        id
    }

    /// Passes datagrams of an association's socket on to the guest.
    pub(super) fn receive(&mut self, id: u64, scratch: &mut [u8], out: &mut Vec<Frame>) {
        for _ in 0..BURST {
            let Some((key, Remote::Connected(socket))) = self.associations.get(id) else { return };
            // An error, such as "port unreachable" for an earlier datagram, is cleared by this. The guest does not
            // learn of it.
            let Ok(len) = socket.recv(scratch) else { return };
            self.associations.touch(id);
            // `scratch` has room for more than the guest's interface takes.
            if len <= ip::max_datagram(key.peer.ip(), MTU) {
                out.push(ip::udp(key.peer, key.guest, &scratch[..len]));
            }
        }
    }

    /// Publishes a bound socket.
    pub(super) fn publish(&mut self, epoll: &Epoll, id: u64, socket: UdpSocket, target: SocketAddr) {
        let ready = socket.set_nonblocking(true).is_ok() && events::watch(epoll, &socket, Token::Published(id)).is_ok();
        if ready {
            socket::request_local_address(&socket);
            self.published.insert(id, Published { socket, target, clients: HashMap::new() });
        }
    }

    /// Closes a published port, and ends its clients' associations.
    pub(super) fn forget(&mut self, epoll: &Epoll, id: u64) {
        if let Some(published) = self.published.remove(&id) {
            // The backend has the same socket open: closing our descriptor alone would leave it registered.
            events::unwatch(epoll, &published.socket);
            for id in published.clients.into_values() {
                self.associations.remove(id);
            }
        }
    }

    /// Passes datagrams that arrived at a published port on to its container.
    pub(super) fn receive_published(
        &mut self,
        id: u64,
        addresses: &Addresses,
        scratch: &mut [u8],
        out: &mut Vec<Frame>,
    ) {
        for _ in 0..BURST {
            let Some(published) = self.published.get(&id) else { return };
            let target = published.target;
            // The socket is level-triggered, so what is left after a burst is reported again.
            let Ok((len, client, local)) = socket::receive_from(&published.socket, scratch) else { return };
            // Longer ones would not fit into the guest's interface; this ends no more than the one datagram.
            let Some(client) = client.filter(|_| len <= ip::max_datagram(target.ip(), MTU)) else { continue };
            let known = published.clients.get(&client).copied();
            let Some(known) = known.or_else(|| self.add_client(id, client, target, addresses)) else { continue };
            let Some((key, remote)) = self.associations.touch(known) else { continue };
            // The client may use another of the host's addresses now; the answer has to come from there.
            *remote = Remote::Client { published: id, address: client, local };
            out.push(ip::udp(key.peer, key.guest, &scratch[..len]));
        }
    }

    /// Opens an association for a new client of a published port.
    fn add_client(
        &mut self,
        published: u64,
        client: SocketAddr,
        target: SocketAddr,
        addresses: &Addresses,
    ) -> Option<u64> {
        // Several clients may be shown with the gateway's address, and then differ by port only.
        let shown = addresses.as_client(client.ip(), target.ip());
        let key = free_key(target, SocketAddr::new(shown, client.port()), |key| self.associations.find(key).is_some())?;
        let id = self.insert(key, Remote::Client { published, address: client, local: None });
        self.published.get_mut(&published)?.clients.insert(client, id);
        Some(id)
    }

    /// Ends idle associations.
    pub(super) fn expire(&mut self, now: Instant) {
        for gone in self.associations.expire(now) {
            self.forget_client(gone);
        }
    }

    /// True if nothing can expire.
    pub(super) fn is_empty(&self) -> bool {
        self.associations.is_empty()
    }

    /// Removes the client of an association that has ended from its published port.
    fn forget_client(&mut self, remote: Remote) {
        if let Remote::Client { published, address, .. } = remote
            && let Some(published) = self.published.get_mut(&published)
        {
            published.clients.remove(&address);
        }
    }
}

/// A key that is not `taken`, for a client that is shown to the container as `shown`, or with one of the next ports.
pub(super) fn free_key(target: SocketAddr, shown: SocketAddr, taken: impl Fn(&Key) -> bool) -> Option<Key> {
    (0..MAX_PORT_TRIES)
        .map(|offset| shown.port().wrapping_add(offset).max(1))
        .map(|port| Key { guest: target, peer: SocketAddr::new(shown.ip(), port) })
        .find(|key| !taken(key))
}

/// The two ends and the data of a UDP packet (RFC 768). Its checksum is the guest's to make or to leave out.
pub(super) fn parse<'a>(packet: &Packet<'a>) -> Option<(Key, &'a [u8])> {
    let udp = UdpPacket::new_checked(packet.payload()).ok()?;
    let key = Key {
        guest: SocketAddr::new(packet.source, udp.src_port()),
        peer: SocketAddr::new(packet.destination, udp.dst_port()),
    };
    // The length is the header's: an IP packet may be longer.
    Some((key, packet.payload().get(8..usize::from(udp.len()))?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{addresses::example, frame::ETHERNET_HEADER};

    fn guest(port: u16) -> SocketAddr {
        SocketAddr::new(example().guest.into(), port)
    }

    #[test]
    fn a_guest_cannot_have_more_associations_than_the_bound() {
        let epoll = Epoll::new().unwrap();
        let mut udp = Udp::default();
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let peer = SocketAddr::new(example().host.into(), server.local_addr().unwrap().port());
        for port in 1..=200 + MAX_ASSOCIATIONS as u16 {
            udp.send(&epoll, &example(), Key { guest: guest(port), peer }, b"x", true);
            let [associations, keys] = udp.associations.lens();
            assert!(associations <= MAX_ASSOCIATIONS && keys == associations);
        }
        udp.expire(Instant::now() + IDLE_TIMEOUT * 2);
        assert!(udp.associations.lens() == [0, 0]);
    }

    #[test]
    fn the_loopback_by_its_own_name_gets_no_datagram() {
        let epoll = Epoll::new().unwrap();
        let mut udp = Udp::default();
        for address in ["127.0.0.1:9", "0.0.0.0:9", "192.168.65.9:9", "255.255.255.255:9", "[::1]:9"] {
            udp.send(&epoll, &example(), Key { guest: guest(5), peer: address.parse().unwrap() }, b"x", true);
        }
        assert!(udp.is_empty());
    }

    #[test]
    fn clients_of_a_published_port_are_told_apart_and_answered() {
        let (epoll, addresses, mut udp) = (Epoll::new().unwrap(), example(), Udp::default());
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let target: SocketAddr = "172.17.0.2:53".parse().unwrap();
        udp.publish(&epoll, 7, socket, target);
        let clients = [UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap()];
        let mut out = Vec::new();
        for (index, client) in clients.iter().enumerate() {
            client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            client.send_to(&[index as u8], ("127.0.0.1", port)).unwrap();
        }
        while out.len() < 2 {
            udp.receive_published(7, &addresses, &mut [0; 2000], &mut out);
        }
        for frame in &out {
            let (key, data) = parse(&Packet::parse(&frame.bytes[ETHERNET_HEADER..]).unwrap()).unwrap();
            assert_eq!((key.peer, key.guest.ip()), (target, addresses.gateway.into()));
            let back = Key { guest: key.peer, peer: key.guest };
            udp.send(&epoll, &addresses, back, &[data[0] + 100], false);
        }
        for (index, client) in clients.iter().enumerate() {
            let mut answer = [0; 9];
            let (len, from) = client.recv_from(&mut answer).unwrap();
            assert_eq!((&answer[..len], from.port()), (&[index as u8 + 100][..], port));
        }
        udp.forget(&epoll, 7);
        assert!(udp.associations.lens() == [0, 0] && udp.published.is_empty());
    }

    #[test]
    fn two_clients_with_one_port_get_two() {
        let (target, shown) = ("172.17.0.2:53".parse().unwrap(), "192.168.65.1:65535".parse().unwrap());
        let first = free_key(target, shown, |_| false).unwrap();
        let second = free_key(target, shown, |key| *key == first).unwrap();
        assert_eq!((first.peer.port(), second.peer.port()), (65535, 1));
        assert_eq!(free_key(target, shown, |_| true), None);
    }

    proptest! {
        #[test]
        fn what_is_made_for_the_guest_reads_back(data in prop::collection::vec(any::<u8>(), 0..2000), port in 1_u16..) {
            let key = Key { guest: guest(port), peer: "10.0.0.1:53".parse().unwrap() };
            let frame = ip::udp(key.guest, key.peer, &data);
            let packet = Packet::parse(&frame.bytes[ETHERNET_HEADER..]).unwrap();
            prop_assert_eq!(parse(&packet), Some((key, &data[..])));
        }

        #[test]
        fn no_packet_makes_the_parser_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..100), v6 in any::<bool>()) {
            if let Some(first) = bytes.first_mut() {
                *first = if v6 { 0x60 } else { 0x40 } | *first & 15;
            }
            if let Some(packet) = Packet::parse(&bytes) {
                let _ = parse(&packet);
            }
        }
    }
}
