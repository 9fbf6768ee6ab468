//! The rest of a request that is refused before all of it has come.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::timeout;

/// Limit for reading the rest of a refused request; clients stop when they have read the response.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads and drops the rest of a refused request, in the background.
///
/// Without this the connection would be closed under a client that is still sending, and the reset would overtake the
/// response: the user would see "broken pipe" instead of the reason.
pub(crate) fn drain(mut body: Incoming) {
    tokio::spawn(timeout(DRAIN_TIMEOUT, async move { while let Some(Ok(_)) = body.frame().await {} }));
}
