//! One client connection: requests inspected where the policy says so, everything else streamed through.

use std::{
    convert::Infallible,
    error::Error as _,
    path::PathBuf,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode, Uri, Version,
    body::{Body as HttpBody, Frame, Incoming, SizeHint},
    client, header, server,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use crate::{
    answer::{self, Body},
    hijack,
    linger::{Flight, InFlight, Linger},
    policy::{self, Inspection, Isolation, Refusal},
    refresh::Touch,
};

/// Longest body that is inspected, in bytes; a create request is a few KiB.
const INSPECTED: usize = 4 * 1024 * 1024;

/// What stands between clients and the engine.
#[derive(Debug)]
pub struct Gate {
    upstream: PathBuf,
    isolation: Isolation,
    environment: Arc<[String]>,
}

impl Gate {
    /// A gate in front of the engine that listens on the unix socket `upstream`.
    pub fn new(upstream: PathBuf, isolation: Isolation) -> Self {
        Self { upstream, isolation, environment: Arc::new([]) }
    }

    /// The same, with `NAME=VALUE`s that every new container has unless it is created with others.
    #[must_use]
    pub fn with_environment(self, environment: Vec<String>) -> Self {
        Self { environment: environment.into(), ..self }
    }
}

/// A body that counts as in flight until its last byte is taken.
#[derive(Debug)]
struct Tracked {
    body: Body,
    _flight: Flight,
}

impl HttpBody for Tracked {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Serves one client until it closes.
pub async fn serve_connection(gate: Arc<Gate>, stream: UnixStream) {
    let in_flight = InFlight::default();
    let service = service_fn(|request| {
        let (gate, flight) = (Arc::clone(&gate), in_flight.enter());
        async move {
            let response = handle(&gate, request).await.unwrap_or_else(|error| error.answer());
            Ok::<_, Infallible>(response.map(|body| Tracked { body, _flight: flight }))
        }
    });
    let io = TokioIo::new(Linger::new(stream, in_flight.clone()));
    // A client that breaks off is no news.
    let _ = server::conn::http1::Builder::new().serve_connection(io, service).with_upgrades().await;
}

/// Why the gate answers instead of the engine.
#[derive(Debug, thiserror::Error)]
enum ProxyError {
    #[error("the Docker API has no CONNECT")]
    Connect,
    #[error("the request's JSON is longer than 4 MiB")]
    TooLong,
    #[error("the request's body broke off")]
    BrokenBody,
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the request could not be inspected")]
    Uninspected(#[source] tokio::task::JoinError),
    #[error("the Docker engine is starting or restarting; try again in a moment")]
    NotReachable(#[source] std::io::Error),
    #[error("the Docker engine ended the connection without an answer")]
    BrokeOff(#[source] hyper::Error),
}

impl ProxyError {
    fn status(&self) -> StatusCode {
        match self {
            Self::Connect => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooLong => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BrokenBody | Self::Refused(Refusal::Malformed(_)) => StatusCode::BAD_REQUEST,
            Self::Refused(Refusal::SocketMount { .. } | Refusal::SocketVolume { .. }) => StatusCode::FORBIDDEN,
            Self::Uninspected(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::NotReachable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::BrokeOff(_) => StatusCode::BAD_GATEWAY,
        }
    }

    fn answer(&self) -> Response<Body> {
        if let Some(cause) = self.source() {
            eprintln!("{self}: {cause}");
        }
        answer::error(self.status(), &self.to_string())
    }
}

async fn handle(gate: &Gate, request: Request<Incoming>) -> Result<Response<Body>, ProxyError> {
    let (mut parts, body) = request.into_parts();
    if parts.method == Method::CONNECT {
        return Err(ProxyError::Connect);
    }
    let segments = policy::segments(parts.uri.path());
    let files = match Touch::of(gate.isolation, &parts.method, &segments) {
        Some(touch) => touch.begin(&gate.upstream).await,
        None => None,
    };
    let environment = policy::is_container_create(&segments).then(|| Arc::clone(&gate.environment));
    let environment = environment.filter(|environment| !environment.is_empty());
    let body = match (Inspection::of(gate.isolation, &segments), environment) {
        (None, None) => answer::streamed(body),
        (inspection, environment) => {
            let inspected = inspect(inspection, environment, body).await?;
            parts.headers.remove(header::TRANSFER_ENCODING);
            parts.headers.insert(header::CONTENT_LENGTH, inspected.len().into());
            answer::full(inspected)
        }
    };
    // Only what was inspected goes on: path and query, whatever form the target had.
    parts.uri = parts.uri.path_and_query().map_or_else(|| Uri::from_static("/"), |target| target.clone().into());
    parts.version = Version::HTTP_11;
    // The server side of this gate has answered it.
    parts.headers.remove(header::EXPECT);
    parts.headers.entry(header::HOST).or_insert(header::HeaderValue::from_static("docker"));
    let response = forward(gate, Request::from_parts(parts, body)).await?;
    if let Some(files) = files.filter(|files| files.change) {
        files.refresh().await;
    }
    Ok(response)
}

async fn inspect(
    inspection: Option<Inspection>,
    environment: Option<Arc<[String]>>,
    body: Incoming,
) -> Result<Bytes, ProxyError> {
    let collected = Limited::new(body, INSPECTED)
        .collect()
        .await
        .map_err(|error| if error.is::<LengthLimitError>() { ProxyError::TooLong } else { ProxyError::BrokenBody })?;
    let bytes = collected.to_bytes();
    // Resolving links may wait for a file share.
    let judged = tokio::task::spawn_blocking(move || {
        let bytes = inspection.map_or(Ok(bytes.clone()), |inspection| inspection.judge(bytes))?;
        match environment {
            // Nothing to create; the engine says so better.
            Some(environment) if !bytes.iter().all(u8::is_ascii_whitespace) => {
                policy::environment::add(&bytes, &environment).map(Bytes::from)
            }
            _ => Ok(bytes),
        }
    })
    .await;
    Ok(judged.map_err(ProxyError::Uninspected)??)
}

async fn forward(gate: &Gate, mut request: Request<Body>) -> Result<Response<Body>, ProxyError> {
    let stream = UnixStream::connect(&gate.upstream).await.map_err(ProxyError::NotReachable)?;
    let handshake = client::conn::http1::Builder::new().handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(ProxyError::BrokeOff)?;
    tokio::spawn(connection.with_upgrades());
    let client_side = hyper::upgrade::on(&mut request);
    let mut response = sender.send_request(request).await.map_err(ProxyError::BrokeOff)?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let engine_side = hyper::upgrade::on(&mut response);
        tokio::spawn(async move {
            // A broken stream is the normal end of many an attach.
            let _ = hijack::tunnel(client_side, engine_side).await;
        });
    } else if is_raw_stream(response.headers()) {
        // Without an upgrade dockerd answers attach and exec with bytes up to the end of the connection; the answer
        // must stay without chunks, as it is in HTTP/1.0.
        *response.version_mut() = Version::HTTP_10;
    }
    Ok(response.map(answer::streamed))
}

/// Whether the body has no framing of its own and is a container's output.
fn is_raw_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map_or(&b""[..], header::HeaderValue::as_bytes);
    kind.starts_with(b"application/vnd.docker.")
        && !headers.contains_key(header::CONTENT_LENGTH)
        && !headers.contains_key(header::TRANSFER_ENCODING)
}
