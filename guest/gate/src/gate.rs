//! The state that all connections share, and the kinds of clients.

use std::{path::PathBuf, sync::Arc};

use bulkhead_policy::networks::VmNetwork;
use bulkhead_protocol::{HostSocket, SocketExceptions};
use tokio::sync::{Notify, watch};

use crate::{
    rules::{Isolation, source_places::SourcePlaces},
    shares::{ShareList, SharedDirectories, SocketPlace},
    sockets::{Directories, Sockets},
};

/// The rules in force and the sockets of containers.
#[derive(Debug)]
pub struct Gate {
    /// dockerd's own unix socket.
    pub(crate) upstream: PathBuf,
    pub(crate) isolation: Isolation,
    /// `NAME=VALUE` for new containers.
    pub(crate) environment: Arc<[String]>,
    pub(crate) sockets: Sockets,
    pub(crate) block_load: bool,
    /// The VM's own networks, from which containers' networks take no address.
    pub(crate) vm_network: VmNetwork,
    shares: ShareList,
    host_sockets: Arc<[SocketPlace]>,
    /// Raised when a request may have made, joined or left a swarm.
    pub(crate) swarm_changed: Notify,
}

/// The client at the other end of a connection.
#[derive(Clone, Debug)]
pub enum Caller {
    /// The host, or the guest itself.
    Host,
    /// A container, over a socket of its own; its connections end when the sender is dropped.
    Container(watch::Receiver<()>),
}

impl Gate {
    /// Creates a gate in front of the dockerd that listens on the unix socket `upstream`.
    pub fn new(upstream: PathBuf, isolation: Isolation) -> Self {
        // Strict until something else is configured: no image is allowed to have the socket.
        let sockets = Sockets::new(SocketExceptions::default(), Directories::default());
        Self {
            upstream,
            isolation,
            environment: Arc::new([]),
            sockets,
            block_load: false,
            vm_network: VmNetwork::default(),
            shares: ShareList::default(),
            host_sockets: Arc::new([]),
            swarm_changed: Notify::new(),
        }
    }

    /// Sets the containers that may have the engine's socket.
    #[must_use]
    pub fn with_sockets(self, sockets: Sockets) -> Self {
        Self { sockets, ..self }
    }

    /// Refuses `docker load`, or not.
    #[must_use]
    pub fn with_load_blocked(self, block_load: bool) -> Self {
        Self { block_load, ..self }
    }

    /// Sets the VM's own networks.
    #[must_use]
    pub fn with_vm_network(self, vm_network: VmNetwork) -> Self {
        Self { vm_network, ..self }
    }

    /// Sets the directories of the host that containers may mount.
    #[must_use]
    pub fn with_shares(self, shares: impl Into<ShareList>) -> Self {
        Self { shares: shares.into(), ..self }
    }

    /// Sets the sockets of the host that containers may mount, and the paths on the host of the engine's own.
    #[must_use]
    pub fn with_host_sockets(self, sockets: &[HostSocket], engine: &[String]) -> Self {
        Self { host_sockets: SocketPlace::list(sockets, engine), ..self }
    }

    /// The directories and sockets of the host that containers may mount now.
    pub(crate) fn shares(&self) -> SharedDirectories {
        self.shares.current().with_sockets(Arc::clone(&self.host_sockets))
    }

    /// The same for a request with sources at these places; none if there are no such places.
    pub(crate) fn shares_for(&self, places: SourcePlaces) -> SharedDirectories {
        if places == SourcePlaces::None { SharedDirectories::default() } else { self.shares() }
    }

    /// Sets the `NAME=VALUE` pairs of each new container that does not set the same names itself.
    #[must_use]
    pub fn with_environment(self, environment: Vec<String>) -> Self {
        Self { environment: environment.into(), ..self }
    }
}

impl Caller {
    /// Returns when the caller's socket is closed; never for the host.
    pub(crate) async fn closed(self) {
        match self {
            Self::Host => std::future::pending().await,
            // Nothing is ever sent: `changed` fails as soon as the sender is dropped, and that is the signal.
            Self::Container(mut closed) => drop(closed.changed().await),
        }
    }
}
