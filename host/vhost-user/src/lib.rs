//! The backend's side of vhost-user ("Vhost-user Protocol", QEMU's specification), for the processes that serve a virtio
//! device: [`Backend`] answers the vmm's requests about features, guest memory and queues, and a [`Device`] says what is
//! its own.
//!
//! The vmm is trusted no further than its guest: it passes the guest's values on, so addresses and sizes are checked
//! here again.

mod backend;
mod connection;

pub use backend::{Backend, Device};
pub use connection::Connection;
pub use vhost::vhost_user::{Error, Result, VhostUserProtocolFeatures};
