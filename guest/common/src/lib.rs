//! Code that several programs of the guest share.

pub mod bounded;
pub mod error;
pub mod mountinfo;
pub mod namespace;
pub mod notify;
pub mod process;
pub mod registry;
