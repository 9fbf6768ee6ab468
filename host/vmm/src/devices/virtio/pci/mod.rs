//! The virtio transport over PCI (virtio 1.3, 4.1) without the legacy interface, with MSI-X and without interrupt pins.

mod common;
mod config_space;
mod msix;
mod transport;

pub use transport::{BAR_SIZE, VirtioPci};
