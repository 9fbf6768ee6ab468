//! Addresses of the guest's network, and the only place that maps a destination of the guest to one of the host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::api::Setup;

/// The guest's IPv6 network: unique local addresses (RFC 4193), the same in every VM as its IPv4 addresses are.
const NETWORK6: [u16; 4] = [0xfd0b, 0x00ad, 0xc0ff, 0];
/// Length of its prefix in bits.
pub const PREFIX6: u8 = 64;

/// Largest IP packet towards the guest's interface, in bytes. Datagrams come whole. Bulk TCP is cut by segmentation
/// offload to the size that each peer announced, so the 1500 bytes of containers cost nothing.
pub const MTU: u16 = 65_520;

/// Locally administered addresses of the two ends of the wire.
pub(super) const GUEST_MAC: [u8; 6] = [0x52, 0x0b, 0xad, 0xc0, 0xff, 0x03];
pub(super) const GATEWAY_MAC: [u8; 6] = [0x52, 0x0b, 0xad, 0xc0, 0xff, 0x01];

/// Port of the name server.
pub(super) const DNS_PORT: u16 = 53;

/// True if the address can be that of one interface: not a multicast, broadcast or unspecified one.
pub(super) fn is_unicast(address: IpAddr) -> bool {
    let broadcast = address == IpAddr::V4(Ipv4Addr::BROADCAST);
    !address.is_multicast() && !address.is_unspecified() && !broadcast
}

/// The addresses of one VM's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The IPv4 network's first address.
    pub network: Ipv4Addr,
    /// Length of the IPv4 network's prefix in bits.
    pub prefix: u8,
    /// The router and name server, which this process is: `gateway.docker.internal`.
    pub gateway: Ipv4Addr,
    /// The same in IPv6.
    pub gateway6: Ipv6Addr,
    /// The guest.
    pub guest: Ipv4Addr,
    /// The same in IPv6.
    pub guest6: Ipv6Addr,
    /// The host: `host.docker.internal`.
    pub host: Ipv4Addr,
    /// The same in IPv6.
    pub host6: Ipv6Addr,
    /// The addresses of gateway and host lead to the host's loopback.
    pub host_loopback: bool,
}

impl Addresses {
    /// The addresses that follow from a setup: in a network with a prefix of 24 bits `.1` is the gateway, `.3` the
    /// guest, `.254` the host. `None` unless the prefix has 8 to 29 bits.
    pub fn new(setup: &Setup) -> Option<Self> {
        let (first, prefix) = setup.subnet;
        // A /30 has two host addresses, one too few. The lower bound keeps the shift below in range.
        if !(8..=29).contains(&prefix) {
            return None;
        }
        let mask = u32::MAX << (32 - prefix);
        let network = u32::from(first) & mask;
        let at = |number: u32| Ipv4Addr::from(network | number);
        let [a, b, c, d] = NETWORK6;
        let at6 = |number| Ipv6Addr::new(a, b, c, d, 0, 0, 0, number);
        Some(Self {
            network: at(0),
            prefix,
            gateway: at(1),
            gateway6: at6(1),
            guest: at(3),
            guest6: at6(3),
            // The last address before the broadcast address.
            host: at(!mask - 1),
            host6: at6(0xfe),
            host_loopback: setup.host_loopback,
        })
    }

    /// True for the addresses that this process answers for on the wire (ARP, neighbour discovery, pings).
    pub(super) fn is_ours(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => address == self.gateway || address == self.host,
            IpAddr::V6(address) => address == self.gateway6 || address == self.host6,
        }
    }

    /// True for the guest's own addresses.
    pub(super) fn is_guest(&self, address: IpAddr) -> bool {
        address == self.guest || address == self.guest6
    }

    /// True for all addresses of the guest's network.
    fn is_inside(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => (u32::from(address) ^ u32::from(self.network)) >> (32 - self.prefix) == 0,
            IpAddr::V6(address) => address.segments()[..4] == NETWORK6,
        }
    }

    /// True for the name server's address and port.
    pub(super) fn is_dns(&self, address: SocketAddr) -> bool {
        address.port() == DNS_PORT && (address.ip() == self.gateway || address.ip() == self.gateway6)
    }

    /// The host's address for a destination of the guest; `None` when the destination is not reachable.
    ///
    /// This is the boundary that keeps a container from the host's loopback: the addresses of gateway and host are the
    /// only way there, and every other spelling of the loopback is unreachable.
    pub(super) fn on_host(&self, destination: SocketAddr) -> Option<SocketAddr> {
        let (address, port) = (destination.ip(), destination.port());
        if port == 0 {
            return None;
        }
        if self.is_ours(address) {
            let loopback = match address {
                IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
                IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
            };
            return self.host_loopback.then(|| SocketAddr::new(loopback, port));
        }
        let ordinary = match address {
            // connect(2) takes 0.0.0.0/8 for this host (RFC 1122, 3.2.1.3). From 224 on there are only multicast,
            // reserved and broadcast addresses (RFC 6890).
            IpAddr::V4(v4) => (1..224).contains(&v4.octets()[0]) && v4.octets()[0] != 127,
            // Global unicast (2000::/3) and unique local addresses (fc00::/7) only. Not among them are addresses that
            // embed IPv4 (::, ::1, ::ffff:0:0/96), of which ::ffff:127.0.0.1 would lead to the loopback, link-local
            // addresses, which mean nothing without an interface, and multicast.
            IpAddr::V6(v6) => v6.segments()[0] & 0xe000 == 0x2000 || v6.segments()[0] & 0xfe00 == 0xfc00,
        };
        // An unused address of the guest's network is nobody's; the host may have a network with the same numbers.
        (ordinary && !self.is_inside(address)).then(|| SocketAddr::new(address, port))
    }

    /// The source address that a published port's container sees for a client: the client's own if the guest would
    /// route its answer back here, else the gateway's.
    pub(super) fn as_client(&self, client: IpAddr, target: IpAddr) -> IpAddr {
        let gateway = match target {
            IpAddr::V4(_) => IpAddr::V4(self.gateway),
            IpAddr::V6(_) => IpAddr::V6(self.gateway6),
        };
        // A dual-stack socket reports IPv4 clients as ::ffff:a.b.c.d.
        let client = client.to_canonical();
        let kept = match (client, target) {
            (IpAddr::V4(client), IpAddr::V4(target)) => {
                let [a, b, ..] = client.octets();
                // The guest delivers to its bridges itself. dockerd takes their networks from 172.17.0.0/16 to
                // 172.31.0.0/16 first, and the target's own /16 covers the network of this container.
                let engines = (a == 172 && (16..32).contains(&b)) || client.octets()[..2] == target.octets()[..2];
                (1..224).contains(&a) && a != 127 && !client.is_link_local() && !engines
            }
            (IpAddr::V6(client), IpAddr::V6(target)) => {
                client.segments()[0] & 0xe000 == 0x2000 && client.segments()[..4] != target.segments()[..4]
            }
            // An IPv6 client of an IPv4 container, or the reverse, has no address of the container's version.
            _ => false,
        };
        if kept && !self.is_inside(client) { client } else { gateway }
    }
}

#[cfg(test)]
pub(crate) fn example() -> Addresses {
    Addresses::new(&Setup::default()).unwrap()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_address() -> impl Strategy<Value = IpAddr> {
        let near = prop_oneof![
            any::<u32>().prop_map(|address| IpAddr::V4(address.into())),
            any::<u8>().prop_map(|last| IpAddr::V4(Ipv4Addr::new(192, 168, 65, last))),
            any::<u128>().prop_map(|address| IpAddr::V6(address.into())),
            any::<u32>().prop_map(|address| IpAddr::V6(Ipv4Addr::from(address).to_ipv6_mapped())),
            (0_u16..300).prop_map(|last| IpAddr::V6(Ipv6Addr::new(0xfd0b, 0xad, 0xc0ff, 0, 0, 0, 0, last))),
        ];
        near.boxed()
    }

    proptest! {
        #[test]
        fn only_the_names_of_the_host_lead_to_its_loopback(address in any_address(), port in 1_u16..) {
            let addresses = example();
            let there = addresses.on_host(SocketAddr::new(address, port));
            if addresses.is_ours(address) {
                prop_assert!(there.is_some_and(|there| there.ip().is_loopback() && there.port() == port));
                let closed = Addresses { host_loopback: false, ..addresses };
                prop_assert_eq!(closed.on_host(SocketAddr::new(address, port)), None);
            } else if let Some(there) = there {
                let ip = there.ip().to_canonical();
                prop_assert!(!ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast());
                prop_assert_eq!(there, SocketAddr::new(address, port));
            }
        }

        #[test]
        fn a_client_is_never_shown_as_the_guest_or_as_something_behind_it(client in any_address(), last in 2_u8..) {
            let addresses = example();
            let target = IpAddr::V4(Ipv4Addr::new(172, 17, 0, last));
            let shown = addresses.as_client(client, target);
            prop_assert!(shown == client.to_canonical() || shown == addresses.gateway);
            prop_assert!(shown.is_ipv4() && !shown.is_loopback() && !addresses.is_guest(shown));
            prop_assert!(shown == addresses.gateway || !addresses.is_inside(shown));
        }

        #[test]
        fn every_network_has_room_for_its_addresses(first in any::<u32>(), prefix in 8_u8..=29) {
            let setup = Setup { subnet: (first.into(), prefix), host_loopback: true };
            let addresses = Addresses::new(&setup).unwrap();
            let all = [addresses.gateway, addresses.guest, addresses.host];
            prop_assert!(all.iter().all(|address| addresses.is_inside((*address).into())));
            prop_assert!(all[0] < all[1] && all[1] < all[2]);
        }
    }

    #[test]
    fn the_default_network_has_the_addresses_that_people_know() {
        let addresses = example();
        let text = [addresses.gateway, addresses.guest, addresses.host].map(|address| address.to_string());
        assert_eq!(text, ["192.168.65.1", "192.168.65.3", "192.168.65.254"]);
    }

    #[test]
    fn loopback_broadcast_and_this_host_lead_nowhere() {
        for address in [
            "127.0.0.1",
            "127.255.0.9",
            "0.0.0.0",
            "0.1.2.3",
            "255.255.255.255",
            "224.0.0.251",
            "192.168.65.7",
            "::1",
            "::",
            "::ffff:127.0.0.1",
            "fe80::1",
            "ff02::1",
            "fd0b:ad:c0ff::9",
        ] {
            assert_eq!(example().on_host(SocketAddr::new(address.parse().unwrap(), 80)), None, "{address}");
        }
        for address in ["10.1.2.3", "2001:db8::1", "fd00::1"] {
            assert!(example().on_host(SocketAddr::new(address.parse().unwrap(), 80)).is_some(), "{address}");
        }
    }

    #[test]
    fn a_client_from_another_machine_keeps_its_address() {
        let target = "172.17.0.2".parse().unwrap();
        for (client, shown) in [
            ("192.168.1.9", "192.168.1.9"),
            ("::ffff:192.168.1.9", "192.168.1.9"),
            ("127.0.0.1", "192.168.65.1"),
            ("172.18.0.9", "192.168.65.1"),
            ("192.168.65.3", "192.168.65.1"),
            ("2001:db8::1", "192.168.65.1"),
        ] {
            let seen = example().as_client(client.parse().unwrap(), target);
            assert_eq!(seen.to_string(), shown, "{client}");
        }
    }
}
