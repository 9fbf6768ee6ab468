//! Networks: parents, addresses and driver options.
//!
//! The engine's bridges stand in the VM's own network namespace. A network over the VM's device, or one whose addresses
//! overlap the VM's, stands between the VM and its router: it gets the traffic of the engine and of other containers.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// Longest name of a network device, in bytes (the kernel's IFNAMSIZ less the NUL).
const MAX_DEVICE: usize = 15;

/// Names that the VM, the kernel or the engine use for devices, or for settings of all devices.
const RESERVED: [&str; 6] = ["all", "default", "docker0", "docker_gwbridge", "host", "lo"];

/// Beginnings of such names: the VM's device, ends of containers' wires, devices that the engine makes for other
/// drivers.
const RESERVED_BEGINNINGS: [&str; 9] = ["eth", "en", "wl", "veth", "dm-", "di-", "vx-", "ov-", "tun"];

/// Networks that no bridge can have: the loopback, multicast and reserved addresses, and the VM's other half of IPv6.
const SPECIAL: [Subnet; 6] = [
    Subnet { first: IpAddr::V4(Ipv4Addr::UNSPECIFIED), prefix: 8 },
    Subnet { first: IpAddr::V4(Ipv4Addr::LOCALHOST), prefix: 8 },
    Subnet { first: IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0)), prefix: 3 },
    // ::, ::1, and IPv4 addresses in another form (::a.b.c.d, ::ffff:a.b.c.d).
    Subnet { first: IpAddr::V6(Ipv6Addr::UNSPECIFIED), prefix: 64 },
    Subnet { first: IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)), prefix: 10 },
    Subnet { first: IpAddr::V6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0)), prefix: 8 },
];

/// A network that is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A parent device.
    #[error(
        "parent device {0:?} is not allowed with Enhanced Container Isolation: it belongs to the VM; leave the option \
         parent out to get a network between containers"
    )]
    Parent(String),
    /// A key of the driver's options.
    #[error(
        "network option {0:?} is not allowed with Enhanced Container Isolation: the engine's drivers do not know it"
    )]
    Key(String),
    /// A value of a driver's option.
    #[error("network option {key}={value:?} is not allowed with Enhanced Container Isolation: use {expected}")]
    Value {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// The values that are allowed.
        expected: &'static str,
    },
    /// Text that is not an address or a network.
    #[error("invalid network address {0:?}: use an IP address, or one with the length of its prefix for a subnet")]
    Malformed(String),
    /// An address that is not for containers.
    #[error(
        "network address {0} is not allowed with Enhanced Container Isolation: it belongs to the VM or is a special one"
    )]
    Reserved(String),
    /// An option of a container's end of a network.
    #[error("endpoint option {0:?} is not allowed with Enhanced Container Isolation")]
    Endpoint(String),
}

/// An IP network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subnet {
    first: IpAddr,
    prefix: u8,
}

impl Subnet {
    /// A network by one of its addresses and the length of its prefix in bits. `None` if the prefix is too long.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let longest = if address.is_ipv4() { 32 } else { 128 };
        (prefix <= longest).then_some(Self { first: address, prefix })
    }

    /// Returns true if the two have an address in common.
    fn overlaps(self, other: Self) -> bool {
        let prefix = u32::from(self.prefix.min(other.prefix));
        match (self.first, other.first) {
            // A shift by all bits, for a prefix of 0, gives `None`: everything overlaps.
            (IpAddr::V4(one), IpAddr::V4(two)) => {
                (u32::from(one) ^ u32::from(two)).checked_shr(32 - prefix).unwrap_or(0) == 0
            }
            (IpAddr::V6(one), IpAddr::V6(two)) => {
                (u128::from(one) ^ u128::from(two)).checked_shr(128 - prefix).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

impl From<IpAddr> for Subnet {
    /// The network of a single address.
    fn from(address: IpAddr) -> Self {
        Self { first: address, prefix: if address.is_ipv4() { 32 } else { 128 } }
    }
}

impl FromStr for Subnet {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let malformed = || Error::Malformed(text.to_owned());
        let (address, prefix) = text.split_once('/').ok_or_else(malformed)?;
        // `parse` would take a sign as well, and Go does not take zeros in front.
        let is_number = prefix.bytes().all(|byte| byte.is_ascii_digit()) && (prefix == "0" || !prefix.starts_with('0'));
        let prefix = prefix.parse().ok().filter(|_| is_number).ok_or_else(malformed)?;
        Self::new(address.parse().map_err(|_| malformed())?, prefix).ok_or_else(malformed)
    }
}

/// The VM's own networks, which containers' networks must leave alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmNetwork(Vec<Subnet>);

impl VmNetwork {
    /// The networks of the VM's device, IPv4 and IPv6.
    pub fn new(networks: impl IntoIterator<Item = Subnet>) -> Self {
        Self(networks.into_iter().collect())
    }

    fn judge(&self, text: &str, network: Subnet) -> Result<(), Error> {
        if self.0.iter().chain(&SPECIAL).any(|reserved| reserved.overlaps(network)) {
            return Err(Error::Reserved(text.to_owned()));
        }
        Ok(())
    }

    /// Judges a subnet, or a range in one.
    pub fn subnet(&self, text: &str) -> Result<(), Error> {
        self.judge(text, text.parse()?)
    }

    /// Judges a single address: a gateway, an auxiliary address.
    pub fn address(&self, text: &str) -> Result<(), Error> {
        self.judge(text, address(text)?.into())
    }
}

/// Reads an address.
pub fn address(text: &str) -> Result<IpAddr, Error> {
    text.parse().map_err(|_| Error::Malformed(text.to_owned()))
}

/// The meaning of an option's value.
#[derive(Clone, Copy)]
enum Kind {
    /// A flag as Go's `strconv.ParseBool` reads it, or nothing.
    Flag,
    /// A flag that only says what is so anyway.
    False,
    Number,
    /// Numbers with commas between them.
    Numbers,
    /// A name for a new bridge.
    Bridge,
    /// The beginning of the name of a container's device.
    Beginning,
    /// An address of the VM on which ports are published.
    Binding,
    /// An address from which packets of containers seem to come.
    Origin,
    Words(&'static [&'static str]),
    /// A device of the VM.
    Parent,
}

/// The options of all built-in drivers. One list for all, because a network can take over the options of a
/// configuration that was made without a driver (`ConfigFrom`); a driver ignores those of others.
const OPTIONS: &[(&str, Kind)] = &[
    ("com.docker.network.bridge.name", Kind::Bridge),
    ("com.docker.network.bridge.enable_ip_masquerade", Kind::Flag),
    ("com.docker.network.bridge.enable_icc", Kind::Flag),
    ("com.docker.network.bridge.inhibit_ipv4", Kind::Flag),
    ("com.docker.network.bridge.host_binding_ipv4", Kind::Binding),
    ("com.docker.network.bridge.default_bridge", Kind::False),
    ("com.docker.network.container_iface_prefix", Kind::Beginning),
    ("com.docker.network.container_interface_prefix", Kind::Beginning),
    ("com.docker.network.driver.mtu", Kind::Number),
    ("com.docker.network.driver.overlay.vxlanid_list", Kind::Numbers),
    ("com.docker.network.enable_ipv6", Kind::Flag),
    ("com.docker.network.host_ipv4", Kind::Origin),
    ("com.docker.network.host_ipv6", Kind::Origin),
    ("encrypted", Kind::Flag),
    ("ipvlan_flag", Kind::Words(&["", "bridge", "private", "vepa"])),
    ("ipvlan_mode", Kind::Words(&["", "l2", "l3", "l3s"])),
    ("macvlan_mode", Kind::Words(&["", "bridge", "passthru", "private", "vepa"])),
    ("parent", Kind::Parent),
];

const TRUE: [&str; 6] = ["1", "t", "T", "TRUE", "true", "True"];
const FALSE: [&str; 6] = ["0", "f", "F", "FALSE", "false", "False"];

/// Returns true for characters that the kernel, iptables and `/proc/sys` all take as part of a name.
fn is_device_text(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
}

/// Returns true for a name that a new bridge can have.
fn is_bridge_name(name: &str) -> bool {
    // The engine takes over a bridge that is there already, and refuses any other device.
    name.len() <= MAX_DEVICE
        && is_device_text(name)
        && !RESERVED.contains(&name)
        && !RESERVED_BEGINNINGS.iter().any(|beginning| name.starts_with(beginning))
}

fn is_number(text: &str) -> bool {
    (1..=9).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Judges an option of a network's driver.
pub fn option(key: &str, value: &str, vm: &VmNetwork) -> Result<(), Error> {
    let Some((_, kind)) = OPTIONS.iter().find(|(name, _)| *name == key) else {
        return Err(Error::Key(key.to_owned()));
    };
    let (allowed, expected) = match kind {
        Kind::Flag => (value.is_empty() || TRUE.contains(&value) || FALSE.contains(&value), "true or false"),
        Kind::False => (FALSE.contains(&value), "false"),
        Kind::Number => (is_number(value), "a number"),
        Kind::Numbers => (value.split(',').all(is_number), "numbers with commas between them"),
        Kind::Bridge => (
            value.is_empty() || is_bridge_name(value),
            "at most 15 letters, digits, '_' and '-', and not the name of a device of the VM",
        ),
        Kind::Beginning => {
            (value.is_empty() || value.len() < MAX_DEVICE && is_device_text(value), "at most 14 letters and digits")
        }
        Kind::Binding => (address(value).is_ok(), "an IP address"),
        Kind::Origin => return vm.address(value),
        Kind::Words(words) => (words.contains(&value), "a mode of the driver's documentation"),
        Kind::Parent if value.is_empty() => (true, ""),
        Kind::Parent => return Err(Error::Parent(value.to_owned())),
    };
    if allowed { Ok(()) } else { Err(Error::Value { key: key.to_owned(), value: value.to_owned(), expected }) }
}

/// Returns true for an option that names a device of the VM.
pub fn names_device(key: &str) -> bool {
    OPTIONS.iter().any(|(name, kind)| *name == key && matches!(kind, Kind::Bridge | Kind::Parent))
}

/// Judges an option of a container's end of a network. The built-in drivers read only options that the engine sets
/// there itself, all below `com.docker.network`; a client's own keys stay text.
pub fn endpoint_option(key: &str) -> Result<(), Error> {
    if key.starts_with("com.docker.network") { Err(Error::Endpoint(key.to_owned())) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vm() -> VmNetwork {
        VmNetwork::new(["192.168.65.3/24", "fd0b:ad:c0ff::3/64"].map(|text| text.parse().unwrap()))
    }

    #[test]
    fn options_of_dockers_documentation_are_allowed() {
        for (key, value) in [
            ("com.docker.network.bridge.name", "docker1"),
            ("com.docker.network.bridge.name", "br-front"),
            ("com.docker.network.bridge.name", "my_bridge0"),
            ("com.docker.network.bridge.enable_ip_masquerade", "false"),
            ("com.docker.network.bridge.enable_icc", "true"),
            ("com.docker.network.bridge.host_binding_ipv4", "0.0.0.0"),
            ("com.docker.network.bridge.host_binding_ipv4", "127.0.0.1"),
            ("com.docker.network.bridge.inhibit_ipv4", "true"),
            ("com.docker.network.driver.mtu", "1500"),
            ("com.docker.network.driver.overlay.vxlanid_list", "4097,4098"),
            ("com.docker.network.container_iface_prefix", "ens"),
            ("com.docker.network.enable_ipv6", "true"),
            ("com.docker.network.host_ipv4", "198.51.100.2"),
            ("encrypted", ""),
            ("encrypted", "true"),
            ("macvlan_mode", "bridge"),
            ("ipvlan_mode", "l3s"),
            ("ipvlan_flag", "private"),
            ("parent", ""),
        ] {
            assert_eq!(option(key, value, &vm()), Ok(()), "{key}={value}");
        }
        for subnet in
            ["172.28.0.0/16", "10.5.0.0/24", "192.168.64.0/24", "2001:db8::/64", "fd00:1::/80", "172.28.5.0/24"]
        {
            assert_eq!(vm().subnet(subnet), Ok(()), "{subnet}");
        }
        for address in ["172.28.5.254", "2001:db8::1"] {
            assert_eq!(vm().address(address), Ok(()), "{address}");
        }
    }

    #[test]
    fn every_parent_is_refused() {
        for parent in ["eth0", "eth0.10", "lo", "docker0", "dm-0123456789ab", " ", "eth0\0", "ETH0"] {
            assert_eq!(option("parent", parent, &vm()), Err(Error::Parent(parent.to_owned())));
        }
        assert_eq!(option("Parent", "eth0", &vm()), Err(Error::Key("Parent".to_owned())));
    }

    #[test]
    fn a_bridge_cannot_be_a_device_that_exists_or_that_the_engine_makes() {
        for name in [
            "eth0",
            "lo",
            "docker0",
            "docker_gwbridge",
            "all",
            "default",
            "veth1",
            "dm-0123",
            "../x",
            "a/b",
            "a.b",
            "-i",
            "a+",
            "a b",
            "..",
            "a\0",
            "abcdefghijklmnop",
            "ens3",
        ] {
            let refused = option("com.docker.network.bridge.name", name, &vm());
            assert!(matches!(refused, Err(Error::Value { .. })), "{name}");
        }
        assert!(option("com.docker.network.bridge.default_bridge", "true", &vm()).is_err());
        assert!(option("com.docker.network.container_iface_prefix", "../a", &vm()).is_err());
        assert!(option("com.docker.network.driver.mtu", "-1", &vm()).is_err());
        assert!(option("com.docker.network.windowsshim.interface", "Ethernet", &vm()).is_err());
    }

    #[test]
    fn networks_that_overlap_the_vms_are_refused() {
        for subnet in [
            "192.168.65.0/24",
            "192.168.65.128/25",
            "192.168.65.3/32",
            "192.168.0.0/16",
            "192.0.0.0/2",
            "0.0.0.0/0",
            "128.0.0.0/1",
            "127.0.0.0/8",
            "224.0.0.0/4",
            "fd0b:ad:c0ff::/64",
            "fd0b:ad:c0ff::/48",
            "fd00::/8",
            "::/0",
            "::ffff:192.168.65.0/120",
            "::1/128",
            "fe80::/64",
        ] {
            assert_eq!(vm().subnet(subnet), Err(Error::Reserved(subnet.to_owned())), "{subnet}");
        }
        for address in ["192.168.65.1", "192.168.65.254", "127.0.0.1", "fd0b:ad:c0ff::fe", "0.0.0.0", "::"] {
            assert_eq!(vm().address(address), Err(Error::Reserved(address.to_owned())), "{address}");
        }
        assert!(option("com.docker.network.host_ipv4", "192.168.65.1", &vm()).is_err());
    }

    #[test]
    fn texts_that_two_readers_could_understand_differently_are_refused() {
        for text in [
            "",
            "10.0.0.0",
            "10.0.0.0/",
            "10.0.0.0/+8",
            "10.0.0.0/08",
            "10.0.0.0/33",
            "010.0.0.0/8",
            "10.0/8",
            "10.0.0.0/8 ",
            "fe80::%eth0/64",
            "::/129",
            "a/8",
            "0x0a000000/8",
            "10.0.0.0/8/8",
        ] {
            assert_eq!(vm().subnet(text), Err(Error::Malformed(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn an_endpoint_takes_no_options_of_the_engine() {
        assert_eq!(endpoint_option("field1"), Ok(()));
        assert!(endpoint_option("com.docker.network.portmap").is_err());
        assert!(endpoint_option("com.docker.network.endpoint.exposedports").is_err());
    }

    proptest! {
        #[test]
        fn a_subnet_that_passes_has_no_address_of_the_vm(address: u32, prefix in 0_u8..=32) {
            let text = format!("{}/{prefix}", Ipv4Addr::from(address));
            if vm().subnet(&text).is_ok() {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                for vm in u32::from(Ipv4Addr::new(192, 168, 65, 0))..=u32::from(Ipv4Addr::new(192, 168, 65, 255)) {
                    prop_assert!(vm & mask != address & mask, "{}", text);
                }
            }
        }

        #[test]
        fn no_text_makes_it_panic(text in ".{0,40}", key in ".{0,20}") {
            let _ = (vm().subnet(&text), vm().address(&text), option(&key, &text, &vm()));
        }
    }
}
