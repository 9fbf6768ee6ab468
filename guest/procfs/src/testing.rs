//! Containers for unit tests.

use std::fs::File;

use bulkhead_guest_common::{namespace::Identity, process::Process, registry::Container};

/// A container that lives as long as this process.
pub(crate) fn container(id: &str) -> Container {
    let creator = Process::find(std::process::id()).unwrap();
    let user_namespace = Identity::of(File::open("/proc/self/ns/user").unwrap()).unwrap();
    Container {
        slot: 0,
        id: id.to_owned(),
        state_root: "/nowhere".into(),
        owner: 100_000,
        user_namespace,
        cgroup: None,
        read_only: false,
        creator,
    }
}
