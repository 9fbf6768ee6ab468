//! ICMP echo (RFC 792, RFC 4443): pings of gateway and host are answered here, others leave through the host's
//! unprivileged ICMP sockets (icmp(7)), if the host allows this user to have them.
//!
//! No other ICMP message is served: errors neither reach the guest nor leave it.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::sys::socket::{MsgFlags, recv, send};
use smoltcp::wire::{Icmpv4Packet, Icmpv6Packet, IpProtocol};
use vmm_sys_util::epoll::Epoll;

use super::{
    addresses::Addresses,
    associations::Associations,
    events::{self, Token},
    frame::Frame,
    ip::{self, Packet},
    socket,
};

/// Number of ping sockets; one more takes the place of the least recently used one.
const MAX_SOCKETS: usize = 256;
/// Time without a ping or a reply after which a socket is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Replies taken from one socket before others have their turn.
const BURST: usize = 16;
/// Length of type, code, checksum, identifier and sequence number.
const HEADER: usize = 8;

/// The two ends and the guest's identifier, one for each running ping(8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    guest: IpAddr,
    peer: IpAddr,
    identifier: [u8; 2],
}

/// The ping sockets.
pub(super) struct Echo(Associations<Key, OwnedFd>);

impl Default for Echo {
    fn default() -> Self {
        Self(Associations::new(MAX_SOCKETS, IDLE_TIMEOUT))
    }
}

/// Message types of request and reply.
fn types(address: IpAddr) -> (u8, u8) {
    if address.is_ipv4() { (8, 0) } else { (128, 129) }
}

/// A reply to the guest with the sequence number and data of this message.
fn reply(from: IpAddr, to: IpAddr, identifier: [u8; 2], message: &[u8]) -> Frame {
    let protocol = if from.is_ipv4() { IpProtocol::Icmp } else { IpProtocol::Icmpv6 };
    ip::frame(from, to, protocol, message.len(), |reply| {
        reply.copy_from_slice(message);
        reply[..2].copy_from_slice(&[types(from).1, 0]);
        reply[4..6].copy_from_slice(&identifier);
        match (from, to) {
            (IpAddr::V6(from), IpAddr::V6(to)) => Icmpv6Packet::new_unchecked(reply).fill_checksum(&from, &to),
            _ => Icmpv4Packet::new_unchecked(reply).fill_checksum(),
        }
    })
}

impl Echo {
    /// Takes an ICMP message of the guest; returns the reply if it comes from here.
    pub(super) fn receive(&mut self, epoll: &Epoll, addresses: &Addresses, packet: &Packet<'_>) -> Option<Frame> {
        let message = packet.payload();
        // Type "echo request", code 0.
        if message.len() < HEADER || message[..2] != [types(packet.source).0, 0] {
            return None;
        }
        let identifier = [message[4], message[5]];
        if addresses.is_ours(packet.destination) {
            return Some(reply(packet.destination, packet.source, identifier, message));
        }
        let key = Key { guest: packet.source, peer: packet.destination, identifier };
        let id = self.0.find(&key).or_else(|| self.associate(epoll, addresses, key))?;
        let (_, socket) = self.0.touch(id)?;
        // The kernel puts the socket's own identifier and a checksum into the message. One that the socket does not
        // take is lost, as pings may be.
        let _ = send(socket.as_raw_fd(), message, MsgFlags::empty());
        None
    }

    fn associate(&mut self, epoll: &Epoll, addresses: &Addresses, key: Key) -> Option<u64> {
        // The same rules as for TCP and UDP. Pings have no port, but `on_host` refuses zero.
        let peer = addresses.on_host(SocketAddr::new(key.peer, 1))?.ip();
        let socket = socket::ping(peer).ok()?;
        let id = self.0.next();
        events::watch(epoll, &socket, Token::Echo(id)).ok()?;
        // The socket that gives way is dropped, and with that closed.
        self.0.insert(key, socket);
        Some(id)
    }

    /// Passes replies of a socket on to the guest.
    pub(super) fn receive_replies(&mut self, id: u64, scratch: &mut [u8], mtu: u16, out: &mut Vec<Frame>) {
        for _ in 0..BURST {
            let Some((key, socket)) = self.0.get(id) else { return };
            // An error, which belongs to an earlier ping, is cleared by this. The guest does not learn of it.
            let Ok(len) = recv(socket.as_raw_fd(), scratch, MsgFlags::MSG_DONTWAIT) else { return };
            self.0.touch(id);
            let message = &scratch[..len];
            // The kernel delivers only replies to this socket's pings; the rest is what the far end may still choose.
            if len >= HEADER && message[0] == types(key.peer).1 && ip::header_len(key.peer) + len <= usize::from(mtu) {
                out.push(reply(key.peer, key.guest, key.identifier, message));
            }
        }
    }

    /// Closes idle sockets.
    pub(super) fn expire(&mut self, now: Instant) {
        self.0.expire(now);
    }

    /// True if nothing can expire.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{addresses::example, frame::ETHERNET_HEADER};

    fn request(from: IpAddr, to: IpAddr, message: &[u8]) -> Vec<u8> {
        let protocol = if from.is_ipv4() { IpProtocol::Icmp } else { IpProtocol::Icmpv6 };
        let frame = ip::frame(from, to, protocol, message.len(), |space| {
            space.copy_from_slice(message);
            space[0] = types(from).0;
        });
        frame.bytes[ETHERNET_HEADER..].to_vec()
    }

    #[test]
    fn an_echo_comes_back_with_its_data_from_where_it_was_sent() {
        let addresses = example();
        for (guest, peer) in [
            (IpAddr::from(addresses.guest), IpAddr::from(addresses.gateway)),
            (addresses.guest6.into(), addresses.host6.into()),
        ] {
            let ping = request(guest, peer, &[0, 0, 0, 0, 1, 2, 0, 9, b'd', b'a', b't', b'a']);
            let epoll = Epoll::new().unwrap();
            let mut echo = Echo::default();
            let reply = echo.receive(&epoll, &addresses, &Packet::parse(&ping).unwrap()).unwrap();
            let reply = Packet::parse(&reply.bytes[ETHERNET_HEADER..]).unwrap();
            assert_eq!((reply.source, reply.destination), (peer, guest));
            let message = reply.payload();
            assert_eq!((message[0], &message[4..]), (types(peer).1, &[1, 2, 0, 9, b'd', b'a', b't', b'a'][..]));
            assert!(echo.is_empty());
        }
    }

    #[test]
    fn a_ping_to_elsewhere_is_answered_under_the_identity_of_the_guest() {
        // The test's own address on a network, if the host has one and lets this user ping.
        let outside = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let Ok(own) = outside.connect("192.0.2.1:9").and_then(|()| outside.local_addr()) else { return };
        let (addresses, epoll, mut echo) = (example(), Epoll::new().unwrap(), Echo::default());
        if addresses.on_host(own).is_none() || socket::ping(own.ip()).is_err() {
            return;
        }
        let ping = request(addresses.guest.into(), own.ip(), &[0, 0, 0, 0, 0xab, 0xcd, 0, 1, b'x']);
        assert!(echo.receive(&epoll, &addresses, &Packet::parse(&ping).unwrap()).is_none());
        let mut out = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(5);
        while out.is_empty() && Instant::now() < deadline {
            echo.receive_replies(0, &mut [0; 2000], 1500, &mut out);
        }
        let reply = Packet::parse(&out[0].bytes[ETHERNET_HEADER..]).unwrap();
        assert_eq!((reply.source, &reply.payload()[4..]), (own.ip(), &[0xab, 0xcd, 0, 1, b'x'][..]));
        echo.expire(Instant::now() + IDLE_TIMEOUT * 2);
        assert!(echo.0.lens() == [0, 0]);
    }

    proptest! {
        #[test]
        fn no_message_makes_it_panic(message in prop::collection::vec(any::<u8>(), 0..80), v6: bool, echo: bool) {
            let addresses = example();
            let (guest, peer) = if v6 {
                (IpAddr::from(addresses.guest6), IpAddr::from(addresses.host6))
            } else {
                (addresses.guest.into(), addresses.host.into())
            };
            let protocol = if v6 { IpProtocol::Icmpv6 } else { IpProtocol::Icmp };
            let ping = ip::frame(guest, peer, protocol, message.len(), |space| {
                space.copy_from_slice(&message);
                if let Some(kind) = space.first_mut().filter(|_| echo) {
                    *kind = types(guest).0;
                }
            });
            let packet = Packet::parse(&ping.bytes[ETHERNET_HEADER..]).unwrap();
            let reply = Echo::default().receive(&Epoll::new().unwrap(), &addresses, &packet);
            if let Some(reply) = reply {
                prop_assert_eq!(reply.bytes.len(), ping.bytes.len());
            }
        }
    }
}
