//! Ports of the VM itself that the host publishes: the setting `vmPorts`.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use bulkhead_protocol::Transport;

/// The accepted form of a port, as the end of "must be …".
pub(super) const EXPECTED: &str =
    "ports such as 8080, 8080:80, 127.0.0.1:8080:80/udp or [::1]:8080:80, each with the port of the host first";

/// Error of parsing a port of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be {EXPECTED}")]
pub struct InvalidVmPort;

/// A port of the VM and the host's port that leads there, written as for `docker run --publish`:
/// `[ADDRESS:]PORT[:VM_PORT][/PROTOCOL]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VmPort {
    /// Address of the host to listen on; `None` for those of `portBindingBehavior`.
    pub address: Option<IpAddr>,
    /// Port of the host, not 0.
    pub host_port: u16,
    /// Port of the VM, not 0.
    pub vm_port: u16,
    /// Transport protocol.
    pub transport: Transport,
}

impl FromStr for VmPort {
    type Err = InvalidVmPort;

    fn from_str(text: &str) -> Result<Self, InvalidVmPort> {
        let (text, transport) = match text.rsplit_once('/') {
            None => (text, Transport::Tcp),
            Some((text, "tcp")) => (text, Transport::Tcp),
            Some((text, "udp")) => (text, Transport::Udp),
            Some(_) => return Err(InvalidVmPort),
        };
        let (address, ports) = match text.strip_prefix('[') {
            Some(rest) => {
                let (address, ports) = rest.split_once("]:").ok_or(InvalidVmPort)?;
                (Some(address.parse::<Ipv6Addr>().map_err(|_| InvalidVmPort)?.into()), ports)
            }
            None => match text.split_once(':') {
                Some((address, ports)) if address.contains('.') => {
                    (Some(address.parse::<Ipv4Addr>().map_err(|_| InvalidVmPort)?.into()), ports)
                }
                _ => (None, text),
            },
        };
        let (host_port, vm_port) = ports.split_once(':').unwrap_or((ports, ports));
        Ok(Self { address, host_port: number(host_port)?, vm_port: number(vm_port)?, transport })
    }
}

impl fmt::Display for VmPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            None => {}
        }
        write!(f, "{}:{}/{}", self.host_port, self.vm_port, self.transport)
    }
}

/// Parses a port number without a sign, from 1 on.
fn number(text: &str) -> Result<u16, InvalidVmPort> {
    // `parse` would take `+80`.
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|number| digits && *number != 0).ok_or(InvalidVmPort)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_port_is_written_as_for_docker_run_publish() {
        for (text, expected) in [
            ("80", "80:80/tcp"),
            ("8080:80", "8080:80/tcp"),
            ("8080:80/udp", "8080:80/udp"),
            ("127.0.0.1:8080", "127.0.0.1:8080:8080/tcp"),
            ("0.0.0.0:1:2/tcp", "0.0.0.0:1:2/tcp"),
            ("[::1]:8080:80/udp", "[::1]:8080:80/udp"),
            ("[::]:80", "[::]:80:80/tcp"),
        ] {
            assert_eq!(text.parse::<VmPort>().unwrap().to_string(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_port_is_refused() {
        for text in [
            "",
            "0",
            "65536",
            "+80",
            "-1",
            "80:",
            ":80",
            "80:0",
            "1:2:3",
            "80/sctp",
            "80/",
            "/tcp",
            "80/TCP",
            " 80",
            "localhost:80",
            "::1:80:80",
            "[127.0.0.1]:80",
            "[::1]80",
            "[::1]",
            "1.2.3:80",
            "127.0.0.1:",
            "8080-8090",
        ] {
            assert!(text.parse::<VmPort>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused(text in "\\PC{0,40}") {
            if let Ok(port) = text.parse::<VmPort>() {
                prop_assert_eq!(port.to_string().parse::<VmPort>(), Ok(port));
            }
        }

        #[test]
        fn a_port_that_is_written_is_read_again(
            address in prop::option::of(any::<IpAddr>()), host_port in 1..=u16::MAX, vm_port in 1..=u16::MAX, udp: bool,
        ) {
            let transport = if udp { Transport::Udp } else { Transport::Tcp };
            let port = VmPort { address, host_port, vm_port, transport };
            prop_assert_eq!(port.to_string().parse::<VmPort>(), Ok(port));
        }
    }
}
