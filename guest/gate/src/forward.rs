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

/// Sends a request to dockerd and returns the response, whose body streams.
///
/// If dockerd switches protocols, the client's connection and dockerd's are joined until both directions have ended or
/// `caller`'s socket is closed.
pub(crate) async fn forward(
    gate: &Gate,
    caller: &Caller,
    mut request: Request<Body>,
) -> Result<Response<Body>, ProxyError> {
    // One connection per request. dockerd is local, so this is cheap, and a response can never be taken for that of
    // another request or another client.
    let stream = UnixStream::connect(&gate.upstream).await.map_err(ProxyError::Unreachable)?;
    let handshake = client::conn::http1::Builder::new().handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(ProxyError::Disconnected)?;
    // This task moves the bytes. It ends with the connection, or hands it over when the protocol is switched.
    tokio::spawn(connection.with_upgrades());
    // The claim to the client's connection has to be taken before the request is consumed. It resolves once the 101
    // has been written to the client, and stays unused for any other status.
    let client_side = hyper::upgrade::on(&mut request);
    let mut response = sender.send_request(request).await.map_err(ProxyError::Disconnected)?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let dockerd_side = hyper::upgrade::on(&mut response);
        let caller = caller.clone();
        tokio::spawn(async move {
            tokio::select! {
                // An error here is a normal end of an attach: the client was interrupted or the container exited.
                _ = hijack::tunnel(client_side, dockerd_side) => {}
                // A removed container must not keep a shell into another one.
                () = caller.closed() => {}
            }
        });
    } else if is_raw_stream(response.headers()) {
        // Without an upgrade dockerd answers attach and exec with bytes up to the end of the connection. As an HTTP/1.1
        // response hyper would have to send them in chunks; HTTP/1.0 has no chunks, and clients expect none.
        *response.version_mut() = Version::HTTP_10;
    }
    Ok(response.map(response::streamed))
}

/// Returns true for the output of a container in a body without framing of its own.
fn is_raw_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map_or(&b""[..], header::HeaderValue::as_bytes);
    // `raw-stream` with a terminal, `multiplexed-stream` without.
    kind.starts_with(b"application/vnd.docker.")
        && !headers.contains_key(header::CONTENT_LENGTH)
        && !headers.contains_key(header::TRANSFER_ENCODING)
}
