//! Answers of the gate itself, in the engine's form: a JSON object with one key, `message`.

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{Response, StatusCode, body::Incoming, header};

/// The body of any answer.
pub(crate) type Body = BoxBody<Bytes, hyper::Error>;

/// A body whose bytes are at hand.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// A body that streams from the other side.
pub(crate) fn streamed(body: Incoming) -> Body {
    body.boxed()
}

/// An error answer.
pub(crate) fn error(status: StatusCode, message: &str) -> Response<Body> {
    let text = serde_json::json!({ "message": message }).to_string();
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}
