//! The setting `vpnkitCIDR`: the IPv4 network between the VM and its router.

use std::{fmt, net::Ipv4Addr, str::FromStr};

/// A private IPv4 network that a VM can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    first: Ipv4Addr,
    prefix: u8,
}

/// A text that is not a network for a VM.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("must be {}", Subnet::EXPECTED)]
pub struct InvalidSubnet;

/// Accepted prefix lengths: long enough to leave the host most of a private range, and short enough for the addresses
/// of the guest, its router and the host.
const PREFIXES: std::ops::RangeInclusive<u8> = 16..=28;

/// Networks for private use (RFC 1918).
const PRIVATE: [Subnet; 3] = [
    Subnet { first: Ipv4Addr::new(10, 0, 0, 0), prefix: 8 },
    Subnet { first: Ipv4Addr::new(172, 16, 0, 0), prefix: 12 },
    Subnet { first: Ipv4Addr::new(192, 168, 0, 0), prefix: 16 },
];

/// The network that dockerd gives its default bridge.
const BRIDGE: Subnet = Subnet { first: Ipv4Addr::new(172, 17, 0, 0), prefix: 16 };

impl Subnet {
    /// The accepted form, as the end of "must be …".
    pub const EXPECTED: &'static str = "a private IPv4 network with a prefix of 16 to 28 bits, given by its first \
                                        address, such as 192.168.65.0/24, and outside 172.17.0.0/16, which the engine \
                                        uses";

    /// Its first address.
    pub const fn first(self) -> Ipv4Addr {
        self.first
    }

    /// The length of its prefix in bits.
    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    /// Returns whether all of `other` lies in it.
    fn contains(self, other: Self) -> bool {
        // A shift by 32, for a prefix of 0 bits, would overflow.
        let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
        other.prefix >= self.prefix && u32::from(other.first) & mask == u32::from(self.first)
    }
}

impl Default for Subnet {
    fn default() -> Self {
        Self { first: Ipv4Addr::new(192, 168, 65, 0), prefix: 24 }
    }
}

impl FromStr for Subnet {
    type Err = InvalidSubnet;

    fn from_str(text: &str) -> Result<Self, InvalidSubnet> {
        let (first, prefix) = text.split_once('/').ok_or(InvalidSubnet)?;
        // `parse` would accept `+24` and `024`, too; the network is printed in one spelling and has to be given in it.
        if !prefix.bytes().all(|byte| byte.is_ascii_digit()) || prefix.starts_with('0') {
            return Err(InvalidSubnet);
        }
        let subnet = Self {
            first: first.parse().map_err(|_| InvalidSubnet)?,
            prefix: prefix.parse().map_err(|_| InvalidSubnet)?,
        };
        // The shift leaves the bits behind the prefix, which are zero in the first address of a network.
        let fits = PREFIXES.contains(&subnet.prefix)
            && u32::from(subnet.first).checked_shl(u32::from(subnet.prefix)) == Some(0)
            && PRIVATE.iter().any(|private| private.contains(subnet))
            && !BRIDGE.contains(subnet);
        if fits { Ok(subnet) } else { Err(InvalidSubnet) }
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_private_networks_beside_the_engines_are_accepted() {
        for text in ["192.168.65.0/24", "10.200.0.0/16", "172.16.4.0/22", "172.18.0.0/16", "192.168.255.240/28"] {
            assert_eq!(text.parse::<Subnet>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "192.168.65.0",
            "192.168.65.1/24",
            "192.168.65.0/",
            "192.168.65.0/+24",
            "192.168.65.0/024",
            "192.168.65.0/29",
            "10.0.0.0/8",
            "10.0.0.0/15",
            "8.8.8.0/24",
            "127.0.0.0/16",
            "169.254.0.0/16",
            "172.17.0.0/16",
            "172.17.9.0/24",
            "172.32.0.0/16",
            "fd00::/64",
            "192.168.65.0/24 ",
            "192.168.065.0/24",
        ] {
            assert_eq!(text.parse::<Subnet>(), Err(InvalidSubnet), "{text}");
        }
    }

    #[test]
    fn the_default_is_what_the_list_of_settings_says() {
        assert_eq!(super::super::SUBNET.default_value(), Subnet::default().to_string());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "[0-9./+ ]{0,20}") {
            let _ = text.parse::<Subnet>();
        }

        #[test]
        fn an_accepted_network_begins_with_its_first_address(address in any::<u32>(), prefix in 0_u8..40) {
            let text = format!("{}/{prefix}", Ipv4Addr::from(address));
            if let Ok(subnet) = text.parse::<Subnet>() {
                prop_assert_eq!(subnet.to_string(), text);
                prop_assert!(subnet.first().is_private());
                prop_assert_eq!(u32::from(subnet.first()) & (u32::MAX >> subnet.prefix()), 0);
            }
        }
    }
}
