//! Errors of publishing a port; `docker run` shows their texts.

use std::net::SocketAddr;

use super::socket::ListenError;

/// Error of publishing a port.
#[derive(Debug, thiserror::Error)]
pub(in crate::backend) enum PublishError {
    /// The host refuses to listen.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The guest asked for an address or a port that cannot be published, for this reason.
    #[error("cannot publish {0}: {1}")]
    Refused(SocketAddr, &'static str),
    /// This many ports are published already.
    #[error("cannot publish more than {0} ports; stop a container or raise `ulimit -n`")]
    Full(usize),
    /// The guest used one id for two mappings.
    #[error("the port's id is already in use")]
    Taken,
    /// This VM cannot publish ports, for this reason.
    #[error("{0}")]
    Closed(String),
}
