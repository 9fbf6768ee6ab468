//! PCI configuration space of a virtio function (virtio 1.3, 4.1.2 and 4.1.4; PCI local bus specification 3.0, 6.1).
//!
//! After the header come the capabilities: four structures of the BAR, the window through which a driver can reach the
//! BAR without mapping it, and MSI-X.

use super::{
    bar::{BAR_SIZE, Region},
    msix::Msix,
};

const VENDOR: u16 = 0x1af4;
/// Base of the PCI device IDs, to which the virtio device ID is added (4.1.2).
const DEVICE_BASE: u16 = 0x1040;
const COMMAND: usize = 0x04;
const BAR0: usize = 0x10;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
/// `cfg_type` of the window through configuration space (4.1.4.9).
const CFG_TYPE_PCI: u8 = 5;

/// The function's configuration space. Of its 4096 bytes the first 256 are used.
pub(super) struct ConfigSpace {
    bytes: [u8; 256],
    bar: u32,
    /// Offset of the MSI-X capability.
    msix_at: usize,
    /// Offset of the window capability.
    window_at: usize,
}

/// An access through the window capability: an offset into the BAR and a length.
pub(super) struct WindowAccess {
    pub(super) offset: u64,
    pub(super) len: usize,
}

impl ConfigSpace {
    pub(super) fn new(device_type: u32, class: [u8; 3], bar: u32, msix: &Msix) -> Self {
        let mut space = Self { bytes: [0; 256], bar, msix_at: 0, window_at: 0 };
        let device = DEVICE_BASE + device_type as u16;
        space.put(0, &VENDOR.to_le_bytes());
        space.put(2, &device.to_le_bytes());
        space.bytes[6] = STATUS_CAPABILITIES;
        // Revision ID: 1 or higher for a device without the legacy interface (4.1.2.1).
        space.bytes[8] = 1;
        space.put(9, &class);
        // Subsystem IDs: a device ID of 0x40 or higher keeps legacy drivers away (4.1.2.1).
        space.put(0x2c, &VENDOR.to_le_bytes());
        space.put(0x2e, &device.to_le_bytes());
        space.bytes[CAPABILITY_POINTER] = FIRST_CAPABILITY as u8;
        space.capabilities(msix);
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn capabilities(&mut self, msix: &Msix) {
        let mut at = FIRST_CAPABILITY;
        for region in [Region::Common, Region::Notify, Region::Isr, Region::Device] {
            // notify_off_multiplier: 4 bytes between the queues' notification addresses, so that each has its own
            // ioeventfd (4.1.4.4).
            let extra = (region == Region::Notify).then_some(4u32);
            at = self.virtio_capability(at, region.cfg_type(), region.start(), region.len(), extra);
        }
        // Its offset and length are the driver's; pci_cfg_data follows them.
        self.window_at = at;
        at = self.virtio_capability(at, CFG_TYPE_PCI, 0, 0, Some(0));
        self.msix_at = at;
        // The last one: its pointer to the next is 0. Table and pending bits are in BAR 0, whose number is in the low
        // bits.
        self.put(at, &[CAPABILITY_MSIX, 0]);
        self.put(at + 2, &msix.control().to_le_bytes());
        self.put(at + 4, &(Region::MsixTable.start() as u32).to_le_bytes());
        self.put(at + 8, &(Region::MsixPending.start() as u32).to_le_bytes());
    }

    /// Writes a `virtio_pci_cap` (4.1.4) and returns the offset of the next capability.
    fn virtio_capability(&mut self, at: usize, cfg_type: u8, start: u64, len: u64, extra: Option<u32>) -> usize {
        let size = if extra.is_some() { 20 } else { 16 };
        let next = at + size;
        self.put(at, &[CAPABILITY_VENDOR, next as u8, size as u8, cfg_type, 0, 0, 0, 0]);
        self.put(at + 8, &(start as u32).to_le_bytes());
        self.put(at + 12, &(len as u32).to_le_bytes());
        if let Some(extra) = extra {
            self.put(at + 16, &extra.to_le_bytes());
        }
        next
    }

    pub(super) fn read(&self, offset: usize, data: &mut [u8], msix: &Msix) {
        // BAR and message control are kept elsewhere and put into the copy.
        let mut bytes = self.bytes;
        bytes[BAR0..BAR0 + 4].copy_from_slice(&self.bar.to_le_bytes());
        bytes[self.msix_at + 2..self.msix_at + 4].copy_from_slice(&msix.control().to_le_bytes());
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(offset + i).copied().unwrap_or(0);
        }
    }

    pub(super) fn write(&mut self, offset: usize, data: &[u8], msix: &Msix) {
        // All registers that a driver may write. Everything else is read-only, and a write to it has no effect.
        match offset {
            COMMAND if data.len() >= 2 => {
                let allowed = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
                let value = u16::from_le_bytes([data[0], data[1]]) & allowed;
                self.put(COMMAND, &value.to_le_bytes());
            }
            BAR0 if data.len() == 4 => {
                // The guest writes all ones to find out the size: the bits below it read back as zero. Then it writes
                // the address back. The device stays where the bus has it, whatever the guest writes: the window of the
                // DSDT gives no reason to move it, and a guest that does so only loses its device.
                let value = u32::from_le_bytes([data[0], data[1], data[2], data[3]]);
                self.bar = value & !(BAR_SIZE as u32 - 1);
            }
            // Message control, as a word or as the upper half of the capability's first double word.
            _ if offset == self.msix_at + 2 && data.len() == 2 => {
                msix.set_control(u16::from_le_bytes([data[0], data[1]]));
            }
            _ if offset == self.msix_at && data.len() == 4 => {
                msix.set_control(u16::from_le_bytes([data[2], data[3]]));
            }
            _ => self.write_window_fields(offset, data),
        }
    }

    /// Writes `bar`, `offset` and `length` of the window capability (4.1.4.9).
    fn write_window_fields(&mut self, offset: usize, data: &[u8]) {
        let writable = [self.window_at + 4..self.window_at + 5, self.window_at + 8..self.window_at + 16];
        for (i, byte) in data.iter().enumerate() {
            if writable.iter().any(|range| range.contains(&(offset + i))) {
                self.bytes[offset + i] = *byte;
            }
        }
    }

    /// Returns the BAR access for which a configuration access stands, if it is to the window's data.
    pub(super) fn window(&self, offset: usize, len: usize) -> Option<WindowAccess> {
        let data_at = self.window_at + 16;
        if offset != data_at {
            return None;
        }
        let word = |at: usize| {
            u32::from_le_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
        };
        // The guest may have written anything there: the length must be 1, 2 or 4, fit into the access and lie inside
        // of the BAR (4.1.4.9.2), else nothing happens.
        let (start, wanted) = (word(self.window_at + 8), word(self.window_at + 12) as usize);
        let in_bar = u64::from(start) + wanted as u64 <= BAR_SIZE;
        (self.bytes[self.window_at + 4] == 0 && matches!(wanted, 1 | 2 | 4) && wanted <= len && in_bar)
            .then_some(WindowAccess { offset: u64::from(start), len: wanted })
    }
}
