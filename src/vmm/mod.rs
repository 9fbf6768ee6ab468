//! The KVM process.

pub mod api;
pub mod memory;
