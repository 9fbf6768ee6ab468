//! The requests that the page may make, and the origin of each answer: the backend, the engine, or, while the profile has
//! no backend, this process.
//!
//! An allow list. A path that is passed on is made here, from parts that were checked: this is never a general proxy.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http_body_util::{BodyExt, Limited};
use hyper::{
    Method, StatusCode, Uri,
    body::{Bytes, Frame},
};
use serde::Serialize;
use tokio::{
    sync::mpsc,
    task::spawn_blocking,
    time::{sleep, timeout},
};

use super::server::{Body, Reply, problem, reply, stream};
use crate::{
    backend::{
        api::{Answer, Outcome, Ports},
        api_document::document,
        api_local::{self, LocalRequest},
        api_routes::{Found, Route, find},
        launch::Mode,
    },
    cli::{
        CliError,
        client::{Client, ClientError, request_to, send},
        start, status,
    },
    settings::Paths,
};
use bulkhead_ipc::report::chain;

/// Time for an answer to begin.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest answer of the engine in bytes. The guest decides how long it is.
const MAX_ENGINE_ANSWER: usize = 4 << 20;

/// Time between two looks for a backend, while there is none.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

const JSON: &str = "application/json";
const LINES: &str = "application/x-ndjson";

/// The routes of the control API that the page has.
fn is_allowed(route: Route) -> bool {
    match route {
        Route::Document
        | Route::Status
        | Route::Events
        | Route::Ports
        | Route::Usage
        | Route::Logs
        | Route::Settings
        | Route::Setting
        | Route::SetSetting
        | Route::UnsetSetting
        | Route::ValidatePolicy
        | Route::Start
        | Route::Stop
        | Route::Restart => true,
        // A diagnosis has addresses of the guest's kernel, and the page changes neither shares nor ports of a
        // running engine.
        Route::Examination | Route::Share | Route::PublishVmPorts => false,
    }
}

/// Answers a request with a session.
pub(super) async fn answer(paths: &Paths, method: &Method, uri: &Uri, body: Bytes) -> Reply {
    let path = uri.path();
    let done = if let Some(engine) = engine_path(method, path) {
        ask_engine(paths, &engine).await
    } else {
        match find(method, path) {
            Found::Route(route, key) if is_allowed(route) => {
                let query = uri.query().unwrap_or_default().to_owned();
                ask_backend(paths, route, method, path, LocalRequest { key: key.to_owned(), query, body }).await
            }
            Found::OtherMethod(_) => Ok(problem(StatusCode::METHOD_NOT_ALLOWED, "the page has no such request")),
            _ => Ok(problem(StatusCode::NOT_FOUND, "the page has no such resource")),
        }
    };
    done.unwrap_or_else(|error| problem(StatusCode::BAD_GATEWAY, &chain(&error)))
}

/// The path of the Docker Engine API behind a path of the page; `None` for any but the two that it needs.
fn engine_path(method: &Method, path: &str) -> Option<String> {
    let rest = path.strip_prefix("/docker/containers").filter(|_| *method == Method::GET)?;
    if rest.is_empty() {
        return Some("/containers/json?all=1&limit=200".into());
    }
    // The processes of a container, with their user ids in the VM, which show the container's range.
    let id = rest.strip_prefix('/')?.strip_suffix("/processes")?;
    let is_id = id.len() == 64 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    is_id.then(|| format!("/containers/{id}/top?ps_args=-eo%20pid,uid"))
}

async fn ask_engine(paths: &Paths, path: &str) -> Result<Reply, CliError> {
    let socket = paths.docker_socket();
    if !socket.exists() {
        return Ok(problem(StatusCode::SERVICE_UNAVAILABLE, "the engine is not running"));
    }
    let uri = Uri::try_from(path).map_err(|error| CliError::Failed(error.to_string()))?;
    let ask = async {
        let response = send(&socket, request_to(uri, Method::GET, Bytes::new())).await?;
        let code = response.status();
        let body = Limited::new(response.into_body(), MAX_ENGINE_ANSWER).collect().await;
        Ok::<_, ClientError>((code, body.map_err(|_| ClientError::Body)?.to_bytes()))
    };
    let (code, body) = timeout(ANSWER_TIMEOUT, ask).await.unwrap_or(Err(ClientError::Timeout))?;
    // Read as JSON and written again: nothing that the guest sends reaches the browser as it is.
    match serde_json::from_slice::<serde_json::Value>(&body) {
        Ok(value) => json(code, &value),
        Err(_) => Ok(problem(StatusCode::BAD_GATEWAY, "the engine's answer is not JSON")),
    }
}

async fn ask_backend(
    paths: &Paths,
    route: Route,
    method: &Method,
    path: &str,
    request: LocalRequest,
) -> Result<Reply, CliError> {
    // The options of a start are those of `bulkhead start` in this command's environment, which the page cannot know.
    let options = start::Machine::default().options()?;
    let Some(client) = Client::connect(paths).await? else {
        return match route {
            Route::Start | Route::Restart => {
                start::ensure_backend(paths, &options, Mode::Detached).await?;
                let client = Client::connect(paths).await?;
                let client = client.ok_or_else(|| CliError::Failed("the backend has ended again".into()))?;
                json(StatusCode::OK, &client.start(&options).await?)
            }
            _ => without_backend(paths, route, request).await,
        };
    };
    if route == Route::Start {
        return json(StatusCode::OK, &client.start(&options).await?);
    }
    let target = if request.query.is_empty() { path.to_owned() } else { format!("{path}?{}", request.query) };
    let uri = Uri::try_from(target).map_err(|error| CliError::Failed(error.to_string()))?;
    let socket = paths.control_socket();
    let sent = send(&socket, request_to(uri, method.clone(), request.body));
    let response = timeout(ANSWER_TIMEOUT, sent).await.unwrap_or(Err(ClientError::Timeout))?;
    let kind = if route == Route::Events { LINES } else { JSON };
    Ok(stream(response.status(), kind, response.into_body().boxed_unsync()))
}

/// Answers while the profile has no backend, as one without a VM would.
async fn without_backend(paths: &Paths, route: Route, request: LocalRequest) -> Result<Reply, CliError> {
    match route {
        Route::Document => Ok(reply(StatusCode::OK, JSON, document().into())),
        Route::Status => json(StatusCode::OK, &status::read(paths).await?),
        Route::Events => Ok(stream(StatusCode::OK, LINES, until_there(paths.clone()))),
        Route::Ports => json(StatusCode::OK, &Ports::default()),
        // Nothing runs that could be stopped.
        Route::Stop => json(StatusCode::OK, &Answer { outcome: Outcome::Already, boot: 0 }),
        _ => {
            let status = status::read(paths).await?;
            let paths = paths.clone();
            let done = spawn_blocking(move || api_local::answer(&paths, &status, route, &request)).await;
            match done {
                Ok(Some((code, body))) => Ok(reply(code, JSON, body)),
                Ok(None) | Err(_) => Ok(problem(StatusCode::SERVICE_UNAVAILABLE, "the engine is not running")),
            }
        }
    }
}

/// The status without a backend: a line after each change, until a backend has the next.
fn until_there(paths: Paths) -> Body {
    let (sender, receiver) = mpsc::channel::<Bytes>(1);
    tokio::spawn(async move {
        let mut last = None;
        loop {
            let Ok(None) = Client::connect(&paths).await else { return };
            let Ok(status) = status::read(&paths).await else { return };
            if last.as_ref() != Some(&status) {
                let Ok(mut line) = serde_json::to_vec(&status) else { return };
                line.push(b'\n');
                if sender.send(line.into()).await.is_err() {
                    return;
                }
                last = Some(status);
            }
            tokio::select! {
                () = sleep(POLL_INTERVAL) => {}
                () = sender.closed() => return,
            }
        }
    });
    Lines(receiver).map_err(|never| match never {}).boxed_unsync()
}

/// A body of lines as they come.
#[derive(Debug)]
struct Lines(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.get_mut().0.poll_recv(context).map(|line| line.map(|bytes| Ok(Frame::data(bytes))))
    }
}

fn json<T: Serialize>(code: StatusCode, value: &T) -> Result<Reply, CliError> {
    Ok(reply(code, JSON, serde_json::to_vec(value).map_err(ClientError::from)?.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_two_routes_lead_to_the_engine_and_only_to_read() {
        let id = "0123456789abcdef".repeat(4);
        let engine = |method: Method, path: &str| engine_path(&method, path);
        assert_eq!(engine(Method::GET, "/docker/containers").unwrap(), "/containers/json?all=1&limit=200");
        let processes = format!("/docker/containers/{id}/processes");
        assert_eq!(engine(Method::GET, &processes).unwrap(), format!("/containers/{id}/top?ps_args=-eo%20pid,uid"));
        for method in [Method::POST, Method::PUT, Method::DELETE, Method::HEAD] {
            assert_eq!(engine(method, "/docker/containers"), None);
        }
        for path in [
            "/docker/images",
            "/docker/containers/",
            "/docker/containers/json",
            "/docker/containers/../images/processes",
            "/docker/containers/web/processes",
            &format!("/docker/containers/{id}/json"),
            &format!("/docker/containers/{id}/top"),
            &format!("/docker/containers/{id}/processes/"),
            &format!("/docker/containers/{}/processes", id.to_uppercase()),
            "/containers/json",
        ] {
            assert_eq!(engine(Method::GET, path), None, "{path}");
        }
    }
}
