//! Bulkhead: a lightweight VM manager that hosts an isolated Docker engine.

pub mod backend;
pub mod cli;
mod hex;
pub mod image;
pub mod log;
mod replace;
pub mod root_owned;
pub mod settings;
