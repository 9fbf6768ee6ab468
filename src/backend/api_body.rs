//! The body of a request of the control API, read within bounds.

use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::{
    StatusCode,
    body::{Bytes, Incoming},
};
use tokio::time::timeout;

use super::api::MAX_BODY;

/// Time for the whole body of a request to arrive.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Reads a body of bounded length in a bounded time; returns the code and the reason to refuse any other.
pub async fn read(body: Incoming) -> Result<Bytes, (StatusCode, String)> {
    match timeout(TIMEOUT, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err((StatusCode::PAYLOAD_TOO_LARGE, format!("the body is longer than {MAX_BODY} bytes")))
        }
        Ok(Err(_)) => Err((StatusCode::BAD_REQUEST, "cannot read the body".to_owned())),
        Err(_) => Err((StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time".to_owned())),
    }
}
