//! Reports that the host's file system is full while the guest writes to a disk.

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
        let changed = if room { waiting.remove(&name) } else { waiting.insert(name) };
        drop(waiting);
        if changed {
            let _ = self.0.event.write(1);
        }
    }

    /// The event that becomes readable with each report of something new.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_that_says_nothing_new_raises_no_event() {
        let signal = RoomSignal::new().unwrap();
        signal.report(b"data\0\0", false);
        assert_eq!(signal.waiting(), ["data"]);
        signal.report(b"data\0\0", false);
        assert!(signal.event().read().is_err());
        signal.report(b"data\0\0", true);
        assert_eq!(signal.event().read().unwrap(), 1);
        assert!(signal.waiting().is_empty());
        signal.report(b"data\0\0", true);
        assert!(signal.event().read().is_err());
    }
}
