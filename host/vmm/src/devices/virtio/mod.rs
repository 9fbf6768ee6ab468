//! Virtio devices (virtio 1.3) and their PCI transport.
//!
//! Each device has a directory with the same file names: `mod.rs` is the device (its features, configuration space and
//! activation), `worker.rs` the thread that serves its queues, further files are its wire format and its parts.

pub mod block;
pub mod console;
mod device;
pub mod fs;
pub mod net;
pub mod pci;
pub mod rng;
pub mod vhost_user;
pub mod vsock;
mod worker;

pub use device::{ActivateError, Activation, ActiveQueue, Interrupt, VirtioDevice};
pub(crate) use device::{MAX_NOTIFY_DELAY, RunningQueue};
pub(crate) use worker::{Worker, spawn_confined};
