//! The host's directories that containers may mount: their plan, and the process that serves them.
//!
//! That process is `bulkhead share-server`, a file server with the allowed directories and nothing else in its reach. A
//! VM without shared directories has neither the process nor the device.

mod directory;
mod plan;
mod server;

pub(super) use directory::permits;
pub use directory::{Refusal, SharedPath};
pub use plan::Judged;
pub(super) use plan::SharesPlan;
pub(super) use server::{Change, ShareServer};
