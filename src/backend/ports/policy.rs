//! The decision about a port that the guest asks for; nothing else in the backend judges one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bulkhead_protocol::PortMapping;

use super::error::PublishError;

/// A mapping that may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Binding {
    /// The host's address and port to listen on.
    pub(super) listen: SocketAddr,
    /// The container's address and port in the guest.
    pub(super) target: SocketAddr,
}

/// Judges a mapping; with `only_loopback` the host's loopback takes the place of any other address.
///
/// The docker client chooses the host's address, as with any engine; without one dockerd asks for every address. Any
/// port is allowed that the kernel lets this user listen on.
pub(super) fn decide(port: PortMapping, only_loopback: bool) -> Result<Binding, PublishError> {
    // `::ffff:127.0.0.1` is the IPv4 loopback: without this it would pass the comparisons below as an IPv6 address.
    let mut listen = SocketAddr::new(port.host_ip.to_canonical(), port.host_port);
    if only_loopback && !listen.ip().is_loopback() {
        listen.set_ip(match listen {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    let target = SocketAddr::new(port.container_ip.to_canonical(), port.container_port);
    // bind(2) takes port 0 as any free port, and the table would not say which one listens. dockerd never asks for it.
    if listen.port() == 0 || target.port() == 0 {
        return Err(PublishError::Refused(listen, "a port number must be 1-65535"));
    }
    if listen.ip().is_multicast() || is_broadcast(listen.ip()) {
        return Err(PublishError::Refused(listen, "cannot listen on a multicast or broadcast address"));
    }
    let ip = target.ip();
    // The guest chooses the target, too. The network process sends it packets inside the guest's network only; these
    // addresses mean "this machine" or "everyone" to any network stack and can never be a container's.
    if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || is_broadcast(ip) {
        return Err(PublishError::Refused(listen, "its target is not a container's address"));
    }
    Ok(Binding { listen, target })
}

fn is_broadcast(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V4(ip) if ip.is_broadcast())
}
