//! The virtio transport over PCI (virtio 1.3, 4.1) without the legacy interface, with MSI-X and without interrupt pins.

mod bar;
mod common;
mod config_space;
mod msix;
mod transport;

pub use bar::BAR_SIZE;
pub use transport::VirtioPci;
