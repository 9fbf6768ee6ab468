//! The VM's network: its plan, and the process that serves the network device.
//!
//! By default that process is `bulkhead net`, a TCP/IP stack in user space. passt(1) of the host can take its place: it
//! gets the same vhost-user socket and addresses. With a tap device `bulkhead net` only copies frames between the
//! device and the tap. With the network `none` there is no plan, no process and no device.

mod passt;
mod plan;
mod server;
mod tap;

pub use plan::NetworkError;
pub(super) use plan::NetworkPlan;
pub(super) use server::NetServer;
pub use server::StartError;
