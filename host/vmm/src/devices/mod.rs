//! The devices of the machine: virtio devices, the PCI root, power control and, on request, a serial port.

pub mod pci_root;
pub mod power;
pub mod serial;
pub mod virtio;
