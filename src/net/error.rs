//! Why the network process ends in failure.

use std::io;

use vhost::vhost_user::Error as VhostError;

use crate::{inherited, packets::PacketError, sandbox};

/// Why the network process ends in failure.
#[derive(Debug, thiserror::Error)]
pub(super) enum NetError {
    #[error("descriptor {} is no control socket; `bulkhead net` is started by the backend", inherited::FD)]
    Descriptor,
    #[error("the backend's control socket failed")]
    Control(#[from] PacketError),
    #[error("the backend's first packet sets up no network")]
    NoSetup,
    #[error("the guest's network {0}/{1} has not room for its addresses")]
    Subnet(std::net::Ipv4Addr, u8),
    #[error("the host refused {what}")]
    Host {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the vmm broke the vhost-user protocol")]
    Protocol(#[source] VhostError),
    #[error("the network process cannot confine itself")]
    Sandbox(#[from] sandbox::SandboxError),
}

pub(super) fn host(what: &'static str) -> impl FnOnce(io::Error) -> NetError {
    move |source| NetError::Host { what, source }
}
