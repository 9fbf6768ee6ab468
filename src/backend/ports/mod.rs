//! Published ports: what the guest asks for, the sockets that listen for it, and what the network process has to know.
//!
//! The backend opens the sockets and keeps them, so a network process that dies costs no port: its successor is handed
//! the same ones. What the guest asks for is hostile input: its amount is bounded, and [`policy`] says what may be.

mod error;
mod policy;
mod socket;

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
const MOST: usize = 4096;

/// How long a socket that was given up may still be open in the network process.
const LINGER: Duration = Duration::from_secs(1);
/// How often it is looked after meanwhile.
const AGAIN: Duration = Duration::from_millis(10);

/// What the network process has to be told.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// It shall serve this socket.
    Listen {
        /// The mapping, by our own number.
        id: u64,
        /// The socket's protocol.
        transport: Transport,
        /// The container's address and port.
        target: SocketAddr,
        /// The socket.
        socket: Arc<OwnedFd>,
    },
    /// It shall close this mapping's socket.
    Forget {
        /// The mapping.
        id: u64,
    },
}

/// The published ports of one VM.
#[derive(Debug)]
pub(super) struct Ports {
    table: Mutex<Table>,
    changed: Notify,
    /// Whatever address is asked for, the host's loopback is listened on.
    only_loopback: bool,
}

#[derive(Debug)]
struct Table {
    /// By the guest's ids.
    entries: BTreeMap<u64, Entry>,
    most: usize,
    /// Why nothing can be published.
    closed: Option<String>,
    /// The last number given; they are ours and never given twice, whatever the guest does with its ids.
    last: u64,
    /// When a socket was last given up.
    freed: Option<Instant>,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    port: PortMapping,
    target: SocketAddr,
    /// None when every IPv6 address was asked for and the host has none.
    socket: Option<Arc<OwnedFd>>,
}

impl Ports {
    /// Ports that can be published; with `only_loopback`, on no address that others reach.
    pub(super) fn open(only_loopback: bool) -> Self {
        // The other half is for docker's clients.
        let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        let most = usize::try_from(limit / 2).unwrap_or(MOST).min(MOST);
        Self { only_loopback, ..Self::new(most, None) }
    }

    /// None can be, for this reason.
    pub(super) fn closed(reason: String) -> Self {
        Self::new(0, Some(reason))
    }

    fn new(most: usize, closed: Option<String>) -> Self {
        let table = Table { entries: BTreeMap::new(), most, closed, last: 0, freed: None };
        Self { table: Mutex::new(table), changed: Notify::new(), only_loopback: false }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens for the guest, which calls the mapping `id`.
    pub(super) async fn publish(&self, id: u64, port: PortMapping) -> Result<(), PublishError> {
        let binding = policy::decide(port, self.only_loopback)?;
        loop {
            // Not in the match, which would keep the table locked.
            let published = self.table().publish(id, port, &binding);
            match published {
                // The network process may not have closed it yet.
                Err(PublishError::Listen(error)) if error.is_in_use() && self.lingers() => {}
                result => {
                    result?;
                    self.changed.notify_one();
                    return Ok(());
                }
            }
            sleep(AGAIN).await;
        }
    }

    fn lingers(&self) -> bool {
        self.table().freed.is_some_and(|freed| freed.elapsed() < LINGER)
    }

    /// Ends the guest's mapping `id`, if there is one.
    pub(super) fn unpublish(&self, id: u64) {
        let mut table = self.table();
        if let Some(entry) = table.entries.remove(&id) {
            table.give_up(&entry);
            self.changed.notify_one();
        }
    }

    /// Ends all mappings: whoever asked for them is gone.
    pub(super) fn clear(&self) {
        let mut table = self.table();
        for entry in std::mem::take(&mut table.entries).into_values() {
            table.give_up(&entry);
        }
        self.changed.notify_one();
    }

    /// Ends all mappings, and refuses new ones for this reason.
    pub(super) fn close(&self, reason: &str) {
        self.table().closed = Some(reason.to_owned());
        self.clear();
    }

    /// What listens, by port and address.
    pub(super) fn list(&self) -> Vec<PortMapping> {
        let table = self.table();
        let listening = table.entries.values().filter(|entry| entry.socket.is_some());
        let mut ports: Vec<PortMapping> = listening.map(|entry| entry.port).collect();
        ports.sort_unstable_by_key(|port| (port.host_port, port.transport, port.host_ip));
        ports
    }

    /// Returns when something may have changed since the last call.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What a network process that knows the mappings `known` has to be told; they are up to date then.
    pub(super) fn changes(&self, known: &mut BTreeSet<u64>) -> Vec<Change> {
        let table = self.table();
        let present: BTreeSet<u64> =
            table.entries.values().filter(|entry| entry.socket.is_some()).map(|entry| entry.id).collect();
        // First what is over: its ports may be wanted by others.
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
    fn publish(&mut self, id: u64, port: PortMapping, binding: &Binding) -> Result<(), PublishError> {
        if let Some(reason) = &self.closed {
            return Err(PublishError::Closed(reason.clone()));
        }
        if self.entries.contains_key(&id) {
            return Err(PublishError::Taken);
        }
        if self.entries.len() >= self.most {
            return Err(PublishError::Full(self.most));
        }
        let socket = match socket::open(port.transport, binding.listen) {
            Ok(socket) => Some(Arc::new(socket)),
            Err(error) if error.is_no_family() && port.host_ip.is_unspecified() => None,
            Err(error) => return Err(error.into()),
        };
        self.last += 1;
        // As it is, not as it was asked for.
        let port = PortMapping { host_ip: binding.listen.ip(), ..port };
        self.entries.insert(id, Entry { id: self.last, port, target: binding.target, socket });
        Ok(())
    }

    /// Stops a socket from listening at once, whoever else holds it.
    fn give_up(&mut self, entry: &Entry) {
        if let Some(socket) = &entry.socket {
            // A datagram socket has nothing to shut down.
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
            self.freed = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests;
