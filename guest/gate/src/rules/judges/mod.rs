//! Judges: they decide about a request by its canonical body or query, and correct what has only one right value.
//!
//! A canonical body has known keys in one spelling, each once, and values of the right type. What a client names of the
//! VM (paths, drivers, devices, options, addresses) is judged here with the rules of `bulkhead_policy`; all other strings
//! are opaque: the engine looks them up among its own objects, or hands them to the container, where the runtime judges.

pub(crate) mod build;
pub(crate) mod commit;
pub(crate) mod container;
pub(crate) mod in_use;
mod limits;
mod mounts;
pub(crate) mod network;
pub(crate) mod service;
pub(crate) mod swarm;
mod values;
pub(crate) mod volume;
