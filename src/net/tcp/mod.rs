//! TCP: connections of the guest, their data on its way to the guest, and published ports.

pub(crate) mod flow;
mod guest;
mod host;
pub(crate) mod listeners;
mod retransmit;
pub(crate) mod sender;
mod window;
