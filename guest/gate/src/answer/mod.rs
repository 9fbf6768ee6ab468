//! Answers of dockerd on their way to the client: paths of shares as they are on the host.
//!
//! dockerd has a source of a mount by its path in the VM. A client sees the one that it named: in documents that describe
//! containers, volumes and services, and in error messages. Answers of all other kinds pass as they are.

mod json;

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{
    HeaderMap, Method, Response,
    body::{Body as HttpBody, Frame, SizeHint},
    header,
};
use json::Filter;
pub(crate) use json::Places;

use crate::{
    error::ProxyError,
    response::{self, Body},
};

/// Longest answer that is filtered as a whole, so that it keeps a length, in bytes. Errors are short, and so are most
/// descriptions.
const MAX_COLLECTED: u64 = 64 * 1024;

/// A body of which each frame goes through a filter.
#[derive(Debug)]
struct FilteredBody {
    body: Body,
    filter: Filter,
}

impl HttpBody for FilteredBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = &mut *self;
        loop {
            match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) => {
                        let filtered = this.filter.push(&bytes);
                        // A frame can be all of what the filter still holds back.
                        if !filtered.is_empty() {
                            return Poll::Ready(Some(Ok(Frame::data(filtered.into()))));
                        }
                    }
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => {
                    let rest = this.filter.finish();
                    return Poll::Ready((!rest.is_empty()).then(|| Ok(Frame::data(rest.into()))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream() && self.filter.holds_nothing()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// Returns true for a body that is JSON, as it is.
fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).map_or(&b""[..], header::HeaderValue::as_bytes);
    kind.starts_with(b"application/json") && !headers.contains_key(header::CONTENT_ENCODING)
}

/// Shows the host's paths in an answer: in a document that has them in these places, and in an error.
pub(crate) async fn show_host_paths(
    method: &Method,
    places: Places,
    response: Response<Body>,
) -> Result<Response<Body>, ProxyError> {
    let places = if response.status().is_success() { places } else { Places::Error };
    if places == Places::None || *method == Method::HEAD || !is_json(response.headers()) {
        return Ok(response);
    }
    let (mut parts, body) = response.into_parts();
    let length = body.size_hint().exact();
    let body = FilteredBody { body, filter: Filter::new(places) };
    // The length is another one now.
    parts.headers.remove(header::CONTENT_LENGTH);
    if length.is_some_and(|length| length <= MAX_COLLECTED) {
        let bytes = body.collect().await.map_err(ProxyError::Disconnected)?.to_bytes();
        parts.headers.insert(header::CONTENT_LENGTH, bytes.len().into());
        return Ok(Response::from_parts(parts, response::full(bytes)));
    }
    // hyper sends it in chunks.
    Ok(Response::from_parts(parts, body.boxed()))
}
