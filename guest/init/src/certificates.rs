//! The certificate authorities that the host trusts; the engine trusts them instead of those in the image.

use std::fs;

use crate::error::Error;

/// Where Go's programs, curl and git look first; `/etc` is new in each start.
pub(crate) const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";

/// The image has the same authorities once more, one a file, in the folder that Go's programs read, too.
pub(crate) const EMPTY_DIRECTORY: &str = "/run/bulkhead/no-certificates";

/// Takes the place of the image's list; an empty one leaves it.
pub(crate) fn trust(pem: &str) -> Result<(), Error> {
    if pem.is_empty() {
        return Ok(());
    }
    fs::write(BUNDLE, pem).map_err(Error::file("write", BUNDLE))
}
