//! Code that several programs of the guest share.

pub mod namespace;
pub mod process;
pub mod registry;
