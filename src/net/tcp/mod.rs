//! TCP: connections of the guest, their data on its way to the guest, and published ports.

pub(crate) mod flow;
pub(crate) mod listeners;
mod retransmit;
pub(crate) mod sender;
pub(crate) mod window;
