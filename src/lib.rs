//! Bulkhead: a lightweight VM manager that hosts an isolated Docker engine.

pub mod devices;
pub mod virtio;
pub mod vmm;
