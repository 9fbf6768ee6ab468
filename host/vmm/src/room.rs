//! Reports that the host's file system is full while the guest writes to a disk.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The disks whose writes wait for room, from the devices' threads to the one that serves the backend.
#[derive(Clone)]
pub struct RoomSignal {
    inner: Arc<Inner>,
    /// The reporter: a disk has room only when all of its queues have.
    queue: usize,
}

struct Inner {
    /// Disks by name, and the queues with writes that wait.
    waiting: Mutex<BTreeSet<(String, usize)>>,
    event: EventFd,
}

impl RoomSignal {
    /// Creates a signal without any disk.
    pub fn new() -> io::Result<Self> {
        let inner = Inner { waiting: Mutex::default(), event: EventFd::new(EFD_NONBLOCK)? };
        Ok(Self { inner: Arc::new(inner), queue: 0 })
    }

    /// The same signal for reports of another queue.
    #[must_use]
    pub fn queue(&self, queue: usize) -> Self {
        Self { inner: Arc::clone(&self.inner), queue }
    }

    /// Reports whether there is room for this queue's writes to the disk with this serial number, which may be padded with
    /// zeroes.
    pub fn report(&self, serial: &[u8], room: bool) {
        let name = String::from_utf8_lossy(serial).trim_end_matches('\0').to_owned();
        let mut waiting = self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let others = waiting.iter().any(|(disk, queue)| *disk == name && *queue != self.queue);
        let entry = (name, self.queue);
        let changed = if room { waiting.remove(&entry) } else { waiting.insert(entry) };
        drop(waiting);
        if changed && !others {
            let _ = self.inner.event.write(1);
        }
    }

    /// The event that becomes readable with each report of something new.
    pub fn event(&self) -> &EventFd {
        &self.inner.event
    }

    /// The serial numbers of the disks whose writes wait. Resets the event.
    pub fn waiting(&self) -> Vec<String> {
        // First, so that a report from now on raises it again.
        let _ = self.inner.event.read();
        let waiting = self.inner.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let mut disks: Vec<_> = waiting.iter().map(|(disk, _)| disk.clone()).collect();
        // Sorted, with the queues of a disk in a row.
        disks.dedup();
        disks
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

    #[test]
    fn a_disk_has_room_when_all_of_its_queues_have() {
        let first = RoomSignal::new().unwrap();
        let second = first.queue(1);
        first.report(b"data", false);
        second.report(b"data", false);
        assert_eq!(first.waiting(), ["data"]);
        first.report(b"data", true);
        assert_eq!(first.waiting(), ["data"]);
        second.report(b"other", false);
        assert_eq!(first.waiting(), ["data", "other"]);
        second.report(b"data", true);
        assert_eq!(first.event().read().unwrap(), 1);
        assert_eq!(first.waiting(), ["other"]);
    }
}
