//! Published ports: the host's sockets that listen for containers, and for the VM itself ([`vm`]).
//!
//! dockerd starts `bulkhead-port-proxy` where it expects `docker-proxy`, one for each port and kind of address. The
//! proxy asks init, init asks the backend over the agent's connection ([`super::agent`]), and the backend binds and
//! listens here before it answers. So a port listens before `docker start` returns, and `docker run` shows the error of
//! one that cannot. The proxy's connection to init is the mapping: when the proxy ends, however it ends, init
//! unpublishes the port.
//!
//! The backend keeps the sockets and hands a copy of each to the network process. A network process that dies costs no
//! port: clients wait in the backlog, and the next process receives the same sockets. What is published is compared
//! with what a process knows ([`Ports::changes`]), so the first hand-over, a change and the start after a crash are one
//! path.
//!
//! The guest's requests are hostile input: their number is bounded, and [`policy`] judges each.

mod error;
mod policy;
mod socket;
pub(super) mod vm;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bulkhead_protocol::{PortMapping, Transport};
use nix::sys::{
    resource::{Resource, getrlimit},
    socket::{Shutdown, shutdown},
};
use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

use error::PublishError;
use policy::Binding;

/// Ports at once, if the process may have that many descriptors.
const MAX_PORTS: usize = 4096;

/// Time for the network process to close its copy of a socket that was given up.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval between attempts to listen on a port that such a copy may still occupy.
const RELEASE_INTERVAL: Duration = Duration::from_millis(10);

/// A difference between the published ports and those that a network process knows.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// The process has to serve this socket.
    Listen {
        /// The backend's number of the mapping.
        id: u64,
        /// The socket's protocol.
        transport: Transport,
        /// The container's address and port.
        target: SocketAddr,
        /// A listening TCP socket or a bound UDP socket.
        socket: Arc<OwnedFd>,
    },
    /// The process has to close the socket of this mapping.
    Forget {
        /// The backend's number of the mapping.
        id: u64,
    },
}

/// A mapping that listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listening {
    pub(super) port: PortMapping,
    /// It leads to the VM itself, not to a container.
    pub(super) of_vm: bool,
}

/// The published ports of one VM.
#[derive(Debug)]
pub(super) struct Ports {
    table: Mutex<Table>,
    changed: Notify,
    /// Listen on the host's loopback, whatever address the guest asks for.
    only_loopback: bool,
}

/// The owner of a mapping, and its name for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    /// The guest, by the id that it chose.
    Guest(u64),
    /// The settings, which name a port of the VM itself.
    Vm(PortMapping),
}

#[derive(Debug)]
struct Table {
    entries: BTreeMap<Key, Entry>,
    max: usize,
    /// The reason if ports cannot be published.
    closed: Option<String>,
    /// The last number given to a mapping. The guest may use its ids again; the backend's numbers are used once, so a
    /// network process cannot take a new mapping for one that it already serves.
    last: u64,
    /// Time of the last release of a socket.
    released: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    /// The backend's number.
    id: u64,
    port: PortMapping,
    target: SocketAddr,
    /// `None` if the guest asked for every IPv6 address of a host that has no IPv6.
    socket: Option<Arc<OwnedFd>>,
}

impl Ports {
    /// Returns a table into which ports can be published; with `only_loopback`, on no address that others reach.
    pub(super) fn open(only_loopback: bool) -> Self {
        // Each port is a descriptor. A guest that publishes all it can must leave room for the docker clients, whose
        // sockets pass through this process: half of the limit.
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        let max = usize::try_from(limit / 2).unwrap_or(MAX_PORTS).min(MAX_PORTS);
        Self { only_loopback, ..Self::new(max, None) }
    }

    /// Returns a table that refuses every port for this reason.
    pub(super) fn closed(reason: String) -> Self {
        Self::new(0, Some(reason))
    }

    fn new(max: usize, closed: Option<String>) -> Self {
        let table = Table { entries: BTreeMap::new(), max, closed, last: 0, released: None };
        Self { table: Mutex::new(table), changed: Notify::new(), only_loopback: false }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens for the guest, which calls the mapping `id`.
    pub(super) async fn publish(&self, id: u64, port: PortMapping) -> Result<(), PublishError> {
        self.publish_as(Key::Guest(id), port).await
    }

    /// Listens for exactly these ports of the VM itself; returns those that the host refuses.
    pub(super) async fn publish_vm(&self, wanted: &BTreeSet<PortMapping>) -> Vec<(PortMapping, PublishError)> {
        self.end_all(|key| matches!(key, Key::Vm(port) if !wanted.contains(port)));
        let mut refused = Vec::new();
        for port in wanted {
            let published = self.table().entries.contains_key(&Key::Vm(*port));
            if !published && let Err(error) = self.publish_as(Key::Vm(*port), *port).await {
                refused.push((*port, error));
            }
        }
        refused
    }

    async fn publish_as(&self, key: Key, port: PortMapping) -> Result<(), PublishError> {
        let binding = policy::decide(port, self.only_loopback)?;
        loop {
            // A statement of its own: as the match's scrutinee the guard would live until the match's end.
            let published = self.table().publish(key, port, &binding);
            match published {
                // `docker restart` publishes the same port a moment after it was unpublished. The network process then
                // may not have closed its copy of the socket, which keeps a UDP port occupied.
                Err(PublishError::Listen(error)) if error.is_in_use() && self.is_releasing() => {}
                result => {
                    result?;
                    self.changed.notify_one();
                    return Ok(());
                }
            }
            sleep(RELEASE_INTERVAL).await;
        }
    }

    /// Returns whether the network process may still hold a socket that was given up.
    fn is_releasing(&self) -> bool {
        self.table().released.is_some_and(|released| released.elapsed() < RELEASE_TIMEOUT)
    }

    /// Ends the guest's mapping `id`, if it exists.
    pub(super) fn unpublish(&self, id: u64) {
        let mut table = self.table();
        if let Some(entry) = table.entries.remove(&Key::Guest(id)) {
            table.release(&entry);
            self.changed.notify_one();
        }
    }

    /// Ends all mappings of the guest, because the agent that asked for them is gone.
    pub(super) fn clear(&self) {
        self.end_all(|key| matches!(key, Key::Guest(_)));
    }

    /// Ends all mappings and refuses new ones for this reason.
    pub(super) fn close(&self, reason: &str) {
        // The reason first: no mapping may slip in between.
        self.table().closed = Some(reason.to_owned());
        self.end_all(|_| true);
    }

    fn end_all(&self, ends: impl Fn(&Key) -> bool) {
        let mut table = self.table();
        let ended: Vec<_> = table.entries.extract_if(.., |key, _| ends(key)).collect();
        for (_, entry) in &ended {
            table.release(entry);
        }
        self.changed.notify_one();
    }

    /// Returns the mappings that listen, by port and address.
    pub(super) fn list(&self) -> Vec<Listening> {
        let table = self.table();
        let listening = table.entries.iter().filter(|(_, entry)| entry.socket.is_some());
        let mut ports: Vec<_> =
            listening.map(|(key, entry)| Listening { port: entry.port, of_vm: matches!(key, Key::Vm(_)) }).collect();
        ports.sort_unstable_by_key(|Listening { port, .. }| (port.host_port, port.transport, port.host_ip));
        ports
    }

    /// Returns when something may have changed since the last call.
    pub(super) async fn changed(&self) {
        // `notify_one` stores one permit, so a change between two calls is not lost.
        self.changed.notified().await;
    }

    /// Returns the differences for a network process that knows the mappings `known`, and brings `known` up to date.
    pub(super) fn changes(&self, known: &mut BTreeSet<u64>) -> Vec<Change> {
        let table = self.table();
        let present: BTreeSet<u64> =
            table.entries.values().filter(|entry| entry.socket.is_some()).map(|entry| entry.id).collect();
        // Ended mappings come first, so that the process never holds two sockets for one port.
        let mut changes: Vec<Change> = known.difference(&present).map(|id| Change::Forget { id: *id }).collect();
        for entry in table.entries.values().filter(|entry| !known.contains(&entry.id)) {
            if let Some(socket) = &entry.socket {
                let (id, transport, target) = (entry.id, entry.port.transport, entry.target);
                changes.push(Change::Listen { id, transport, target, socket: Arc::clone(socket) });
            }
        }
        *known = present;
        changes
    }
}

impl Table {
    fn publish(&mut self, key: Key, port: PortMapping, binding: &Binding) -> Result<(), PublishError> {
        if let Some(reason) = &self.closed {
            return Err(PublishError::Closed(reason.clone()));
        }
        if self.entries.contains_key(&key) {
            return Err(PublishError::Taken);
        }
        if self.entries.len() >= self.max {
            return Err(PublishError::Full(self.max));
        }
        let socket = match socket::open(port.transport, binding.listen) {
            Ok(socket) => Some(Arc::new(socket)),
            // `-p 8080:80` publishes on `0.0.0.0` and on `::`. On a host without IPv6 the second must not fail the
            // container, so the mapping exists without a socket.
            Err(error) if error.lacks_family() && port.host_ip.is_unspecified() => None,
            Err(error) => return Err(error.into()),
        };
        self.last += 1;
        // `bulkhead ports` shows the address that listens, which `only_loopback` may have replaced.
        let port = PortMapping { host_ip: binding.listen.ip(), ..port };
        self.entries.insert(key, Entry { id: self.last, port, target: binding.target, socket });
        Ok(())
    }

    /// Stops a socket from listening at once, even if the network process still holds its copy.
    fn release(&mut self, entry: &Entry) {
        if let Some(socket) = &entry.socket {
            // shutdown(2) acts on the socket, not on one descriptor: it stops listening, and with SO_REUSEADDR the port
            // can be bound again. A UDP socket keeps its port until the last copy is closed.
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
            self.released = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests;
