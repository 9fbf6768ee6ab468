//! One client connection: checks its requests where the rules say so, and streams everything else through.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::{
    HeaderMap, Method, Request, Response, Uri, Version,
    body::{Body as HttpBody, Frame, Incoming, SizeHint},
    header,
    http::request,
    server,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use crate::{
    admission,
    answer::{self, Places},
    create_with_socket,
    dockerd::Dockerd,
    drain::drain,
    error::ProxyError,
    forward::forward,
    gate::{Caller, Gate},
    half_close::{HalfCloseStream, InFlight, InFlightGuard},
    response::{self, Body},
    rules::{
        self, Isolation, Refusal, Target,
        api::Route,
        source_places::{SourcePlaces, translate},
    },
    shares::SharedDirectories,
};

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

/// Refuses the requests that are never passed on, whatever their contents.
fn check_route(gate: &Gate, caller: &Caller, parts: &request::Parts, segments: &[String]) -> Result<(), ProxyError> {
    // The target of CONNECT is not a path, so that none of the rules would apply to it.
    if parts.method == Method::CONNECT {
        return Err(ProxyError::Connect);
    }
    // For any method, since dockerd has only POST at this path.
    if gate.block_load && matches!(segments, [images, load] if images == "images" && load == "load") {
        return Err(Refusal::Load.into());
    }
    if rules::api::is_checkpoint(parts.method.as_str(), segments) {
        return Err(Refusal::Checkpoint.into());
    }
    if let (Caller::Container(_), Some(list)) = (caller, &gate.sockets.commands) {
        let info = rules::RequestInfo {
            method: parts.method.as_str(),
            segments,
            query: parts.uri.query().unwrap_or_default(),
        };
        if !rules::permits(list, info) {
            // Docker documents the text with path and query as the client sent them.
            let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
            return Err(Refusal::Command(target.to_owned()).into());
        }
    }
    Ok(())
}

async fn handle(gate: &Arc<Gate>, caller: &Caller, request: Request<Incoming>) -> Result<Response<Body>, ProxyError> {
    let (parts, body) = request.into_parts();
    let target = Target::of(parts.uri.path());
    if let Err(refusal) = check_route(gate, caller, &parts, &target.segments) {
        drain(body);
        return Err(refusal);
    }
    let is_about_swarm = parts.method == Method::POST && target.segments.first().is_some_and(|first| first == "swarm");
    let method = parts.method.clone();
    let route = rules::api::find(method.as_str(), &target.segments).map(|found| found.route);
    let response = match gate.isolation {
        Isolation::On => isolated(gate, caller, parts, body, target).await,
        Isolation::Off => unchecked(gate, caller, parts, body, &target, route).await,
    };
    if is_about_swarm {
        gate.swarm_changed.notify_one();
    }
    // Also without shares: a container can be from a time when there were some.
    let places = route.map_or(Places::None, |route| route.shows_sources);
    answer::show_host_paths(&method, places, response?).await
}

/// Passes a request on as far as the table and the judges allow.
async fn isolated(
    gate: &Arc<Gate>,
    caller: &Caller,
    parts: request::Parts,
    body: Incoming,
    target: Target,
) -> Result<Response<Body>, ProxyError> {
    let tag_refresh = tag_refresh(gate, &parts, &target.segments);
    let admitted = match admission::admit(gate, &parts, target).await {
        Ok(admitted) => admitted,
        Err(refusal) => {
            drain(body);
            return Err(refusal);
        }
    };
    let passed = admitted.pass(gate, parts, body).await?;
    let response = match passed.socket {
        Some(requested) => create_with_socket::create(gate, requested, for_engine(passed.request)).await?,
        None => forward(gate, caller, for_engine(passed.request)).await?,
    };
    // The pull goes on while its response streams; asking the registry meanwhile delays no client.
    if let Some(tag_refresh) = tag_refresh.filter(|_| response.status().is_success()) {
        tokio::spawn(tag_refresh);
    }
    Ok(response)
}

/// Passes a request on as it is, apart from the environment of new containers, paths of the host and the parameters of
/// checkpoints.
async fn unchecked(
    gate: &Arc<Gate>,
    caller: &Caller,
    mut parts: request::Parts,
    body: Incoming,
    target: &Target,
    route: Option<&'static Route>,
) -> Result<Response<Body>, ProxyError> {
    let adds = rules::api::is_container_create(&target.segments) && !gate.environment.is_empty();
    let shares = gate.shares_for(route.map_or(SourcePlaces::None, |route| route.names_sources));
    let route = route.filter(|_| !shares.is_empty());
    let places = route.map_or(SourcePlaces::None, |route| route.names_sources);
    let body = if adds || !matches!(places, SourcePlaces::None | SourcePlaces::Filter) {
        let environment = if adds { Arc::clone(&gate.environment) } else { Arc::default() };
        let bytes = with_changes(environment, places, shares.clone(), admission::read_body(body).await?).await?;
        // The body has another length now, and it is sent whole and not in chunks.
        parts.headers.remove(header::TRANSFER_ENCODING);
        parts.headers.insert(header::CONTENT_LENGTH, bytes.len().into());
        response::full(bytes)
    } else {
        response::streamed(body)
    };
    // A target can be an absolute URI (`POST http://x/containers/create`). Only path and query are passed on.
    parts.uri = match rules::api::find("POST", &target.segments) {
        // `checkpoint-dir` is a path of the VM. The row has no parameters that dockerd reads.
        Some(found) if found.route.starts_container() => target.path().parse().unwrap_or_default(),
        _ if places == SourcePlaces::Filter => with_filter(&shares, &parts.uri, target, route),
        _ => path_and_query(&parts.uri),
    };
    forward(gate, caller, for_engine(Request::from_parts(parts, body))).await
}

fn path_and_query(uri: &Uri) -> Uri {
    uri.path_and_query().map_or_else(|| Uri::from_static("/"), |target| target.clone().into())
}

/// Returns the path and query of a list of containers, with a filter that finds sources by their paths on the host.
fn with_filter(shares: &SharedDirectories, uri: &Uri, target: &Target, route: Option<&'static Route>) -> Uri {
    let query = route.map(|route| rules::api::Query::read(route.parameters, uri.query().unwrap_or_default()));
    if let Some(Ok(mut query)) = query
        && admission::find_sources(&mut query, shares.shares())
        && let Ok(uri) = format!("{}?{}", target.path(), query.text()).parse()
    {
        return uri;
    }
    // It is dockerd's to refuse what cannot be read.
    path_and_query(uri)
}

/// Sets what every request to dockerd has.
fn for_engine(mut request: Request<Body>) -> Request<Body> {
    // The version is that of this connection, not of the client's.
    *request.version_mut() = Version::HTTP_11;
    // hyper has answered `Expect: 100-continue` itself, when the body was first read.
    request.headers_mut().remove(header::EXPECT);
    // An HTTP/1.0 client need not send one, and Go's server refuses HTTP/1.1 without.
    request.headers_mut().entry(header::HOST).or_insert(header::HeaderValue::from_static("docker"));
    request
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

/// Adds the environment to the body of a container's creation, and gives the sources in a body the VM's paths.
async fn with_changes(
    environment: Arc<[String]>,
    places: SourcePlaces,
    shares: SharedDirectories,
    body: Bytes,
) -> Result<Bytes, ProxyError> {
    // An empty body creates nothing. dockerd's error about it is clearer than one about JSON.
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(body);
    }
    let work = move || {
        let body = if environment.is_empty() { body } else { rules::environment::add(&body, &environment)?.into() };
        // Other bodies are dockerd's to refuse, and one without a share stays byte for byte.
        let Some(mut value) = serde_json::from_slice(&body).ok().filter(|_| places != SourcePlaces::None) else {
            return Ok(body);
        };
        let changed = translate(places, &mut value, &mut |path| shares.place(path, Isolation::Off))?;
        Ok::<_, Refusal>(if changed { value.to_string().into() } else { body })
    };
    // 4 MiB of JSON take a moment, and so can the shares' file system.
    Ok(tokio::task::spawn_blocking(work).await.map_err(ProxyError::InspectionAborted)??)
}
