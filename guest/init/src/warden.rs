//! The warden's connection: a FUSE mount that init makes and holds.
//!
//! Held here, it outlives every warden: what containers ask while none runs waits for the next one. Nobody may wait for
//! ever, though. A warden that falls silent is killed ([`PATIENCE`]), and when none can be started any more the
//! connection is aborted, so that everything that is asked fails.

use std::{os::fd::OwnedFd, path::Path, time::Duration};

use bulkhead_warden::{mount, registry};

use crate::{error::Error, kmsg, mounts};

/// How long a warden may be silent, which says every two seconds that it answers.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// The kernel's files about FUSE connections.
const CONTROL: &str = "/sys/fs/fuse/connections";

/// Mounts the tree and returns the connection.
pub(crate) fn connect() -> Result<OwnedFd, Error> {
    let mounted = |target: &str| {
        let target = target.into();
        move |source| Error::Mount { what: "the warden's files".to_owned(), target, source }
    };
    mount::mount_control(Path::new(CONTROL)).map_err(mounted(CONTROL))?;
    // The runtime makes its containers' mounts from below it, as users that may pass and see nothing.
    for path in ["/run/sysbox-runc", registry::STATE, registry::TREE] {
        mounts::make_directory(path, 0o711)?;
    }
    mount::mount(Path::new(registry::TREE)).map_err(mounted(registry::TREE))
}

/// Makes everything fail that waits for the warden or will.
pub(crate) fn abort() {
    if !Path::new(registry::STATE).exists() {
        return;
    }
    if let Err(error) = mount::abort(Path::new(registry::TREE), Path::new(CONTROL)) {
        kmsg::log(&format!("can't let go of the warden's files: {error}"));
    }
}
