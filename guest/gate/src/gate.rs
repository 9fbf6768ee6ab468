//! The state that all connections share, and the kinds of clients.

use std::{path::PathBuf, sync::Arc};

use bulkhead_protocol::SocketExceptions;
use tokio::sync::watch;

use crate::{
    rules::Isolation,
    sockets::{Directories, Sockets},
};

/// What stands between clients and the engine.
#[derive(Debug)]
pub struct Gate {
    pub(crate) upstream: PathBuf,
    pub(crate) isolation: Isolation,
    pub(crate) environment: Arc<[String]>,
    pub(crate) sockets: Sockets,
    pub(crate) block_load: bool,
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub enum Caller {
    /// The host, or the guest itself.
    Host,
    /// A container, over a socket of its own; its connections end when the sender is dropped.
    Container(watch::Receiver<()>),
}

impl Gate {
    /// A gate in front of the engine that listens on the unix socket `upstream`.
    pub fn new(upstream: PathBuf, isolation: Isolation) -> Self {
        let sockets = Sockets::new(SocketExceptions::default(), Directories::default());
        Self { upstream, isolation, environment: Arc::new([]), sockets, block_load: false }
    }

    /// The same, where some containers may have the engine's socket.
    #[must_use]
    pub fn with_sockets(self, sockets: Sockets) -> Self {
        Self { sockets, ..self }
    }

    /// The same, perhaps without `docker load`.
    #[must_use]
    pub fn with_load_blocked(self, block_load: bool) -> Self {
        Self { block_load, ..self }
    }

    /// The same, with `NAME=VALUE`s that every new container has unless it is created with others.
    #[must_use]
    pub fn with_environment(self, environment: Vec<String>) -> Self {
        Self { environment: environment.into(), ..self }
    }
}

impl Caller {
    /// Returns when the caller's socket is closed; never for the host.
    pub(crate) async fn gone(self) {
        match self {
            Self::Host => std::future::pending().await,
            // The sender never sends: this is its end.
            Self::Container(mut closed) => drop(closed.changed().await),
        }
    }
}
