//! The server of the control API on `control.sock`: HTTP/1.1 with JSON, for this user's processes only. [`super::api`]
//! has the messages, [`super::api_routes`] the routes.
//!
//! The socket has mode 0600 in a 0700 directory, and the peer's user id is checked as well. What is left is a client of
//! this user that misbehaves: connections, heads, bodies and the time for each are bounded.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper::{
    Request as HttpRequest, Response, StatusCode,
    body::{Body, Bytes, Frame, Incoming},
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, mpsc, oneshot, watch},
    task::{JoinSet, spawn_blocking},
    time::timeout,
};
use tracing::{debug, warn};

use super::{
    api::{Answer, Problem, StartOptions, Status, StopOptions},
    api_body,
    api_document::document,
    api_local::{self, LocalRequest},
    api_routes::{Found, Route, find},
    supervisor::Request,
};
use crate::settings::{Paths, same_kinds};

/// Media type of the answers but the events.
const JSON: &str = "application/json";

/// Connections at once.
const MAX_CONNECTIONS: usize = 64;

/// Time for the whole head of a request to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest head of a request in bytes.
const MAX_HEAD: usize = 16 * 1024;

/// Time for clients to read their last answers when the backend exits.
const EXIT_GRACE: Duration = Duration::from_secs(1);

/// The handlers' connection to the supervisor.
#[derive(Clone, Debug)]
pub(super) struct Api {
    /// The profile's files.
    pub paths: Paths,
    /// Requests to the supervisor.
    pub requests: mpsc::Sender<Request>,
    /// The supervisor's status.
    pub status: watch::Receiver<Status>,
}

/// Serves until `end` fires, then gives open answers a moment to finish.
pub(super) async fn serve(listener: UnixListener, api: Api, mut end: oneshot::Receiver<()>) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut end => break,
            // Finished tasks are collected as they come, or the set would grow with each request.
            Some(_) = connections.join_next() => {}
            accepted = accept(&listener, &permits) => {
                if let Some((stream, permit)) = accepted {
                    let api = api.clone();
                    connections.spawn(async move {
                        serve_connection(stream, api).await;
                        drop(permit);
                    });
                }
            }
        }
    }
    // A connection of `events` ends when the status has no sender left; the others after the answer in progress.
    drop(api);
    let _ = timeout(EXIT_GRACE, async { while connections.join_next().await.is_some() {} }).await;
}

/// Accepts a connection of this user; returns `None` for any other, and after an error.
async fn accept(
    listener: &UnixListener,
    permits: &Arc<Semaphore>,
) -> Option<(UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    // The permit first: a connection beyond the bound waits in the backlog and costs this process nothing.
    let permit = Arc::clone(permits).acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, _)) => {
            // The socket's mode keeps out every other user but root, who is refused here.
            let own = nix::unistd::geteuid().as_raw();
            if stream.peer_cred().is_ok_and(|peer| peer.uid() == own) {
                return Some((stream, permit));
            }
            warn!("refused a control connection of another user");
        }
        Err(error) => {
            // Without a pause, EMFILE would make this a busy loop.
            warn!("cannot accept a control connection: {error}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    None
}

async fn serve_connection(stream: UnixStream, api: Api) {
    let service = service_fn(move |request| {
        let api = api.clone();
        async move { Ok::<_, Infallible>(handle(request, api).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        debug!("control connection: {error}");
    }
}

type Reply = Response<ReplyBody>;

async fn handle(request: HttpRequest<Incoming>, api: Api) -> Reply {
    let (request, body) = request.into_parts();
    // First, also for a request that is refused: hyper closes a connection with an unread body, and the client would get an
    // error of its own writing in the place of the answer.
    let body = match api_body::read(body).await {
        Ok(body) => body,
        Err((code, reason)) => return problem(code, &reason),
    };
    let (route, key) = match find(&request.method, request.uri.path()) {
        Found::Route(route, key) => (route, key.to_owned()),
        Found::OtherMethod(allowed) => return wrong_method(&allowed),
        Found::Nothing => return problem(StatusCode::NOT_FOUND, "no such resource"),
    };
    match route {
        Route::Document => reply(StatusCode::OK, JSON, ReplyBody::Once(Some(document().into()))),
        Route::Status => json(StatusCode::OK, &*api.status.borrow()),
        Route::Events => events(api.status),
        Route::Ports => ports(&api).await,
        Route::Examination => examination(&api).await,
        Route::Share => follow_settings(&api, Request::Share).await,
        Route::PublishVmPorts => follow_settings(&api, Request::PublishVmPorts).await,
        Route::Start => change::<Box<StartOptions>>(&body, &api, Request::Start).await,
        Route::Stop => change::<StopOptions>(&body, &api, Request::Stop).await,
        Route::Restart => change::<StopOptions>(&body, &api, Request::Restart).await,
        Route::Usage
        | Route::Logs
        | Route::Settings
        | Route::Setting
        | Route::SetSetting
        | Route::UnsetSetting
        | Route::ValidatePolicy => {
            let query = request.uri.query().unwrap_or_default().to_owned();
            local(LocalRequest { key, query, body }, &api, route).await
        }
    }
}

/// Answers what needs no VM, in a thread: this process has one thread of its own, which must not wait for files.
async fn local(request: LocalRequest, api: &Api, route: Route) -> Reply {
    let (paths, status) = (api.paths.clone(), api.status.borrow().clone());
    match spawn_blocking(move || api_local::answer(&paths, &status, route, &request)).await {
        Ok(Some((code, body))) => reply(code, JSON, ReplyBody::Once(Some(body))),
        Ok(None) | Err(_) => problem(StatusCode::INTERNAL_SERVER_ERROR, "the request could not be carried out"),
    }
}

/// Passes a request to the supervisor and returns its answer.
async fn change<T: DeserializeOwned + Serialize + Default>(
    body: &[u8],
    api: &Api,
    make: fn(T, oneshot::Sender<Answer>) -> Request,
) -> Reply {
    let options = match parse(body) {
        Ok(options) => options,
        Err(error) => return problem(StatusCode::BAD_REQUEST, &format!("invalid body: {error}")),
    };
    // The supervisor answers when it has accepted the request, not when the engine is up or down: that is in the
    // events.
    ask(api, |reply| make(options, reply)).await.map_or_else(ending, |answer| json(StatusCode::OK, &answer))
}

/// Passes a request to the supervisor and returns its answer; `None` if it ends before it answers.
async fn ask<T>(api: &Api, make: impl FnOnce(oneshot::Sender<T>) -> Request) -> Option<T> {
    let (reply, answer) = oneshot::channel();
    api.requests.send(make(reply)).await.ok()?;
    answer.await.ok()
}

async fn ports(api: &Api) -> Reply {
    ask(api, Request::Ports).await.map_or_else(ending, |ports| json(StatusCode::OK, &ports))
}

async fn examination(api: &Api) -> Reply {
    let (reply, answer) = oneshot::channel();
    if api.requests.send(Request::Examine(reply)).await.is_err() {
        return ending();
    }
    match answer.await {
        Ok(examination) => json(StatusCode::OK, &examination),
        // The supervisor dropped the reply because it has no VM.
        Err(_) => problem(StatusCode::CONFLICT, "no VM is running"),
    }
}

/// Asks the running VM to follow a setting that has changed; an error is the reason that it does not.
async fn follow_settings<T: Serialize>(
    api: &Api,
    request: impl FnOnce(oneshot::Sender<Result<T, String>>) -> Request,
) -> Reply {
    match ask(api, request).await {
        Some(Ok(outcome)) => json(StatusCode::OK, &outcome),
        Some(Err(reason)) => problem(StatusCode::INTERNAL_SERVER_ERROR, &reason),
        None => ending(),
    }
}

fn ending() -> Reply {
    problem(StatusCode::SERVICE_UNAVAILABLE, "the backend is shutting down")
}

/// Parses a body; an empty one asks for the defaults.
fn parse<T: DeserializeOwned + Serialize + Default>(body: &[u8]) -> Result<T, serde_json::Error> {
    if body.is_empty() {
        return Ok(T::default());
    }
    let given: Value = serde_json::from_slice(body)?;
    let options: T = serde_json::from_value(given.clone())?;
    same_kinds(&serde_json::to_value(&options)?, &given).map_err(serde::de::Error::custom)?;
    Ok(options)
}

/// Sends a line now and after each change; a slow reader gets fewer lines, never old ones.
fn events(mut status: watch::Receiver<Status>) -> Reply {
    // One line of buffer: the status is read when the reader is ready for it, so changes in between are merged.
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            let line = line(&*status.borrow_and_update());
            if sender.send(line).await.is_err() {
                return;
            }
            tokio::select! {
                changed = status.changed() => if changed.is_err() { return },
                // The client is gone; without this the task would stay until the next change.
                () = sender.closed() => return,
            }
        }
    });
    reply(StatusCode::OK, "application/x-ndjson", ReplyBody::Events(receiver))
}

fn line<T: Serialize>(value: &T) -> Bytes {
    let mut text = serde_json::to_vec(value).unwrap_or_default();
    text.push(b'\n');
    text.into()
}

fn json<T: Serialize>(code: StatusCode, value: &T) -> Reply {
    reply(code, JSON, ReplyBody::Once(Some(line(value))))
}

fn problem(code: StatusCode, message: &str) -> Reply {
    json(code, &Problem { message: message.to_owned() })
}

fn wrong_method(allowed: &str) -> Reply {
    let mut reply = problem(StatusCode::METHOD_NOT_ALLOWED, &format!("use {allowed}"));
    if let Ok(allowed) = allowed.parse() {
        reply.headers_mut().insert(ALLOW, allowed);
    }
    reply
}

fn reply(code: StatusCode, kind: &'static str, body: ReplyBody) -> Reply {
    let mut reply = Response::new(body);
    *reply.status_mut() = code;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    reply
}

/// The body of a reply: one piece, or lines as they come.
#[derive(Debug)]
enum ReplyBody {
    Once(Option<Bytes>),
    Events(mpsc::Receiver<Bytes>),
}

impl Body for ReplyBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Once(piece) => Poll::Ready(piece.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Events(receiver) => receiver.poll_recv(context).map(|line| line.map(|bytes| Ok(Frame::data(bytes)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_body_asks_for_the_defaults_and_garbage_does_not() {
        assert_eq!(parse::<StopOptions>(b"").unwrap(), StopOptions::default());
        assert!(parse::<StopOptions>(b"{").is_err());
        assert!(parse::<StopOptions>(b"[]garbage").is_err());
    }

    #[test]
    fn an_array_is_no_object_at_any_depth() {
        for body in ["[]", "[false,null]"] {
            assert!(parse::<StopOptions>(body.as_bytes()).is_err(), "{body}");
        }
        for body in [r#"{"proxy":[null,null]}"#, r#"{"proxy":[]}"#] {
            assert!(parse::<StartOptions>(body.as_bytes()).is_err(), "{body}");
        }
        assert!(parse::<StartOptions>(br#"{"proxy":{"http":null},"cpus":2}"#).is_ok());
    }

    proptest! {
        #[test]
        fn what_a_client_asks_for_is_what_is_read(force: bool, seconds in prop::option::of(any::<u64>())) {
            let options = StopOptions { force, timeout_seconds: seconds };
            prop_assert_eq!(parse::<StopOptions>(&serde_json::to_vec(&options).unwrap()).unwrap(), options);
        }
    }
}
