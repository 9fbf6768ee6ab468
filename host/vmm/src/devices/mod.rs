//! The devices of the machine: virtio, and the few that are not: power control, the PCI root and, on request, a serial
//! port.

pub mod pci_root;
pub mod power;
pub mod serial;
pub mod virtio;
