//! Bulkhead: a lightweight VM manager that hosts an isolated Docker engine.

pub mod vmm;
pub mod virtio;
