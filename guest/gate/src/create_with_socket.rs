//! Creation of a container that mounts, or could inherit, the engine's socket.

use bulkhead_guest_common::error::chain;
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

/// Maximum length of the response to `POST /containers/create`, in bytes.
const MAX_RESPONSE: usize = 1024 * 1024;

/// Checks the image, lets dockerd create the container, checks the image that it really has, and saves the grant.
///
/// A name can be moved to another image between the first check and the creation (`docker tag` in a loop); the image
/// of a container never changes, so the second check is the one that counts. The first only avoids the creation of a
/// container that would be removed again.
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
        // A missing image is reported by dockerd as ever (404), which makes clients pull it and try again.
        if let Some(image) = images::find(&dockerd, &requested.image).await.map_err(ProxyError::SocketCheck)?
            && gate.sockets.images.find_grant(&dockerd, &image).await.map_err(ProxyError::SocketCheck)?.is_none()
        {
            return Err(refusal());
        }
    }
    // The caller does not matter here: dockerd never switches protocols for this request.
    let response = forward(gate, &Caller::Host, request).await?;
    if response.status() != StatusCode::CREATED {
        return Ok(response);
    }
    // The client must not see the ID before the grant is saved: it would start the container at once.
    let (parts, body) = response.into_parts();
    let body = Limited::new(body, MAX_RESPONSE).collect().await.map_err(|_| ProxyError::InvalidResponse)?.to_bytes();
    let id = container_id(&body).ok_or(ProxyError::InvalidResponse)?;
    let saved = match grant_for(gate, &dockerd, &id).await {
        Ok(Some(grant)) => gate.sockets.save_grant(&id, &grant).map_err(ProxyError::SaveGrant),
        Ok(None) => Err(refusal()),
        Err(error) => Err(ProxyError::SocketCheck(error)),
    };
    match saved {
        Err(error) if requested.explicit => {
            // `v` removes the anonymous volumes that came with the container.
            if let Err(error) = dockerd.delete(&format!("/containers/{id}?force=true&v=true")).await {
                // Harmless: without a grant the runtime refuses every start of it.
                eprintln!("cannot remove container {id}, which may not use the Docker socket: {}", chain(&error));
            }
            Err(error)
        }
        // `VolumesFrom` names a container that may have no socket at all. If it does, the runtime asks for a grant at
        // the start, finds none here, and the start fails.
        _ => Ok(Response::from_parts(parts, response::full(body))),
    }
}

fn container_id(body: &Bytes) -> Option<String> {
    let answer: serde_json::Value = serde_json::from_slice(body).ok()?;
    // The ID becomes part of paths, so it has to have exactly the form of one.
    answer["Id"].as_str().filter(|id| bulkhead_protocol::is_container_id(id)).map(ToOwned::to_owned)
}

/// Returns the grant of a container by the image that it was created from.
async fn grant_for(gate: &Gate, dockerd: &Dockerd, id: &str) -> Result<Option<SocketGrant>, DockerdError> {
    if gate.sockets.images.is_empty() {
        return Ok(None);
    }
    let container: serde_json::Value = dockerd.get(&format!("/containers/{id}/json")).await?;
    // `Image` is the image's ID here; the name that the client gave is in `Config.Image`.
    let Some(image) = container["Image"].as_str() else { return Ok(None) };
    match images::find(dockerd, image).await? {
        Some(image) => gate.sockets.images.find_grant(dockerd, &image).await,
        None => Ok(None),
    }
}
