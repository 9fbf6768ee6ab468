//! The certificate authorities that the host trusts; the engine trusts them instead of those in the image.

use std::fs;

use crate::error::Error;

/// The bundle that Go's programs, curl and git read first. `/etc` is new at each start, so this is no lasting change.
pub(crate) const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// A path that does not exist, which services get instead of `/etc/ssl/certs`. Go's programs read that directory as
/// well as the bundle, and the image has its own authorities there, one a file.
pub(crate) const NO_DIRECTORY: &str = "/run/bulkhead/no-certificates";

/// Replaces the image's bundle by `pem`; an empty one leaves it.
pub(crate) fn trust(pem: &str) -> Result<(), Error> {
    if pem.is_empty() {
        return Ok(());
    }
    fs::write(BUNDLE, pem).map_err(Error::file("write", BUNDLE))
}
