//! Making a container that would have the engine's socket.

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::{Request, Response, StatusCode};

use crate::{
    dockerd::{AskError, Engine},
    images::{self, Reason},
    proxy::{Gate, ProxyError, forward},
    response::{self, Body},
    rules::{Refusal, Wanted},
};

/// Longest answer to `POST /containers/create`, in bytes.
const ANSWER: usize = 1024 * 1024;

/// Judges the image, lets the engine make the container, judges the image that it really has, and keeps the reason.
///
/// The name could mean another image between the question and the making; the container's own never changes.
pub(crate) async fn create(gate: &Gate, wanted: Wanted, request: Request<Body>) -> Result<Response<Body>, ProxyError> {
    let refusal = || ProxyError::Refused(Refusal::socket(&wanted.image));
    let engine = Engine::new(&gate.upstream);
    if wanted.certain {
        if gate.sockets.images.is_empty() {
            return Err(refusal());
        }
        // An image that is not there is the engine's to miss: clients pull it then.
        if let Some(image) = images::find(&engine, &wanted.image).await.map_err(ProxyError::Unjudged)?
            && gate.sockets.images.judge(&engine, &image).await.map_err(ProxyError::Unjudged)?.is_none()
        {
            return Err(refusal());
        }
    }
    let response = forward(gate, &crate::proxy::Caller::Host, request).await?;
    if response.status() != StatusCode::CREATED {
        return Ok(response);
    }
    let (parts, body) = response.into_parts();
    let body = Limited::new(body, ANSWER).collect().await.map_err(|_| ProxyError::BrokenAnswer)?.to_bytes();
    let id = id_of(&body).ok_or(ProxyError::BrokenAnswer)?;
    let kept = match reason(gate, &engine, &id).await {
        Ok(Some(reason)) => gate.sockets.record(&id, &reason).map_err(ProxyError::Unkept),
        Ok(None) => Err(refusal()),
        Err(error) => Err(ProxyError::Unjudged(error)),
    };
    match kept {
        Err(error) if wanted.certain => {
            if let Err(error) = engine.delete(&format!("/containers/{id}?force=true&v=true")).await {
                // It can't be started: the runtime asks again.
                eprintln!("container {id} may not have the socket that it asks for, and stays: {error}");
            }
            Err(error)
        }
        // Without a socket it may yet be none that has one; the runtime asks if it has.
        _ => Ok(Response::from_parts(parts, response::full(body))),
    }
}

fn id_of(body: &Bytes) -> Option<String> {
    let answer: serde_json::Value = serde_json::from_slice(body).ok()?;
    answer["Id"].as_str().filter(|id| bulkhead_protocol::is_container_id(id)).map(ToOwned::to_owned)
}

/// Why the container may have the socket by the image that it was made of.
async fn reason(gate: &Gate, engine: &Engine, id: &str) -> Result<Option<Reason>, AskError> {
    if gate.sockets.images.is_empty() {
        return Ok(None);
    }
    let container: serde_json::Value = engine.get(&format!("/containers/{id}/json")).await?;
    let Some(image) = container["Image"].as_str() else { return Ok(None) };
    match images::find(engine, image).await? {
        Some(image) => gate.sockets.images.judge(engine, &image).await,
        None => Ok(None),
    }
}
