//! Errors that the gate answers with instead of the engine.

use std::error::Error as _;

use hyper::{Response, StatusCode};

use crate::{
    dockerd::DockerdError,
    response::{self, Body},
    rules::Refusal,
};

/// Why the gate answers instead of the engine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    #[error("the Docker API has no CONNECT")]
    Connect,
    #[error("the request's JSON is longer than 4 MiB")]
    BodyTooLong,
    #[error("the request's body broke off")]
    IncompleteBody,
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the request could not be inspected")]
    InspectionAborted(#[source] tokio::task::JoinError),
    #[error("the Docker engine is starting or restarting; try again in a moment")]
    Unreachable(#[source] std::io::Error),
    #[error("the Docker engine ended the connection without an answer")]
    Disconnected(#[source] hyper::Error),
    #[error("the Docker engine's answer could not be read")]
    InvalidResponse,
    #[error("whether the container may have the docker socket could not be found out")]
    SocketCheck(#[source] DockerdError),
    #[error("that the container may have the docker socket could not be written down")]
    SaveGrant(#[source] std::io::Error),
}

impl ProxyError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Connect => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTooLong => StatusCode::PAYLOAD_TOO_LARGE,
            Self::IncompleteBody | Self::Refused(Refusal::Malformed(_)) => StatusCode::BAD_REQUEST,
            Self::Refused(_) => StatusCode::FORBIDDEN,
            Self::InspectionAborted(_) | Self::SaveGrant(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Unreachable(_) | Self::SocketCheck(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Disconnected(_) | Self::InvalidResponse => StatusCode::BAD_GATEWAY,
        }
    }

    pub(crate) fn answer(&self) -> Response<Body> {
        if let Some(cause) = self.source() {
            eprintln!("{self}: {cause}");
        }
        response::error(self.status(), &self.to_string())
    }
}
