//! The endpoints of the procfs service: a FUSE mount, and a socket for crun. init makes and holds both.
//!
//! They outlive every process of the service: requests of containers that arrive while none runs wait for the next one.
//! They must not wait forever, though. A process that hangs is killed ([`crate::supervisor`]), and when none can be
//! started any more, or the guest goes down, [`abort`] makes all requests fail.

use std::{
    fs, io,
    os::{
        fd::OwnedFd,
        unix::{fs::PermissionsExt, net::UnixListener},
    },
    path::Path,
};

use bulkhead_guest_common::registry;
use bulkhead_procfs::{mount, seccomp_notify};

use crate::{error::Error, log, mounts};

/// Mount point of `fusectl`, through which connections are aborted.
const FUSE_CONTROL: &str = "/sys/fs/fuse/connections";

/// Descriptors that init holds for the service.
#[derive(Debug)]
pub(crate) struct Endpoints {
    /// The FUSE connection, on which requests for files arrive.
    device: OwnedFd,
    /// The socket to which crun sends the seccomp listeners that report mounts.
    listener: OwnedFd,
}

impl Endpoints {
    /// Returns copies for a new process, with the names of their command-line options.
    pub(crate) fn copies(&self) -> io::Result<[(String, OwnedFd); 2]> {
        Ok([("device".to_owned(), self.device.try_clone()?), ("listener".to_owned(), self.listener.try_clone()?)])
    }
}

/// Mounts the tree and opens the socket.
pub(crate) fn connect() -> Result<Endpoints, Error> {
    let mounted = |target: &str| {
        let target = target.into();
        move |source| Error::Mount { what: "the containers' files of /proc and /sys".to_owned(), target, source }
    };
    mount::mount_control(Path::new(FUSE_CONTROL)).map_err(mounted(FUSE_CONTROL))?;
    // Mounts of containers are made from below the tree, with the containers' ids: these may pass, and list nothing.
    for path in ["/run/sysbox-runc", registry::STATE, registry::TREE] {
        mounts::make_directory(path, 0o711)?;
    }
    // Without a server, requests wait as long as this descriptor is open.
    let device = mount::mount(Path::new(registry::TREE)).map_err(mounted(registry::TREE))?;
    // Bound here, so that crun can always connect: its connections wait in the queue while no process accepts them.
    let listener =
        UnixListener::bind(seccomp_notify::SOCKET).map_err(Error::file("listen on", seccomp_notify::SOCKET))?;
    fs::set_permissions(seccomp_notify::SOCKET, fs::Permissions::from_mode(0o600))
        .map_err(Error::file("set the mode of", seccomp_notify::SOCKET))?;
    Ok(Endpoints { device, listener: listener.into() })
}

/// Makes every request fail that waits for the service, now and later.
pub(crate) fn abort() {
    // Without isolation there is no mount to abort.
    if !Path::new(registry::STATE).exists() {
        return;
    }
    if let Err(error) = mount::abort(Path::new(registry::TREE), Path::new(FUSE_CONTROL)) {
        log::info(&format!("cannot abort the FUSE connection of {}: {error}", registry::TREE));
    }
}
