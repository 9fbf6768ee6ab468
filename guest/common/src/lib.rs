//! Code that several programs of the guest share.

pub mod namespace;
pub mod registry;
pub mod status;
