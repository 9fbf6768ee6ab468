//! The grants of containers that may use the engine, and their open sockets.
//!
//! A grant is a file in dockerd's own directory of the container, so that it is deleted together with the container and
//! survives a restart of the VM. It is written at creation and read again at each start, see `create_with_socket` and
//! `socket_server`.

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bulkhead_protocol::{SocketCommands, SocketExceptions, is_container_id};
use tokio::sync::watch;

use crate::{
    images::{AllowedImages, SocketGrant},
    json_file::{read_json, write_json},
    rules::Refusal,
};

/// Name of the grant's file, beside dockerd's own files of the container.
const GRANT_FILE: &str = "bulkhead-socket.json";

/// Directories that the gate uses.
#[derive(Clone, Debug)]
pub struct Directories {
    /// The containers' sockets.
    pub sockets: PathBuf,
    /// dockerd's data (`/var/lib/docker`).
    pub data: PathBuf,
}

impl Default for Directories {
    fn default() -> Self {
        let sockets = bulkhead_protocol::container_socket("");
        Self { sockets, data: PathBuf::from("/var/lib/docker") }
    }
}

/// A container's socket. Dropping it ends its listener and all its connections.
#[derive(Debug)]
pub(crate) struct OpenSocket {
    _closed: watch::Sender<()>,
}

impl OpenSocket {
    /// Returns a socket, and a receiver that fails when the socket is dropped.
    pub(crate) fn new() -> (Self, watch::Receiver<()>) {
        let (sender, closed) = watch::channel(());
        (Self { _closed: sender }, closed)
    }
}

/// The exceptions in force, and the sockets that are open.
#[derive(Debug)]
pub struct Sockets {
    pub(crate) images: AllowedImages,
    pub(crate) commands: Option<SocketCommands>,
    pub(crate) directories: Directories,
    /// By container ID.
    open: Mutex<HashMap<String, OpenSocket>>,
    /// A task watches for removed containers.
    pub(crate) watching: Mutex<bool>,
}

impl Sockets {
    /// Creates the state under these exceptions, without open sockets.
    pub fn new(exceptions: SocketExceptions, directories: Directories) -> Self {
        Self {
            // On the data disk: the registry may be out of reach after the next boot.
            images: AllowedImages::new(&exceptions, directories.data.join("bulkhead/digests.json")),
            commands: exceptions.commands,
            directories,
            open: Mutex::default(),
            watching: Mutex::default(),
        }
    }

    pub(crate) fn open_sockets(&self) -> MutexGuard<'_, HashMap<String, OpenSocket>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn containers(&self) -> PathBuf {
        self.directories.data.join("containers")
    }

    pub(crate) fn socket(&self, id: &str) -> PathBuf {
        self.directories.sockets.join(id)
    }

    /// Saves the grant with the container.
    pub(crate) fn save_grant(&self, id: &str, grant: &SocketGrant) -> io::Result<()> {
        let directory = self.containers().join(id);
        // dockerd makes the directory before it answers the creation. Without it the grant would outlive the container.
        if !is_container_id(id) || !directory.is_dir() {
            return Err(io::ErrorKind::NotFound.into());
        }
        write_json(&directory.join(GRANT_FILE), grant)
    }

    /// Checks whether the container may have its socket now. `id` has to be a container ID.
    ///
    /// Asks neither dockerd nor a registry, because dockerd holds the container's lock while the runtime waits for this
    /// answer, and may not serve its API yet.
    pub(crate) fn check_grant(&self, id: &str) -> Result<(), Refusal> {
        let directory = self.containers().join(id);
        let grant: Option<SocketGrant> = read_json(&directory.join(GRANT_FILE));
        // The list can have changed since the creation.
        if grant.is_some_and(|grant| self.images.still_grants(&grant)) {
            return Ok(());
        }
        // For the message only: the image's name, as dockerd has saved it.
        let container: serde_json::Value = read_json(&directory.join("config.v2.json")).unwrap_or_default();
        Err(Refusal::socket(container["Config"]["Image"].as_str().unwrap_or_default()))
    }
}
