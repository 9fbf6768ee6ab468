//! Code that several programs of the guest share: init, the runtime, the gate, the port proxy and the procfs service.
//!
//! Each of them is a process of its own with a trust boundary of its own. What they share is below all of them: reading
//! tables of the kernel, naming processes and namespaces, talking to init, the ids of containers, and the list of them.

pub mod bounded;
pub mod error;
pub mod id_ranges;
pub mod mount;
pub mod mountinfo;
pub mod namespace;
pub mod notify;
pub mod port_mapping;
pub mod process;
pub mod registry;
pub mod seccomp;
