//! A client of dockerd, for the gate's own requests.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{HeaderMap, Method, Request, StatusCode, body::Incoming, client};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{net::UnixStream, time::timeout};

use crate::rules;

/// Maximum length of a response in bytes; the longest is a list of images.
const MAX_RESPONSE: usize = 32 * 1024 * 1024;
/// Limit for requests that dockerd answers by itself.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// Limit for requests for which dockerd asks a registry.
pub(crate) const REGISTRY_TIMEOUT: Duration = Duration::from_secs(15);

/// A request of the gate that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DockerdError {
    #[error("cannot connect to the Docker engine")]
    Connect(#[from] std::io::Error),
    #[error("incomplete or invalid response from the Docker engine")]
    Response(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the Docker engine did not respond in time")]
    Timeout,
    #[error("the Docker engine responded with status {0}")]
    Status(StatusCode),
}

/// A client of the dockerd behind a unix socket.
#[derive(Clone, Debug)]
pub(crate) struct Dockerd {
    socket: PathBuf,
}

impl Dockerd {
    /// Makes a client of the dockerd that listens on `socket`; connects per request.
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Requests a JSON document.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, DockerdError> {
        self.get_with_headers(path, HeaderMap::new(), REQUEST_TIMEOUT).await
    }

    /// Requests a JSON document with additional headers and another time limit.
    pub(crate) async fn get_with_headers<T: DeserializeOwned>(
        &self,
        path: &str,
        headers: HeaderMap,
        limit: Duration,
    ) -> Result<T, DockerdError> {
        let request = self.request(Method::GET, path, headers);
        let body = within(limit, request).await?;
        serde_json::from_slice(&body).map_err(|error| DockerdError::Response(error.into()))
    }

    /// Sends a `DELETE`.
    pub(crate) async fn delete(&self, path: &str) -> Result<(), DockerdError> {
        let request = self.request(Method::DELETE, path, HeaderMap::new());
        within(REQUEST_TIMEOUT, request).await.map(drop)
    }

    /// Requests a stream, of which only the arrival of something new counts.
    pub(crate) async fn stream(&self, path: &str) -> Result<Stream, DockerdError> {
        within(REQUEST_TIMEOUT, self.send(Method::GET, path, HeaderMap::new())).await.map(Stream)
    }

    async fn request(&self, method: Method, path: &str, headers: HeaderMap) -> Result<Bytes, DockerdError> {
        let body = self.send(method, path, headers).await?;
        // Names and labels in a response come from users and images, so its length is bounded like any other input.
        let body = Limited::new(body, MAX_RESPONSE).collect().await.map_err(DockerdError::Response)?;
        Ok(body.to_bytes())
    }

    /// Sends a request and returns the body of a successful response.
    async fn send(&self, method: Method, path: &str, headers: HeaderMap) -> Result<Incoming, DockerdError> {
        let broken = |error: hyper::Error| DockerdError::Response(error.into());
        let stream = UnixStream::connect(&self.socket).await?;
        let (mut sender, connection) = client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // The task ends when `sender` is dropped, so a timeout of the caller closes the connection, too.
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            // Without a version in front dockerd uses its own, whichever engine the image brings.
            .uri(path)
            // Go's server refuses HTTP/1.1 without it.
            .header("host", "docker")
            .body(Empty::<Bytes>::new())
            .map_err(|error| DockerdError::Response(error.into()))?;
        request.headers_mut().extend(headers);
        let response = sender.send_request(request).await.map_err(broken)?;
        if !response.status().is_success() {
            return Err(DockerdError::Status(response.status()));
        }
        Ok(response.into_body())
    }
}

/// Waits for a request at most this long.
async fn within<T>(limit: Duration, request: impl Future<Output = Result<T, DockerdError>>) -> Result<T, DockerdError> {
    timeout(limit, request).await.map_err(|_| DockerdError::Timeout)?
}

/// The body of a response that goes on.
pub(crate) struct Stream(Incoming);

impl Stream {
    /// Waits for more; false at the end.
    pub(crate) async fn next(&mut self) -> bool {
        matches!(self.0.frame().await, Some(Ok(_)))
    }
}

/// Percent-encodes a name so that it is exactly one segment of a path.
pub(crate) fn encode_segment(name: &str) -> String {
    rules::encode(name, b"_.-")
}

#[cfg(test)]
mod tests {
    use super::encode_segment;

    #[test]
    fn a_name_cannot_break_out_of_its_path_segment() {
        assert_eq!(encode_segment("a/../b?c"), "a%2F..%2Fb%3Fc");
    }
}
