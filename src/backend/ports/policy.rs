//! What the guest may ask for: the one place for such decisions.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bulkhead_protocol::PortMapping;

use super::error::PublishError;

/// A mapping that may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Binding {
    /// Where to listen. The address is the client's of the engine to choose, as with any engine; without one it is
    /// every address of the host.
    pub(super) listen: SocketAddr,
    /// Where in the guest it leads.
    pub(super) target: SocketAddr,
}

/// Judges a mapping; with `only_loopback` the host's loopback takes the place of any other address.
pub(super) fn decide(port: PortMapping, only_loopback: bool) -> Result<Binding, PublishError> {
    let mut listen = SocketAddr::new(port.host_ip.to_canonical(), port.host_port);
    if only_loopback && !listen.ip().is_loopback() {
        listen.set_ip(match listen {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    let target = SocketAddr::new(port.container_ip.to_canonical(), port.container_port);
    if listen.port() == 0 || target.port() == 0 {
        return Err(PublishError::Refused(listen, "a port is from 1 to 65535"));
    }
    if listen.ip().is_multicast() || is_broadcast(listen.ip()) {
        return Err(PublishError::Refused(listen, "a group's address is nobody's to listen on"));
    }
    let ip = target.ip();
    // The far end is chosen by the guest; it shall be in the guest, and not what any host takes for itself.
    if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || is_broadcast(ip) {
        return Err(PublishError::Refused(listen, "no container has the address it leads to"));
    }
    Ok(Binding { listen, target })
}

fn is_broadcast(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V4(ip) if ip.is_broadcast())
}
