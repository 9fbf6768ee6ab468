//! The warden's connections: a FUSE mount and a socket for crun, which init makes and holds.
//!
//! Held here, they outlive every warden: what containers ask while none runs waits for the next one. Nobody may wait for
//! ever, though. A warden that falls silent is killed ([`PATIENCE`]), and when none can be started any more the
//! connection is aborted, so that everything that is asked fails.

use std::{
    fs, io,
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt, net::UnixListener},
    },
    path::Path,
    time::Duration,
};

use bulkhead_procfs::{mount, registry, traps};

use crate::{error::Error, kmsg, mounts};

/// How long a warden may be silent, which says every two seconds that it answers.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// The kernel's files about FUSE connections.
const CONTROL: &str = "/sys/fs/fuse/connections";

/// What init holds for the warden.
#[derive(Debug)]
pub(crate) struct Held {
    /// Where requests for files arrive.
    device: OwnedFd,
    /// Where crun brings the descriptors on which mounts are reported.
    listener: OwnedFd,
}

impl Held {
    /// Copies for a new warden, with the names of their options.
    pub(crate) fn copies(&self) -> io::Result<[(String, OwnedFd); 2]> {
        Ok([("device".to_owned(), self.device.try_clone()?), ("listener".to_owned(), self.listener.try_clone()?)])
    }
}

/// Mounts the tree, opens the socket and returns the connections.
pub(crate) fn connect() -> Result<Held, Error> {
    let mounted = |target: &str| {
        let target = target.into();
        move |source| Error::Mount { what: "the warden's files".to_owned(), target, source }
    };
    mount::mount_control(Path::new(CONTROL)).map_err(mounted(CONTROL))?;
    // The runtime makes its containers' mounts from below it, as users that may pass and see nothing.
    for path in ["/run/sysbox-runc", registry::STATE, registry::TREE] {
        mounts::make_directory(path, 0o711)?;
    }
    let device = mount::mount(Path::new(registry::TREE)).map_err(mounted(registry::TREE))?;
    let listener = UnixListener::bind(traps::SOCKET).map_err(Error::file("listen on", traps::SOCKET))?;
    fs::set_permissions(traps::SOCKET, fs::Permissions::from_mode(0o600))
        .map_err(Error::file("set the mode of", traps::SOCKET))?;
    Ok(Held { device, listener: listener.into() })
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
