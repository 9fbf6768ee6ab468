//! The virtio transport over PCI, modern only (virtio 1.3, section 4.1), with MSI-X and no legacy interrupts.

mod common;
mod config_space;
mod msix;
mod transport;

pub use transport::{BAR_SIZE, VirtioPci};
