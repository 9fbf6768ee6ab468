//! Who is who on the guest's network, and what of the host is behind its addresses.

use std::net::{Ipv4Addr, SocketAddrV4};

/// The guest's network.
pub const PREFIX: u8 = 24;
/// This process as a router and name server: `gateway.docker.internal`.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 65, 1);
/// The guest.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 65, 3);
/// The host: `host.docker.internal`.
pub const HOST: Ipv4Addr = Ipv4Addr::new(192, 168, 65, 254);

/// Largest IP packet towards the guest's interface, in bytes. Datagrams come whole; bulk TCP is segmented by offload
/// to what each peer takes, so that containers' 1500 bytes cost nothing.
pub const MTU: u16 = 65_520;

/// Locally administered addresses of the two ends of the wire.
pub(super) const GUEST_MAC: [u8; 6] = [0x52, 0x0b, 0xad, 0xc0, 0xff, 0x03];
pub(super) const GATEWAY_MAC: [u8; 6] = [0x52, 0x0b, 0xad, 0xc0, 0xff, 0x01];

/// Port of the name server.
pub(super) const DNS_PORT: u16 = 53;

/// Whether this process answers for the address on the wire.
pub(super) fn is_ours(address: Ipv4Addr) -> bool {
    address == GATEWAY || address == HOST
}

/// Where the host reaches what the guest calls `destination`; `None` when there is no such place.
///
/// The two addresses of the host are the only way to its loopback: every other spelling of it ends here.
pub(super) fn on_host(destination: SocketAddrV4) -> Option<SocketAddrV4> {
    let address = destination.ip();
    if is_ours(*address) {
        return Some(SocketAddrV4::new(Ipv4Addr::LOCALHOST, destination.port()));
    }
    let [first, second, third, _] = address.octets();
    let own_network = [first, second, third] == [192, 168, 65];
    // 0.0.0.0/8 is this host to connect(2); above 224 are groups, the future and the broadcast address.
    let ordinary = !own_network && first != 0 && first != 127 && first < 224 && destination.port() != 0;
    ordinary.then_some(destination)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn only_the_two_names_of_the_host_lead_to_its_loopback(address in any::<u32>(), port in 1_u16..) {
            let address = Ipv4Addr::from(address);
            let there = on_host(SocketAddrV4::new(address, port));
            if is_ours(address) {
                prop_assert_eq!(there, Some(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)));
            } else if let Some(there) = there {
                prop_assert!(!there.ip().is_loopback() && !there.ip().is_unspecified() && !there.ip().is_multicast());
                prop_assert_eq!(there, SocketAddrV4::new(address, port));
            }
        }
    }

    #[test]
    fn loopback_broadcast_and_this_host_lead_nowhere() {
        for address in
            ["127.0.0.1", "127.255.0.9", "0.0.0.0", "0.1.2.3", "255.255.255.255", "224.0.0.251", "192.168.65.7"]
        {
            assert_eq!(on_host(SocketAddrV4::new(address.parse().unwrap(), 80)), None, "{address}");
        }
        assert!(on_host("10.1.2.3:80".parse().unwrap()).is_some());
    }
}
