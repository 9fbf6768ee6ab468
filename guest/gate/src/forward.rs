//! A request passed on to dockerd, and its response passed back.

use hyper::{HeaderMap, Request, Response, StatusCode, Version, client, header};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use crate::{
    error::ProxyError,
    gate::{Caller, Gate},
    hijack,
    response::{self, Body},
};

/// Passes a request on and its answer back.
pub(crate) async fn forward(
    gate: &Gate,
    caller: &Caller,
    mut request: Request<Body>,
) -> Result<Response<Body>, ProxyError> {
    let stream = UnixStream::connect(&gate.upstream).await.map_err(ProxyError::Unreachable)?;
    let handshake = client::conn::http1::Builder::new().handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(ProxyError::Disconnected)?;
    tokio::spawn(connection.with_upgrades());
    let client_side = hyper::upgrade::on(&mut request);
    let mut response = sender.send_request(request).await.map_err(ProxyError::Disconnected)?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let engine_side = hyper::upgrade::on(&mut response);
        let caller = caller.clone();
        tokio::spawn(async move {
            // A broken stream is the normal end of many an attach.
            tokio::select! {
                _ = hijack::tunnel(client_side, engine_side) => {}
                () = caller.gone() => {}
            }
        });
    } else if is_raw_stream(response.headers()) {
        // Without an upgrade dockerd answers attach and exec with bytes up to the end of the connection; the answer
        // must stay without chunks, as it is in HTTP/1.0.
        *response.version_mut() = Version::HTTP_10;
    }
    Ok(response.map(response::streamed))
}

/// Whether the body has no framing of its own and is a container's output.
fn is_raw_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map_or(&b""[..], header::HeaderValue::as_bytes);
    kind.starts_with(b"application/vnd.docker.")
        && !headers.contains_key(header::CONTENT_LENGTH)
        && !headers.contains_key(header::TRANSFER_ENCODING)
}
