//! The PCI Express root: one bus, with its configuration space in ECAM (PCI Express base specification, 7.2.2).

use std::sync::{Arc, Mutex, PoisonError};

use crate::bus::BusDevice;

/// A function on the bus.
pub trait PciFunction: Send {
    /// Reads configuration space. The access lies within its 4096 bytes.
    fn config_read(&self, offset: usize, data: &mut [u8]);
    /// Writes configuration space. The access lies within its 4096 bytes.
    fn config_write(&mut self, offset: usize, data: &[u8]);
}

/// Number of slots on the bus; slot 0 is the host bridge.
pub const SLOTS: usize = 32;

/// The bus.
#[derive(Default)]
pub struct PciRoot {
    functions: Vec<Arc<Mutex<dyn PciFunction>>>,
}

impl PciRoot {
    /// Creates a bus with the host bridge.
    pub fn new() -> Self {
        Self { functions: vec![Arc::new(Mutex::new(HostBridge))] }
    }

    /// Plugs a function into the next slot and returns the slot; `None` when the bus is full.
    pub fn plug(&mut self, function: Arc<Mutex<dyn PciFunction>>) -> Option<usize> {
        let slot = self.functions.len();
        (slot < SLOTS).then(|| {
            self.functions.push(function);
            slot
        })
    }

    /// Finds the function that an address belongs to. Only function 0 of each device exists.
    fn function(&self, offset: u64) -> Option<&Mutex<dyn PciFunction>> {
        // Bits 19:15 are the device, 14:12 the function, 11:0 the register. With one bus there are no bits above.
        let (device, function) = ((offset >> 15) as usize, offset >> 12 & 7);
        (function == 0).then(|| self.functions.get(device).map(|f| &**f))?
    }
}

impl BusDevice for PciRoot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // All ones, also as the vendor ID: nothing is in this slot. An access across the end of a function's space
        // belongs to none of the two.
        data.fill(0xff);
        let register = (offset & 0xfff) as usize;
        if register + data.len() <= 0x1000
            && let Some(function) = self.function(offset)
        {
            function.lock().unwrap_or_else(PoisonError::into_inner).config_read(register, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let register = (offset & 0xfff) as usize;
        if register + data.len() <= 0x1000
            && let Some(function) = self.function(offset)
        {
            function.lock().unwrap_or_else(PoisonError::into_inner).config_write(register, data);
        }
    }
}

/// The root's own function: a generic PCI Express host bridge (vendor and device ID as QEMU's, class 06 00).
struct HostBridge;

impl PciFunction for HostBridge {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        // Vendor ID, device ID, command, status, revision, class code. All other registers are zero: no BARs, no
        // capabilities.
        const HEADER: [u8; 12] = [0x36, 0x1b, 0x08, 0x00, 0, 0, 0, 0, 0, 0, 0, 0x06];
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = HEADER.get(offset + i).copied().unwrap_or(0);
        }
    }

    fn config_write(&mut self, _offset: usize, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_slots_other_functions_and_straddling_accesses_read_as_ones() {
        let mut root = PciRoot::new();
        let mut data = [0; 4];
        root.read(0, &mut data);
        assert_eq!(data, [0x36, 0x1b, 0x08, 0x00]);
        for offset in [1 << 15, 1 << 12, 0xffe, 0xf_fffc] {
            root.read(offset, &mut data);
            assert_eq!(data, [0xff; 4], "{offset:#x}");
            root.write(offset, &data);
        }
    }

    #[test]
    fn a_full_bus_takes_no_more() {
        let mut root = PciRoot::new();
        for slot in 1..SLOTS {
            assert_eq!(root.plug(Arc::new(Mutex::new(HostBridge))), Some(slot));
        }
        assert_eq!(root.plug(Arc::new(Mutex::new(HostBridge))), None);
    }
}
