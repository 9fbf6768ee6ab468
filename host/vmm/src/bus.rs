//! Dispatches port and memory-mapped I/O exits to devices.

use std::sync::{Arc, Mutex, PoisonError};

/// A device behind a range of addresses. Offsets are relative to the start of the range, and the whole access lies
/// inside.
pub trait BusDevice: Send {
    /// Fills `data`, 1 to 8 bytes, for a read at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Handles a write of 1 to 8 bytes at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

struct Entry {
    start: u64,
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// An address space. It is built before the vCPUs run and only read afterwards, so that it needs no lock of its own.
#[derive(Default)]
pub struct Bus {
    /// In ascending order, without overlap.
    entries: Vec<Entry>,
}

/// Two devices have the same address, a mistake in the machine's construction.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("address {start:#x} is already in use")]
pub struct Overlap {
    start: u64,
}

impl Bus {
    /// Places a device at `start`, `len` bytes long.
    pub fn insert(&mut self, start: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), Overlap> {
        // In a sorted list only the two neighbours can overlap the new range.
        let at = self.entries.partition_point(|entry| entry.start < start);
        let before = at.checked_sub(1).and_then(|i| self.entries.get(i));
        let after = self.entries.get(at);
        if before.is_some_and(|e| e.start + e.len > start) || after.is_some_and(|e| start + len > e.start) {
            return Err(Overlap { start });
        }
        self.entries.insert(at, Entry { start, len, device });
        Ok(())
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let at = self.entries.partition_point(|entry| entry.start <= address).checked_sub(1)?;
        let entry = self.entries.get(at)?;
        // An access that starts inside of a device and ends outside reaches no device. The guest chooses the address,
        // up to the end of the address space, so the sum may overflow.
        let offset = address - entry.start;
        (offset.checked_add(len as u64)? <= entry.len).then_some((offset, &*entry.device))
    }

    /// Reads from the device at `address`; without a device the data is all ones, as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address, data.len()) {
            // Two vCPUs that access one device at the same time wait for each other here.
            device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        }
    }

    /// Writes to the device at `address`; without a device the data is lost.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    fn echo() -> Arc<Mutex<Echo>> {
        Arc::new(Mutex::new(Echo(Vec::new())))
    }

    #[test]
    fn an_access_reaches_the_device_with_its_offset() {
        let (low, high) = (echo(), echo());
        let mut bus = Bus::default();
        bus.insert(0x200, 0x10, high.clone()).unwrap();
        bus.insert(0x100, 0x10, low.clone()).unwrap();
        let mut data = [0];
        bus.read(0x105, &mut data);
        assert_eq!(data, [5]);
        bus.write(0x20f, &[1]);
        assert_eq!(high.lock().unwrap().0, [(0xf, vec![1])]);
        assert!(low.lock().unwrap().0.is_empty());
    }

    #[test]
    fn an_access_outside_of_or_across_a_device_reads_ones_and_writes_nothing() {
        let device = echo();
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        for address in [0xff, 0x10d, 0x110, u64::MAX - 1] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
            bus.write(address, &data);
        }
        assert!(device.lock().unwrap().0.is_empty());
    }

    #[test]
    fn two_devices_cannot_share_an_address() {
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, echo()).unwrap();
        assert!(bus.insert(0x10f, 1, echo()).is_err());
        assert!(bus.insert(0xf0, 0x11, echo()).is_err());
        bus.insert(0xf0, 0x10, echo()).unwrap();
    }
}
