//! The news that the host has no room for what the guest writes to a disk.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The disks whose writes wait for room, from the devices' threads to the one that serves the backend.
#[derive(Clone)]
pub struct RoomSignal(Arc<Inner>);

struct Inner {
    waiting: Mutex<BTreeSet<String>>,
    event: EventFd,
}

impl RoomSignal {
    /// Creates a signal without any disk.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Inner { waiting: Mutex::default(), event: EventFd::new(EFD_NONBLOCK)? })))
    }

    /// Reports whether there is room for the disk with this serial number, which may be padded with zeroes.
    pub fn report(&self, serial: &[u8], room: bool) {
        let name = String::from_utf8_lossy(serial).trim_end_matches('\0').to_owned();
        let mut waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if room {
            waiting.remove(&name);
        } else {
            waiting.insert(name);
        }
        drop(waiting);
        let _ = self.0.event.write(1);
    }

    /// The event that becomes readable with each report.
    pub fn event(&self) -> &EventFd {
        &self.0.event
    }

    /// The serial numbers of the disks whose writes wait. Resets the event.
    pub fn waiting(&self) -> Vec<String> {
        // First, so that a report from now on raises it again.
        let _ = self.0.event.read();
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }
}
