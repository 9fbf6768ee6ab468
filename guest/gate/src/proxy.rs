//! One client connection: requests inspected where the policy says so, everything else streamed through.

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

/// Longest body that is inspected, in bytes; a create request is a few KiB.
const MAX_INSPECTED_BODY: usize = 4 * 1024 * 1024;

/// How long a refused request may go on; clients stop when they have read the answer.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// A body that counts as in flight until its last byte is taken.
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
        let (gate, caller, guard) = (Arc::clone(&gate), caller.clone(), in_flight.enter());
        async move {
            let response = handle(&gate, &caller, request).await.unwrap_or_else(|error| error.answer());
            Ok::<_, Infallible>(response.map(|body| TrackedBody { body, _guard: guard }))
        }
    });
    let io = TokioIo::new(HalfCloseStream::new(stream, in_flight.clone()));
    // A client that breaks off is no news.
    let _ = server::conn::http1::Builder::new().serve_connection(io, service).with_upgrades().await;
}

/// Refuses what is never passed on, whatever its body.
fn check_route(gate: &Gate, caller: &Caller, parts: &request::Parts, segments: &[String]) -> Result<(), ProxyError> {
    if parts.method == Method::CONNECT {
        return Err(ProxyError::Connect);
    }
    if gate.block_load && matches!(segments, [images, load] if images == "images" && load == "load") {
        return Err(Refusal::Load.into());
    }
    if let (Caller::Container(_), Some(list)) = (caller, &gate.sockets.commands) {
        let form = |kind: &HeaderValue| kind.as_bytes().to_ascii_lowercase().windows(4).any(|part| part == b"form");
        let info = rules::RequestInfo {
            method: parts.method.as_str(),
            segments,
            query: parts.uri.query().unwrap_or_default(),
            form_body: parts.headers.get_all(header::CONTENT_TYPE).iter().any(form),
        };
        if !rules::permits(list, info) {
            let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
            return Err(Refusal::Command(target.to_owned()).into());
        }
    }
    Ok(())
}

/// Takes the rest of a refused request: a client that is still sending would find its connection closed, and not the
/// answer.
fn drain(mut body: Incoming) {
    tokio::spawn(timeout(DRAIN_TIMEOUT, async move { while let Some(Ok(_)) = body.frame().await {} }));
}

/// What a container asks for reaches the engine in the one spelling that was judged, and becomes another protocol only
/// where the Docker API has one.
fn canonicalise(parts: &mut request::Parts, segments: &[String]) {
    let path = rules::canonical(parts.uri.path());
    let target = parts.uri.query().map_or_else(|| path.clone(), |query| format!("{path}?{query}"));
    parts.uri = target.parse().unwrap_or_else(|_| Uri::from_static("/"));
    let hijacks = match segments {
        [only] => matches!(only.as_str(), "session" | "grpc"),
        [containers, _, attach, ..] if containers == "containers" => attach == "attach",
        [exec, _, start] => exec == "exec" && start == "start",
        _ => false,
    };
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
    let files = match FileRefresh::of(gate.isolation, &parts.method, &segments) {
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
            parts.headers.remove(header::TRANSFER_ENCODING);
            parts.headers.insert(header::CONTENT_LENGTH, verified.body.len().into());
            response::full(verified.body)
        }
    };
    // Only what was inspected goes on: path and query, whatever form the target had.
    parts.uri = parts.uri.path_and_query().map_or_else(|| Uri::from_static("/"), |target| target.clone().into());
    if matches!(caller, Caller::Container(_)) {
        canonicalise(&mut parts, &segments);
    }
    parts.version = Version::HTTP_11;
    // The server side of this gate has answered it.
    parts.headers.remove(header::EXPECT);
    parts.headers.entry(header::HOST).or_insert(header::HeaderValue::from_static("docker"));
    let pulled = pulled(gate, &parts, &segments);
    let request = Request::from_parts(parts, body);
    let response = match socket {
        Some(socket_request) => create_with_socket::create(gate, socket_request, request).await?,
        None => forward(gate, caller, request).await?,
    };
    if let Some(pulled) = pulled.filter(|_| response.status().is_success()) {
        tokio::spawn(pulled);
    }
    if let Some(files) = files.filter(|files| files.change) {
        files.after_request().await;
    }
    Ok(response)
}

/// The question to a registry that a pull raises.
fn pulled(gate: &Arc<Gate>, parts: &request::Parts, segments: &[String]) -> Option<impl Future<Output = ()> + use<>> {
    let reference = rules::pulled_image(segments, parts.uri.query().unwrap_or_default())?;
    let listed = gate.sockets.images.listed_tag(&reference)?;
    let mut credentials = HeaderMap::new();
    if let Some(value) = parts.headers.get("x-registry-auth") {
        credentials.insert("x-registry-auth", value.clone());
    }
    let gate = Arc::clone(gate);
    Some(async move { gate.sockets.images.refresh_tag(&Dockerd::new(&gate.upstream), listed, credentials).await })
}

/// A body that is short enough to be inspected.
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

async fn inspect(
    inspection: Option<Inspection>,
    environment: Option<Arc<[String]>>,
    body: Incoming,
) -> Result<Verified, ProxyError> {
    let bytes = read_body(body).await?;
    // Resolving links may wait for a file share.
    let verified = tokio::task::spawn_blocking(move || {
        let passed = Verified { body: bytes.clone(), socket: None };
        let verified = inspection.map_or(Ok(passed), |inspection| inspection.judge(bytes))?;
        match environment {
            // Nothing to create; the engine says so better.
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
