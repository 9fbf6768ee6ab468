//! Making a container that would have the engine's socket.

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::{Request, Response, StatusCode};

use crate::{
    dockerd::{Dockerd, DockerdError},
    error::ProxyError,
    forward::forward,
    gate::{Caller, Gate},
    images::{self, SocketGrant},
    response::{self, Body},
    rules::{Refusal, SocketRequest},
};

/// Longest answer to `POST /containers/create`, in bytes.
const MAX_RESPONSE: usize = 1024 * 1024;

/// Judges the image, lets the engine make the container, judges the image that it really has, and keeps the reason.
///
/// The name could mean another image between the question and the making; the container's own never changes.
pub(crate) async fn create(
    gate: &Gate,
    requested: SocketRequest,
    request: Request<Body>,
) -> Result<Response<Body>, ProxyError> {
    let refusal = || ProxyError::Refused(Refusal::socket(&requested.image));
    let dockerd = Dockerd::new(&gate.upstream);
    if requested.explicit {
        if gate.sockets.images.is_empty() {
            return Err(refusal());
        }
        // An image that is not there is the engine's to miss: clients pull it then.
        if let Some(image) = images::find(&dockerd, &requested.image).await.map_err(ProxyError::SocketCheck)?
            && gate.sockets.images.find_grant(&dockerd, &image).await.map_err(ProxyError::SocketCheck)?.is_none()
        {
            return Err(refusal());
        }
    }
    let response = forward(gate, &Caller::Host, request).await?;
    if response.status() != StatusCode::CREATED {
        return Ok(response);
    }
    let (parts, body) = response.into_parts();
    let body = Limited::new(body, MAX_RESPONSE).collect().await.map_err(|_| ProxyError::InvalidResponse)?.to_bytes();
    let id = id_of(&body).ok_or(ProxyError::InvalidResponse)?;
    let kept = match reason(gate, &dockerd, &id).await {
        Ok(Some(reason)) => gate.sockets.record(&id, &reason).map_err(ProxyError::SaveGrant),
        Ok(None) => Err(refusal()),
        Err(error) => Err(ProxyError::SocketCheck(error)),
    };
    match kept {
        Err(error) if requested.explicit => {
            if let Err(error) = dockerd.delete(&format!("/containers/{id}?force=true&v=true")).await {
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
async fn reason(gate: &Gate, dockerd: &Dockerd, id: &str) -> Result<Option<SocketGrant>, DockerdError> {
    if gate.sockets.images.is_empty() {
        return Ok(None);
    }
    let container: serde_json::Value = dockerd.get(&format!("/containers/{id}/json")).await?;
    let Some(image) = container["Image"].as_str() else { return Ok(None) };
    match images::find(dockerd, image).await? {
        Some(image) => gate.sockets.images.find_grant(dockerd, &image).await,
        None => Ok(None),
    }
}
