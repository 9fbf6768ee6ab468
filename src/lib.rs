//! Bulkhead: a lightweight VM manager that hosts an isolated Docker engine.

pub mod backend;
pub mod cli;
pub mod devices;
pub mod engine;
mod hex;
pub mod image;
pub mod inherited;
pub mod net;
#[cfg(test)]
mod numbers;
mod packets;
pub mod report;
pub mod sandbox;
pub mod settings;
pub mod virtio;
pub mod vmm;
