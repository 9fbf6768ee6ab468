//! Host ends for connections that the VM's own programs make.
//!
//! This process cannot connect to anything: a vmm that a guest has taken over would reach every unix socket of the
//! user. So a connection of the guest takes a stream that the backend has handed over before, and without one it is
//! refused. The guest cannot make the backend do anything by asking.

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// The streams that wait, one for each port of the host; `None` once the device is gone.
#[derive(Debug)]
pub(super) struct Offers(Mutex<Option<BTreeMap<u32, OwnedFd>>>);

impl Offers {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Some(BTreeMap::new())))
    }

    /// Keeps a stream for the next connection to this port. It replaces one that nothing has taken, which is closed.
    pub(super) fn put(&self, host_port: u32, stream: OwnedFd) {
        if let Some(streams) = &mut *self.streams() {
            streams.insert(host_port, stream);
        }
    }

    /// Takes the stream for a connection to this port.
    pub(super) fn take(&self, host_port: u32) -> Option<OwnedFd> {
        self.streams().as_mut()?.remove(&host_port)
    }

    /// Closes the streams that wait, and later ones.
    pub(super) fn close(&self) {
        *self.streams() = None;
    }

    fn streams(&self) -> MutexGuard<'_, Option<BTreeMap<u32, OwnedFd>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
