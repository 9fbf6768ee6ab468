//! Errors that end the network process.

use std::{io, net::Ipv4Addr};

use bulkhead_vhost_user::Error as VhostError;

use bulkhead_ipc::{channel::PacketError, inherited, sandbox};

/// An error that ends the network process.
#[derive(Debug, thiserror::Error)]
pub(super) enum NetError {
    #[error("descriptor {} is not a control socket; `bulkhead net` is started by the backend only", inherited::FD)]
    Descriptor,
    #[error("cannot receive from the backend's control socket")]
    Control(#[from] PacketError),
    #[error("the backend's first packet is not a network setup")]
    NoSetup,
    #[error("guest network {0}/{1} is out of range: the prefix must have 8 to 29 bits")]
    Subnet(Ipv4Addr, u8),
    #[error("cannot {action}")]
    Host {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the vmm violated the vhost-user protocol")]
    Protocol(#[source] VhostError),
    #[error("cannot confine the network process")]
    Sandbox(#[from] sandbox::SandboxError),
}

/// Names the action that the host failed.
pub(super) fn cannot(action: &'static str) -> impl FnOnce(io::Error) -> NetError {
    move |source| NetError::Host { action, source }
}
