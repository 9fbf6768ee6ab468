//! The sockets of the containers that may have one.
//!
//! Each has a socket of its own, which is bound into it where it asked for the engine's. When a container is made, the
//! gate judges its image and writes the reason down beside the engine's own files of the container, so that both go
//! together. When it is started, by whomever and also while the engine itself is not yet up, the runtime asks here;
//! the socket is made then, and closed with all its connections when the container is removed.

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

/// File beside those of the container.
const GRANT_FILE: &str = "bulkhead-socket.json";

/// Where things are.
#[derive(Clone, Debug)]
pub struct Directories {
    /// Folder of the sockets.
    pub sockets: PathBuf,
    /// The engine's data.
    pub data: PathBuf,
}

impl Default for Directories {
    fn default() -> Self {
        let sockets = bulkhead_protocol::container_socket("");
        Self { sockets, data: PathBuf::from("/var/lib/docker") }
    }
}

/// A container's socket; when it is dropped, everything that uses it ends.
#[derive(Debug)]
pub(crate) struct OpenSocket {
    _closed: watch::Sender<()>,
}

impl OpenSocket {
    /// A socket, and the receiver that sees its end.
    pub(crate) fn new() -> (Self, watch::Receiver<()>) {
        let (sender, closed) = watch::channel(());
        (Self { _closed: sender }, closed)
    }
}

/// Who may have a socket, and those who have.
#[derive(Debug)]
pub struct Sockets {
    pub(crate) images: AllowedImages,
    pub(crate) commands: Option<SocketCommands>,
    pub(crate) directories: Directories,
    open_sockets: Mutex<HashMap<String, OpenSocket>>,
    pub(crate) watching: Mutex<bool>,
}

impl Sockets {
    /// The sockets under these exceptions.
    pub fn new(exceptions: SocketExceptions, directories: Directories) -> Self {
        Self {
            images: AllowedImages::new(&exceptions, directories.data.join("bulkhead/digests.json")),
            commands: exceptions.commands,
            directories,
            open_sockets: Mutex::default(),
            watching: Mutex::default(),
        }
    }

    pub(crate) fn open_sockets(&self) -> MutexGuard<'_, HashMap<String, OpenSocket>> {
        self.open_sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn containers(&self) -> PathBuf {
        self.directories.data.join("containers")
    }

    pub(crate) fn socket(&self, id: &str) -> PathBuf {
        self.directories.sockets.join(id)
    }

    /// Keeps the reason with the container.
    pub(crate) fn record(&self, id: &str, grant: &SocketGrant) -> io::Result<()> {
        let folder = self.containers().join(id);
        if !is_container_id(id) || !folder.is_dir() {
            return Err(io::ErrorKind::NotFound.into());
        }
        write_json(&folder.join(GRANT_FILE), grant)
    }

    /// Whether the container may have its socket now.
    pub(crate) fn admit(&self, id: &str) -> Result<(), Refusal> {
        let folder = self.containers().join(id);
        let grant: Option<SocketGrant> = read_json(&folder.join(GRANT_FILE));
        if grant.is_some_and(|grant| self.images.still_grants(&grant)) {
            return Ok(());
        }
        let container: serde_json::Value = read_json(&folder.join("config.v2.json")).unwrap_or_default();
        Err(Refusal::socket(container["Config"]["Image"].as_str().unwrap_or_default()))
    }
}
