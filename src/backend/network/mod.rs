//! The VM's network: its plan, and the process that serves the network device.

mod passt;
mod plan;
mod supervisor;
mod tap;

pub use plan::NetworkError;
pub(super) use plan::NetworkPlan;
pub use supervisor::StartError;
pub(super) use supervisor::{Keeper, start};
