//! The pair of addresses that names a TCP connection or a UDP association.

use std::net::SocketAddr;

/// The two ends as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The guest's end, or a container's behind it.
    pub(super) guest: SocketAddr,
    /// The far end, which this process plays: an address on the internet, the host or the gateway.
    pub(super) peer: SocketAddr,
}
