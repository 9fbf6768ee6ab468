//! Questions that the gate itself has for the engine.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{HeaderMap, Method, Request, StatusCode, client};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{net::UnixStream, time::timeout};

use crate::rules;

/// Longest answer that is read, in bytes; a list of images is the longest.
const MAX_RESPONSE: usize = 32 * 1024 * 1024;
/// What the engine knows itself.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// What a registry has to be asked for.
pub(crate) const REGISTRY_TIMEOUT: Duration = Duration::from_secs(15);

/// A question stayed without an answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DockerdError {
    /// The engine is not there.
    #[error("the Docker engine is not reachable")]
    Connect(#[from] std::io::Error),
    /// The exchange broke.
    #[error("the Docker engine broke off its answer")]
    Response(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It took too long.
    #[error("the Docker engine takes too long to answer")]
    Timeout,
    /// Another status than success.
    #[error("the Docker engine answers {0}")]
    Status(StatusCode),
}

/// Asks the engine behind a unix socket.
#[derive(Clone, Debug)]
pub(crate) struct Dockerd {
    socket: PathBuf,
}

impl Dockerd {
    /// The engine that listens on `socket`.
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// `GET` of a JSON answer.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, DockerdError> {
        self.get_with_headers(path, HeaderMap::new(), REQUEST_TIMEOUT).await
    }

    /// The same, with headers and a patience of one's own.
    pub(crate) async fn get_with_headers<T: DeserializeOwned>(
        &self,
        path: &str,
        headers: HeaderMap,
        patience: Duration,
    ) -> Result<T, DockerdError> {
        let body = timeout(patience, self.request_body(Method::GET, path, headers))
            .await
            .map_err(|_| DockerdError::Timeout)??;
        serde_json::from_slice(&body).map_err(|error| DockerdError::Response(error.into()))
    }

    /// `DELETE`.
    pub(crate) async fn delete(&self, path: &str) -> Result<(), DockerdError> {
        let asked = self.request_body(Method::DELETE, path, HeaderMap::new());
        timeout(REQUEST_TIMEOUT, asked).await.map_err(|_| DockerdError::Timeout)?.map(drop)
    }

    async fn request_body(&self, method: Method, path: &str, headers: HeaderMap) -> Result<Bytes, DockerdError> {
        let broken = |error: hyper::Error| DockerdError::Response(error.into());
        let stream = UnixStream::connect(&self.socket).await?;
        let (mut sender, connection) = client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "docker")
            .body(Empty::<Bytes>::new())
            .map_err(|error| DockerdError::Response(error.into()))?;
        request.headers_mut().extend(headers);
        let response = sender.send_request(request).await.map_err(broken)?;
        if !response.status().is_success() {
            return Err(DockerdError::Status(response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_RESPONSE).collect().await.map_err(DockerdError::Response)?;
        Ok(body.to_bytes())
    }
}

/// Percent-encodes everything that does not belong into one segment of a path.
pub(crate) fn segment(name: &str) -> String {
    rules::encode(name, b"_.-")
}

#[cfg(test)]
mod tests {
    use super::segment;

    #[test]
    fn a_name_cannot_break_out_of_its_path_segment() {
        assert_eq!(segment("a/../b?c"), "a%2F..%2Fb%3Fc");
    }
}
