//! Errors that end the share process.

use std::io;

use bulkhead_vhost_user::Error as VhostError;

use bulkhead_ipc::{channel::PacketError, inherited, sandbox};

/// An error that ends the share process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShareError {
    #[error(
        "descriptor {} is not a control socket; `bulkhead share-server` is started by the backend only",
        inherited::FD
    )]
    Descriptor,
    #[error("cannot receive from the backend's control socket")]
    Control(#[from] PacketError),
    #[error("the backend did not send a state and a list of shares")]
    NoSetup,
    #[error("cannot {action}")]
    Host {
        action: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the vmm violated the vhost-user protocol")]
    Protocol(#[source] VhostError),
    #[error("cannot confine the share process")]
    Sandbox(#[from] sandbox::SandboxError),
}

/// Names the action that the host failed.
pub(crate) fn cannot(action: &'static str) -> impl FnOnce(io::Error) -> ShareError {
    move |source| ShareError::Host { action, source }
}
