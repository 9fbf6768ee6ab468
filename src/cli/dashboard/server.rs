//! The server of the page: HTTP/1.1 on the loopback, with the same limits as the control API.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{
        CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, LOCATION, REFERRER_POLICY,
        SET_COOKIE, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
    },
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::sleep,
};

use super::{
    access::{Access, Refusal},
    upstream,
};
use crate::{
    backend::{api::Problem, api_body},
    settings::Paths,
};

/// Connections at once. A browser opens six.
const MAX_CONNECTIONS: usize = 32;

/// Time for the whole head of a request to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest head of a request in bytes.
const MAX_HEAD: usize = 16 * 1024;

/// Everything comes from this server, nothing is inline, and the page can be in no frame. Scripts cannot make elements
/// from text.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; \
                      trusted-types 'none'";

/// Headers of every answer.
const HEADERS: [(HeaderName, &str); 7] = [
    (CONTENT_SECURITY_POLICY, POLICY),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (X_FRAME_OPTIONS, "DENY"),
    (REFERRER_POLICY, "no-referrer"),
    (CACHE_CONTROL, "no-store"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// The files of the page, with their media types.
const FILES: [(&str, &str, &str); 12] = [
    ("/", "text/html; charset=utf-8", include_str!("page/index.html")),
    ("/style.css", "text/css; charset=utf-8", include_str!("page/style.css")),
    ("/icon.svg", "image/svg+xml", include_str!("page/icon.svg")),
    ("/lock.svg", "image/svg+xml", include_str!("page/lock.svg")),
    ("/main.js", "text/javascript; charset=utf-8", include_str!("page/main.js")),
    ("/api.js", "text/javascript; charset=utf-8", include_str!("page/api.js")),
    ("/dom.js", "text/javascript; charset=utf-8", include_str!("page/dom.js")),
    ("/overview.js", "text/javascript; charset=utf-8", include_str!("page/overview.js")),
    ("/containers.js", "text/javascript; charset=utf-8", include_str!("page/containers.js")),
    ("/logs.js", "text/javascript; charset=utf-8", include_str!("page/logs.js")),
    ("/settings.js", "text/javascript; charset=utf-8", include_str!("page/settings.js")),
    ("/policy.js", "text/javascript; charset=utf-8", include_str!("page/policy.js")),
];

/// The body of an answer.
pub(super) type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// An answer.
pub(super) type Reply = Response<Body>;

/// One page, for one user and one profile.
#[derive(Debug)]
pub(super) struct Site {
    pub(super) access: Access,
    pub(super) paths: Paths,
}

/// Serves until no connection has been open for the time `idle`. An open page has one, for its events.
pub(super) async fn serve(listener: TcpListener, site: Arc<Site>, idle: Duration) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            // A connection beyond the bound waits in the backlog.
            accepted = listener.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, client)) => {
                    connections.spawn(serve_connection(stream, client, Arc::clone(&site)));
                }
                // Without a pause, EMFILE would make this a busy loop.
                Err(_) => sleep(Duration::from_millis(100)).await,
            },
            () = sleep(idle), if connections.is_empty() => return,
        }
    }
}

async fn serve_connection(stream: TcpStream, client: SocketAddr, site: Arc<Site>) {
    // Another user's connection is closed without an answer, and so is one that is gone already.
    if !site.access.is_own(client).unwrap_or_default() {
        return;
    }
    let service = service_fn(move |request| {
        let site = Arc::clone(&site);
        async move { Ok::<_, Infallible>(answer(request, &site).await) }
    });
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

async fn answer(request: Request<Incoming>, site: &Site) -> Reply {
    let mut reply = match site.access.permit_origin(request.method(), request.headers()) {
        Ok(()) => route(request, site).await,
        Err(refusal) => refuse(refusal),
    };
    for (name, value) in HEADERS {
        reply.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    reply
}

async fn route(request: Request<Incoming>, site: &Site) -> Reply {
    let path = request.uri().path();
    if request.method() == Method::GET {
        if path == "/open" {
            return open(&request, site);
        }
        // The files are the same for everybody. A page without a session says so by itself.
        if let Some((_, kind, text)) = FILES.iter().find(|(name, ..)| *name == path) {
            return reply(StatusCode::OK, kind, Bytes::from_static(text.as_bytes()));
        }
    }
    if let Err(refusal) = site.access.permit_session(request.headers()) {
        return refuse(refusal);
    }
    let (head, body) = request.into_parts();
    let body = match api_body::read(body).await {
        Ok(body) => body,
        Err((code, reason)) => return problem(code, &reason),
    };
    upstream::answer(&site.paths, &head.method, &head.uri, body).await
}

/// Exchanges the token for a session and leads to the page, whose address has no secret in it.
fn open(request: &Request<Incoming>, site: &Site) -> Reply {
    let token = request.uri().query().and_then(|query| query.strip_prefix("token=")).unwrap_or_default();
    let cookie = match site.access.redeem(token) {
        Ok(cookie) => HeaderValue::from_str(&cookie).ok(),
        // The same browser came back to an address that it had used.
        Err(_) if site.access.permit_session(request.headers()).is_ok() => None,
        Err(refusal) => return text(StatusCode::FORBIDDEN, &refusal.to_string()),
    };
    let mut reply = text(StatusCode::SEE_OTHER, "");
    reply.headers_mut().insert(LOCATION, HeaderValue::from_static("/"));
    if let Some(cookie) = cookie {
        reply.headers_mut().insert(SET_COOKIE, cookie);
    }
    reply
}

fn refuse(refusal: Refusal) -> Reply {
    let code = if refusal == Refusal::Session { StatusCode::UNAUTHORIZED } else { StatusCode::FORBIDDEN };
    problem(code, &refusal.to_string())
}

/// An error as the control API has them.
pub(super) fn problem(code: StatusCode, message: &str) -> Reply {
    let body = serde_json::to_vec(&Problem { message: message.to_owned() }).unwrap_or_default();
    reply(code, "application/json", body.into())
}

fn text(code: StatusCode, text: &str) -> Reply {
    reply(code, "text/plain; charset=utf-8", text.to_owned().into())
}

/// An answer that is there as a whole.
pub(super) fn reply(code: StatusCode, kind: &'static str, body: Bytes) -> Reply {
    stream(code, kind, Full::new(body).map_err(|never| match never {}).boxed_unsync())
}

/// An answer that may come in pieces.
pub(super) fn stream(code: StatusCode, kind: &'static str, body: Body) -> Reply {
    let mut reply = Response::new(body);
    *reply.status_mut() = code;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    reply
}
