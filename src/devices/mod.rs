//! The few devices that are not virtio: power control, the PCI root and, on request, a serial port.

pub mod pci_root;
pub mod power;
pub mod serial;
