//! Requests while isolation is on: what of a request is passed on, once the table of routes and the judges agree.

use std::sync::Arc;

use bulkhead_policy::shares::Shares;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::{
    HeaderMap, Method, Request,
    body::{Body as _, Incoming},
    header,
    http::request,
};
use serde_json::Value;

use crate::{
    drain::drain,
    error::ProxyError,
    gate::Gate,
    in_use,
    response::{self, Body},
    rules::{
        Isolation, Refusal, SocketRequest, Target,
        api::{self, Found, Judge, Query, Route},
        environment, headers,
        source_places::{FILTERS, SourcePlaces, extend_filters, translate},
    },
};

/// Maximum length of a body that is read, in bytes; a create request is a few KiB.
pub(crate) const MAX_BODY: usize = 4 * 1024 * 1024;

/// Length from which a body is read and judged on a thread of its own, in bytes. Below it takes less time than a change
/// of threads.
const LONG_BODY: usize = 64 * 1024;

/// A request whose head has passed.
#[derive(Debug)]
pub(crate) struct Admitted {
    route: &'static Route,
    /// Path and query to send.
    target: String,
}

/// A request as it is passed on.
#[derive(Debug)]
pub(crate) struct Passed {
    pub(crate) request: Request<Body>,
    /// The container asks, or may ask, for the engine's socket, so that its image decides.
    pub(crate) socket: Option<SocketRequest>,
}

/// Judges the head of a request, and asks dockerd about the container whose files it will open.
pub(crate) async fn admit(gate: &Gate, parts: &request::Parts, mut target: Target) -> Result<Admitted, ProxyError> {
    let unknown = || Refusal::Route { method: parts.method.to_string(), path: target.path() };
    let found = api::find(parts.method.as_str(), &target.segments).ok_or_else(unknown)?;
    let route = found.route;
    let mut query = Query::read(route.parameters, parts.uri.query().unwrap_or_default())?;
    if let Judge::Query(judge) = route.judge {
        query.judge(route.parameters, judge)?;
    }
    if route.names_sources == SourcePlaces::Filter {
        find_sources(&mut query, gate.shares().shares());
    }
    if route.joins_network {
        in_use::network(gate, &found.name.join("/")).await?;
    }
    if let Some(container) = found.opened_container(&query) {
        let judged = in_use::judge(gate, &container, route.opens_files).await?;
        // From here on the container that was judged is meant, whatever its name is.
        target = name_container(found, target.clone(), &mut query, &judged);
    }
    let (path, query) = (target.path(), query.text());
    let target = if query.is_empty() { path } else { format!("{path}?{query}") };
    Ok(Admitted { route, target })
}

/// Lets a filter find the sources of mounts by their paths on the host, and returns true if it has changed.
pub(crate) fn find_sources(query: &mut Query, shares: &Shares) -> bool {
    let extended = query.first(FILTERS).and_then(|filters| extend_filters(filters, shares));
    extended.inspect(|filters| query.set(FILTERS, filters)).is_some()
}

/// Puts the ID of a container in the place of its name.
fn name_container(found: Found<'_>, target: Target, query: &mut Query, id: &str) -> Target {
    match found.route.opens_files {
        api::OpensFiles::No => {}
        api::OpensFiles::OfParameter(parameter) => query.set(parameter, id),
        api::OpensFiles::OfPath | api::OpensFiles::AtStart => {
            let segments = found.route.path.with_name(id).split('/').map(ToOwned::to_owned).collect();
            return target.with_segments(segments);
        }
    }
    target
}

impl Admitted {
    /// Reads and judges the body where the route has JSON, and makes the request to pass on.
    pub(crate) async fn pass(
        &self,
        gate: &Gate,
        mut parts: request::Parts,
        body: Incoming,
    ) -> Result<Passed, ProxyError> {
        let mut kept = headers::kept(&parts.headers, self.route);
        let mut socket = None;
        let body = match self.route.body {
            api::Body::Stream => response::streamed(body),
            api::Body::None => {
                if !body.is_end_stream() {
                    drain(body);
                }
                with_length(&mut kept, &parts.method, Bytes::new())
            }
            api::Body::Json(shape) => {
                let (bytes, requested) = self.judged(gate, shape, body).await?;
                socket = requested;
                with_length(&mut kept, &parts.method, bytes)
            }
        };
        parts.headers = kept;
        // Path and query are encoded, so that this cannot fail; `/` is harmless.
        parts.uri = self.target.parse().unwrap_or_else(|_| hyper::Uri::from_static("/"));
        Ok(Passed { request: Request::from_parts(parts, body), socket })
    }

    /// Reads a body, and returns the one to pass on.
    async fn judged(
        &self,
        gate: &Gate,
        shape: &'static api::Shape,
        body: Incoming,
    ) -> Result<(Bytes, Option<SocketRequest>), ProxyError> {
        let bytes = read_body(body).await?;
        if bytes.iter().all(u8::is_ascii_whitespace) {
            // An empty body names nothing. dockerd's error about it is clearer than one about JSON.
            return Ok((bytes, None));
        }
        let (judge, vm) = (self.route.judge, gate.vm_network.clone());
        let environment = Arc::clone(&gate.environment);
        let places = self.route.names_sources;
        let shares = gate.shares_for(places);
        // A source is looked up in the file system.
        let long = bytes.len() > LONG_BODY || !shares.is_empty();
        let work = move || {
            let mut value = api::read(shape, &bytes)?;
            // First: the judges know the VM's paths.
            translate(places, &mut value, &mut |path| shares.place(path, Isolation::On))?;
            let socket = judge_body(judge, &mut value, &vm)?;
            if matches!(judge, Judge::Container) {
                environment::extend(&mut value, &environment);
            }
            Ok::<_, Refusal>((Bytes::from(value.to_string()), socket))
        };
        let judged =
            if long { tokio::task::spawn_blocking(work).await.map_err(ProxyError::InspectionAborted)? } else { work() };
        Ok(judged?)
    }
}

fn judge_body(
    judge: Judge,
    value: &mut Value,
    vm: &bulkhead_policy::networks::VmNetwork,
) -> Result<Option<SocketRequest>, Refusal> {
    match judge {
        Judge::Container => crate::rules::judges::container::create(value),
        Judge::Body(judge) => judge(value).map(|()| None),
        Judge::Network(judge) => judge(value, vm).map(|()| None),
        Judge::None | Judge::Query(_) => Ok(None),
    }
}

/// Makes a body of bytes, and sets its length.
fn with_length(headers: &mut HeaderMap, method: &Method, bytes: Bytes) -> Body {
    if matches!(*method, Method::POST | Method::PUT) {
        headers.insert(header::CONTENT_LENGTH, bytes.len().into());
    }
    response::full(bytes)
}

/// Reads a body that has to be judged.
pub(crate) async fn read_body(mut body: Incoming) -> Result<Bytes, ProxyError> {
    match Limited::new(&mut body, MAX_BODY).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            drain(body);
            Err(ProxyError::BodyTooLong)
        }
        Err(_) => Err(ProxyError::IncompleteBody),
    }
}
