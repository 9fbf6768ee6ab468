//! The client of a backend's control API, and of the few requests that the command line makes to the engine.
//!
//! Each request has a connection of its own. Bodies are bounded, and so is the time for them: the backend is a process
//! of the same user, but the engine's answers come from the guest.

use std::{io, net::IpAddr, path::Path, time::Duration};

use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1,
    header::HOST,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, time::timeout};

use crate::{
    backend::{
        api::{
            Answer, Examination, MAX_ANSWER, MAX_STATUS, Ports, PortsAnswer, Problem, SharesOutcome, StartOptions,
            Status, StopOptions,
        },
        lock,
    },
    settings::Paths,
};

/// Time for any response but the stream of events.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// A request that failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("the backend (process {0}) does not respond; end it with `kill {0}`, then start the engine again")]
    Unresponsive(u32),
    #[error("cannot communicate with the backend")]
    Io(#[from] io::Error),
    #[error("cannot communicate with the backend")]
    Http(#[from] hyper::Error),
    #[error("the response is too long or incomplete")]
    Body,
    #[error("invalid response from the backend; it may be of another version: stop it and start it again")]
    Syntax(#[from] serde_json::Error),
    #[error("request refused: {0}")]
    Refused(String),
    #[error("no response within {} s", RESPONSE_TIMEOUT.as_secs())]
    Timeout,
}

/// A backend that listens.
#[derive(Debug)]
pub(super) struct Client<'a> {
    paths: &'a Paths,
}

impl<'a> Client<'a> {
    /// Connects to the profile's backend; `None` if none is listening.
    pub(super) async fn connect(paths: &'a Paths) -> Result<Option<Self>, ClientError> {
        // Only a probe: each request connects again.
        match UnixStream::connect(paths.control_socket()).await {
            Ok(_) => Ok(Some(Self { paths })),
            // A backend that was killed leaves a socket without a listener.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn status(&self) -> Result<Status, ClientError> {
        self.ask::<(), _>(Method::GET, "/v1/status", None).await
    }

    pub(super) async fn ports(&self) -> Result<Ports, ClientError> {
        self.ask::<(), _>(Method::GET, "/v1/ports", None).await
    }

    /// The state of the VM's CPUs and threads; takes some seconds.
    pub(super) async fn examination(&self) -> Result<Examination, ClientError> {
        self.ask::<(), _>(Method::GET, "/v1/examination", None).await
    }

    pub(super) async fn start(&self, options: &StartOptions) -> Result<Answer, ClientError> {
        self.ask(Method::POST, "/v1/start", Some(options)).await
    }

    pub(super) async fn stop(&self, options: &StopOptions) -> Result<Answer, ClientError> {
        self.ask(Method::POST, "/v1/stop", Some(options)).await
    }

    pub(super) async fn restart(&self, options: &StopOptions) -> Result<Answer, ClientError> {
        self.ask(Method::POST, "/v1/restart", Some(options)).await
    }

    /// Makes a running engine share the directories of the settings.
    pub(super) async fn share(&self) -> Result<SharesOutcome, ClientError> {
        self.ask::<(), _>(Method::POST, "/v1/shares", None).await
    }

    /// Makes a running VM publish the ports of the setting `vmPorts`.
    pub(super) async fn publish_vm_ports(&self) -> Result<PortsAnswer, ClientError> {
        self.ask::<(), _>(Method::POST, "/v1/ports", None).await
    }

    /// The status now and after each change.
    pub(super) async fn events(&self) -> Result<Events, ClientError> {
        let request = request(Method::GET, "/v1/events", Bytes::new());
        let response = self.bounded(send(&self.paths.control_socket(), request)).await?;
        Ok(Events { body: response.into_body(), buffer: Vec::new() })
    }

    async fn ask<T: Serialize, R: DeserializeOwned>(
        &self,
        method: Method,
        path: &'static str,
        body: Option<&T>,
    ) -> Result<R, ClientError> {
        let body = match body {
            Some(body) => serde_json::to_vec(body)?.into(),
            None => Bytes::new(),
        };
        self.bounded(async {
            let response = send(&self.paths.control_socket(), request(method, path, body)).await?;
            let code = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(|_| ClientError::Body)?;
            let body = body.to_bytes();
            if code == StatusCode::OK {
                return Ok(serde_json::from_slice(&body)?);
            }
            // A backend of another version may have another body for its errors.
            let problem = serde_json::from_slice(&body).map(|problem: Problem| problem.message);
            Err(ClientError::Refused(problem.unwrap_or_else(|_| code.to_string())))
        })
        .await
    }

    async fn bounded<T>(&self, answer: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
        match timeout(RESPONSE_TIMEOUT, answer).await {
            Ok(answer) => answer,
            // The holder of the lock is the process to end, if any.
            Err(_) => Err(lock::holder(self.paths).map_or(ClientError::Timeout, ClientError::Unresponsive)),
        }
    }
}

fn request(method: Method, path: &'static str, body: Bytes) -> Request<Full<Bytes>> {
    request_to(hyper::Uri::from_static(path), method, body)
}

/// A request without headers but the host's.
pub(super) fn request_to(uri: hyper::Uri, method: Method, body: Bytes) -> Request<Full<Bytes>> {
    // Not by `Request::builder`, which returns an error that cannot occur here.
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    request.headers_mut().insert(HOST, hyper::header::HeaderValue::from_static("bulkhead"));
    request
}

/// Sends one request over a connection of its own.
pub(super) async fn send(socket: &Path, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, ClientError> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // The connection task ends with the response's body. Its errors also reach the request.
    tokio::spawn(connection);
    Ok(sender.send_request(request).await?)
}

/// Sends one real request to the engine; a ready one responds with status 200 and `OK`.
pub(super) async fn ping(socket: &Path) -> Result<(), ClientError> {
    let response = send(socket, request(Method::GET, "/_ping", Bytes::new())).await?;
    let code = response.status();
    let body = Limited::new(response.into_body(), MAX_STATUS).collect().await.map_err(|_| ClientError::Body)?;
    let body = body.to_bytes();
    // Neither is true of the backend's own response, which it gives while there is no engine.
    if code == StatusCode::OK && body.as_ref() == b"OK" {
        return Ok(());
    }
    // For a terminal, from the guest.
    let text: String = String::from_utf8_lossy(&body).chars().filter(|character| !character.is_control()).collect();
    Err(ClientError::Refused(format!("{code} {text}")))
}

/// Longest response of the engine in bytes.
const MAX_LIST: usize = 16 << 20;

/// A running container in the engine's list.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) name: String,
    /// Its addresses in all networks.
    pub(super) addresses: Vec<IpAddr>,
}

/// The engine's running containers.
pub(super) async fn containers(socket: &Path) -> Result<Vec<Container>, ClientError> {
    let answer = async {
        let response = send(socket, request(Method::GET, "/containers/json", Bytes::new())).await?;
        let body = Limited::new(response.into_body(), MAX_LIST).collect().await.map_err(|_| ClientError::Body)?;
        Ok(listed(&body.to_bytes())?)
    };
    timeout(RESPONSE_TIMEOUT, answer).await.unwrap_or(Err(ClientError::Timeout))
}

/// Parses the response to `GET /containers/json` of the Docker Engine API.
fn listed(body: &[u8]) -> Result<Vec<Container>, serde_json::Error> {
    let list: Vec<serde_json::Value> = serde_json::from_slice(body)?;
    let container = |one: &serde_json::Value| {
        let name = one["Names"][0].as_str()?.trim_start_matches('/');
        let networks = one["NetworkSettings"]["Networks"].as_object()?.values();
        let addresses = networks.flat_map(|network| [&network["IPAddress"], &network["GlobalIPv6Address"]]);
        Some(Container {
            // The engine restricts names, but the guest decides what is sent: no control character may reach a
            // terminal.
            name: name.chars().filter(|character| !character.is_control()).collect(),
            addresses: addresses.filter_map(|address| address.as_str()?.parse().ok()).collect(),
        })
    };
    // An entry that is not as expected is left out; the others are as good without it.
    Ok(list.iter().filter_map(container).collect())
}

/// Most containers whose runtime is read: each is a request of its own.
const MAX_INSPECTED: usize = 500;

/// The names of containers with the runtime `runc`, which were created while isolation was off.
pub(super) async fn made_without_isolation(socket: &Path) -> Result<Vec<String>, ClientError> {
    let read = async |uri: hyper::Uri| {
        let response = send(socket, request_to(uri, Method::GET, Bytes::new())).await?;
        let body = Limited::new(response.into_body(), MAX_LIST).collect().await.map_err(|_| ClientError::Body)?;
        Ok::<serde_json::Value, ClientError>(serde_json::from_slice(&body.to_bytes())?)
    };
    let answer = async {
        let list = read(hyper::Uri::from_static("/containers/json?all=1")).await?;
        let ids = list.as_array().into_iter().flatten().filter_map(|one| one["Id"].as_str()).take(MAX_INSPECTED);
        let mut names = Vec::new();
        // The ID becomes a part of a path, so it is checked to be one.
        for id in ids.filter(|id| id.bytes().all(|byte| byte.is_ascii_hexdigit())) {
            let Ok(uri) = format!("/containers/{id}/json").parse() else { continue };
            names.extend(name_without_isolation(&read(uri).await?));
        }
        Ok(names)
    };
    timeout(RESPONSE_TIMEOUT, answer).await.unwrap_or(Err(ClientError::Timeout))
}

/// Parses the response to `GET /containers/ID/json`. A container that was removed meanwhile has neither key.
fn name_without_isolation(container: &serde_json::Value) -> Option<String> {
    // With isolation on, the gate sets `sysbox-runc`; `runc` is left from a time when it was off.
    let name = container["Name"].as_str().filter(|_| container["HostConfig"]["Runtime"] == "runc")?;
    Some(name.trim_start_matches('/').chars().filter(|character| !character.is_control()).collect())
}

/// The stream of `GET /v1/events`.
#[derive(Debug)]
pub(super) struct Events {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Events {
    /// The next status; `None` once the backend has exited.
    pub(super) async fn next(&mut self) -> Result<Option<Status>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Ok(Some(serde_json::from_slice(&line)?));
            }
            if self.buffer.len() > MAX_STATUS {
                return Err(ClientError::Body);
            }
            // A frame is a piece of the stream and has nothing to do with lines.
            match self.body.frame().await {
                Some(Ok(frame)) => self.buffer.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data)),
                // A backend that is killed ends the stream with an error.
                Some(Err(_)) | None => return Ok(None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_has_its_name_and_the_addresses_of_all_its_networks() {
        let body = br#"[{"Names": ["/web\u001b"], "NetworkSettings": {"Networks": {
            "bridge": {"IPAddress": "172.17.0.2", "GlobalIPv6Address": ""},
            "six": {"IPAddress": "", "GlobalIPv6Address": "fd00::2"}}}}, {"Names": []}]"#;
        let containers = listed(body).unwrap();
        assert_eq!(containers.len(), 1);
        assert_eq!(containers[0].name, "web");
        let expected: [IpAddr; 2] = ["172.17.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        assert_eq!(containers[0].addresses, expected);
    }

    #[test]
    fn a_container_made_with_runc_is_one_from_before_isolation() {
        let container =
            |runtime: &str| serde_json::json!({ "Name": "/old\u{1b}", "HostConfig": { "Runtime": runtime } });
        assert_eq!(name_without_isolation(&container("runc")).as_deref(), Some("old"));
        assert_eq!(name_without_isolation(&container("sysbox-runc")), None);
        assert_eq!(name_without_isolation(&serde_json::json!({ "message": "No such container" })), None);
    }
}
