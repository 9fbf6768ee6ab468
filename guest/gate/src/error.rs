//! Errors that the gate answers with instead of dockerd.

use std::error::Error;

use bulkhead_guest_common::error::chain;
use hyper::{Response, StatusCode};

use crate::{
    dockerd::DockerdError,
    response::{self, Body},
    rules::Refusal,
};

/// A request that dockerd does not answer. The text is the `message` that docker shows to the user.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    #[error("the Docker API does not support CONNECT")]
    Connect,
    #[error("the request body is longer than 4 MiB and cannot be inspected")]
    BodyTooLong,
    #[error("the request body ended early")]
    IncompleteBody,
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("could not inspect the request")]
    InspectionAborted(#[source] tokio::task::JoinError),
    #[error("the Docker engine is starting or restarting; try again in a moment")]
    Unreachable(#[source] std::io::Error),
    #[error("the Docker engine closed the connection without a response")]
    Disconnected(#[source] hyper::Error),
    #[error("invalid response from the Docker engine")]
    InvalidResponse,
    #[error("could not check whether the container may use the Docker socket")]
    SocketCheck(#[source] DockerdError),
    #[error("No such container: {0}")]
    NoContainer(String),
    #[error("multiple IDs found with provided prefix: {0}")]
    AmbiguousContainer(String),
    #[error("could not check what the container mounts")]
    MountCheck(#[source] DockerdError),
    #[error("could not check the network that the container joins")]
    NetworkCheck(#[source] DockerdError),
    #[error("could not save the container's permission to use the Docker socket")]
    SaveGrant(#[source] std::io::Error),
}

impl ProxyError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Connect => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTooLong => StatusCode::PAYLOAD_TOO_LARGE,
            Self::NoContainer(_) => StatusCode::NOT_FOUND,
            Self::AmbiguousContainer(_)
            | Self::IncompleteBody
            | Self::Refused(Refusal::Malformed(_) | Refusal::Query(_)) => StatusCode::BAD_REQUEST,
            Self::Refused(_) => StatusCode::FORBIDDEN,
            Self::InspectionAborted(_) | Self::SaveGrant(_) => StatusCode::INTERNAL_SERVER_ERROR,
            // Both go away by themselves: dockerd or the registry is not there yet.
            Self::Unreachable(_) | Self::SocketCheck(_) | Self::MountCheck(_) | Self::NetworkCheck(_) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Disconnected(_) | Self::InvalidResponse => StatusCode::BAD_GATEWAY,
        }
    }

    /// Makes the HTTP response. The causes go to the log only: they name paths of the VM, which are of no use to the
    /// client and none of a container's business.
    pub(crate) fn response(&self) -> Response<Body> {
        if self.source().is_some() {
            eprintln!("{}", chain(self));
        }
        response::error(self.status(), &self.to_string())
    }
}
