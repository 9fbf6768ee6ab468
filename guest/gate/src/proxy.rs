//! One client connection: checks its requests where the rules say so, and streams everything else through.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::{
    HeaderMap, Method, Request, Response, Uri, Version,
    body::{Body as HttpBody, Frame, Incoming, SizeHint},
    header::{self, HeaderValue},
    http::request,
    server,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, time::timeout};

use crate::{
    create_with_socket,
    dockerd::Dockerd,
    error::ProxyError,
    forward::forward,
    gate::{Caller, Gate},
    half_close::{HalfCloseStream, InFlight, InFlightGuard},
    refresh::FileRefresh,
    response::{self, Body},
    rules::{self, Inspection, Refusal, Verified},
};

/// Maximum length of a body that is inspected, in bytes; a create request is a few KiB.
const MAX_INSPECTED_BODY: usize = 4 * 1024 * 1024;

/// Limit for reading the rest of a refused request; clients stop when they have read the response.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// A response body that counts as in flight until its last byte is taken.
#[derive(Debug)]
struct TrackedBody {
    body: Body,
    _guard: InFlightGuard,
}

impl HttpBody for TrackedBody {
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
pub async fn serve_connection(gate: Arc<Gate>, stream: UnixStream, caller: Caller) {
    let in_flight = InFlight::default();
    let service = service_fn(|request| {
        // Counted from here to the last byte of the response, see `half_close`.
        let (gate, caller, guard) = (Arc::clone(&gate), caller.clone(), in_flight.enter());
        async move {
            let response = handle(&gate, &caller, request).await.unwrap_or_else(|error| error.response());
            Ok::<_, Infallible>(response.map(|body| TrackedBody { body, _guard: guard }))
        }
    });
    let io = TokioIo::new(HalfCloseStream::new(stream, in_flight.clone()));
    // hyper follows RFC 9112, section 6.3: chunks win over a length, whose header is removed, and two different lengths
    // end the connection. So dockerd cannot see a second, unchecked request where the gate saw a body. The error is
    // dropped because clients break off all the time.
    let _ = server::conn::http1::Builder::new().serve_connection(io, service).with_upgrades().await;
}

/// Refuses the requests that are never passed on, whatever their body.
fn check_route(gate: &Gate, caller: &Caller, parts: &request::Parts, segments: &[String]) -> Result<(), ProxyError> {
    // The target of CONNECT is not a path, so that none of the rules would apply to it.
    if parts.method == Method::CONNECT {
        return Err(ProxyError::Connect);
    }
    // For any method, since dockerd has only POST at this path.
    if gate.block_load && matches!(segments, [images, load] if images == "images" && load == "load") {
        return Err(Refusal::Load.into());
    }
    if let (Caller::Container(_), Some(list)) = (caller, &gate.sockets.commands) {
        // Go reads parameters from bodies of two types, `application/x-www-form-urlencoded` and `multipart/form-data`.
        // The test is wider than that on purpose: in doubt the request counts as both commands of its route.
        let form = |kind: &HeaderValue| kind.as_bytes().to_ascii_lowercase().windows(4).any(|part| part == b"form");
        let info = rules::RequestInfo {
            method: parts.method.as_str(),
            segments,
            query: parts.uri.query().unwrap_or_default(),
            form_body: parts.headers.get_all(header::CONTENT_TYPE).iter().any(form),
        };
        if !rules::permits(list, info) {
            // Docker documents the text with path and query as the client sent them.
            let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
            return Err(Refusal::Command(target.to_owned()).into());
        }
    }
    Ok(())
}

/// Reads and drops the rest of a refused request, in the background.
///
/// Without this the connection would be closed under a client that is still sending, and the reset would overtake the
/// response: the user would see "broken pipe" instead of the reason.
fn drain(mut body: Incoming) {
    tokio::spawn(timeout(DRAIN_TIMEOUT, async move { while let Some(Ok(_)) = body.frame().await {} }));
}

/// Rewrites a container's request to the one spelling that was checked, and removes the wish for another protocol
/// from all routes where the Docker API does not switch.
fn canonicalise(parts: &mut request::Parts, segments: &[String]) {
    // dockerd's router cleans paths in its own way. With the canonical spelling there is nothing left to clean, and
    // no difference between the two ways that a container could exploit.
    let path = rules::canonical(parts.uri.path());
    let target = parts.uri.query().map_or_else(|| path.clone(), |query| format!("{path}?{query}"));
    // `canonical` encodes everything that a URI cannot hold, so the fallback is never taken; `/` is harmless.
    parts.uri = target.parse().unwrap_or_else(|_| Uri::from_static("/"));
    let hijacks = match segments {
        [only] => matches!(only.as_str(), "session" | "grpc"),
        [containers, _, attach, ..] if containers == "containers" => attach == "attach",
        [exec, _, start] => exec == "exec" && start == "start",
        _ => false,
    };
    // After an upgrade bytes pass unchecked. On any other route an upgrade that dockerd or one of its handlers came to
    // accept would be a tunnel past the list of commands.
    if !hijacks {
        parts.headers.remove(header::UPGRADE);
        parts.headers.remove(header::CONNECTION);
    }
}

async fn handle(gate: &Arc<Gate>, caller: &Caller, request: Request<Incoming>) -> Result<Response<Body>, ProxyError> {
    let (mut parts, body) = request.into_parts();
    let segments = rules::segments(parts.uri.path());
    if let Err(refusal) = check_route(gate, caller, &parts, &segments) {
        drain(body);
        return Err(refusal);
    }
    let refreshed = match FileRefresh::of(gate.isolation, &parts.method, &segments) {
        Some(refresh) => refresh.before_request(&gate.upstream).await,
        None => None,
    };
    let environment = rules::is_container_create(&segments).then(|| Arc::clone(&gate.environment));
    let environment = environment.filter(|environment| !environment.is_empty());
    let mut socket = None;
    let body = match (Inspection::of(gate.isolation, &segments), environment) {
        (None, None) => response::streamed(body),
        (inspection, environment) => {
            let verified = inspect(inspection, environment, body).await?;
            socket = verified.socket;
            // The body has another length now, and it is sent whole and not in chunks.
            parts.headers.remove(header::TRANSFER_ENCODING);
            parts.headers.insert(header::CONTENT_LENGTH, verified.body.len().into());
            response::full(verified.body)
        }
    };
    // A target can be an absolute URI (`POST http://x/containers/create`). Only path and query were checked, so only
    // they are passed on.
    parts.uri = parts.uri.path_and_query().map_or_else(|| Uri::from_static("/"), |target| target.clone().into());
    if matches!(caller, Caller::Container(_)) {
        canonicalise(&mut parts, &segments);
    }
    // The version is that of this connection, not of the client's.
    parts.version = Version::HTTP_11;
    // hyper has answered `Expect: 100-continue` itself, when the body was first read.
    parts.headers.remove(header::EXPECT);
    // An HTTP/1.0 client need not send one, and Go's server refuses HTTP/1.1 without.
    parts.headers.entry(header::HOST).or_insert(header::HeaderValue::from_static("docker"));
    let tag_refresh = tag_refresh(gate, &parts, &segments);
    let request = Request::from_parts(parts, body);
    let response = match socket {
        Some(socket_request) => create_with_socket::create(gate, socket_request, request).await?,
        None => forward(gate, caller, request).await?,
    };
    // The pull goes on while its response streams; asking the registry meanwhile delays no client.
    if let Some(tag_refresh) = tag_refresh.filter(|_| response.status().is_success()) {
        tokio::spawn(tag_refresh);
    }
    // The response to an upload comes after the last byte was written, so the container sees the files from here on.
    if let Some(container) = refreshed.filter(|container| container.changed) {
        container.after_request().await;
    }
    Ok(response)
}

/// Returns the question to a registry that a pull of a listed tag raises, with the pull's credentials.
fn tag_refresh(
    gate: &Arc<Gate>,
    parts: &request::Parts,
    segments: &[String],
) -> Option<impl Future<Output = ()> + use<>> {
    let reference = rules::pulled_image(segments, parts.uri.query().unwrap_or_default())?;
    let listed = gate.sockets.images.listed_tag(&reference)?;
    let mut credentials = HeaderMap::new();
    if let Some(value) = parts.headers.get("x-registry-auth") {
        credentials.insert("x-registry-auth", value.clone());
    }
    let gate = Arc::clone(gate);
    Some(async move { gate.sockets.images.refresh_tag(&Dockerd::new(&gate.upstream), listed, credentials).await })
}

/// Reads a body that has to be inspected.
async fn read_body(mut body: Incoming) -> Result<Bytes, ProxyError> {
    match Limited::new(&mut body, MAX_INSPECTED_BODY).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            drain(body);
            Err(ProxyError::BodyTooLong)
        }
        Err(_) => Err(ProxyError::IncompleteBody),
    }
}

/// Checks a body and adds the environment to it.
async fn inspect(
    inspection: Option<Inspection>,
    environment: Option<Arc<[String]>>,
    body: Incoming,
) -> Result<Verified, ProxyError> {
    let bytes = read_body(body).await?;
    // The rules follow links in the file system, which can block, and 4 MiB of JSON take a moment.
    let verified = tokio::task::spawn_blocking(move || {
        let unchecked = Verified { body: bytes.clone(), socket: None };
        let verified = inspection.map_or(Ok(unchecked), |inspection| inspection.judge(bytes))?;
        match environment {
            // An empty body creates nothing. dockerd's error about it is clearer than one about JSON.
            Some(environment) if !verified.body.iter().all(u8::is_ascii_whitespace) => {
                let body = Bytes::from(rules::environment::add(&verified.body, &environment)?);
                Ok::<_, Refusal>(Verified { body, ..verified })
            }
            _ => Ok(verified),
        }
    })
    .await;
    Ok(verified.map_err(ProxyError::InspectionAborted)??)
}
