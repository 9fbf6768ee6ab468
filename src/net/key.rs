//! The pair of addresses that names a TCP connection or a UDP association.

use std::net::SocketAddr;

/// The two ends as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The guest's end.
    pub(super) guest: SocketAddr,
    /// The end that the guest believes to be elsewhere.
    pub(super) peer: SocketAddr,
}
