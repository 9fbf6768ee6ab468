//! Response bodies, and the error responses that the gate makes itself.

use bytes::Bytes;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{Response, StatusCode, body::Incoming, header};

/// The body of any request or response.
pub(crate) type Body = BoxBody<Bytes, hyper::Error>;

/// Makes a body of bytes in memory.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

/// Makes a body that streams from the other side, a frame at a time.
pub(crate) fn streamed(body: Incoming) -> Body {
    body.boxed()
}

/// Makes an error response in dockerd's form, `{"message": …}`, from which docker prints the text.
pub(crate) fn error(status: StatusCode, message: &str) -> Response<Body> {
    let text = serde_json::json!({ "message": message }).to_string();
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}
