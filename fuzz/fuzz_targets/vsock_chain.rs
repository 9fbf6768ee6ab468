//! Packets' memory from chains of descriptors in any guest memory, and a host client's first line.
#![no_main]

use bulkhead_vmm::devices::virtio::vsock::fuzzing::{chains, hybrid_line};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (u8, &[u8])| {
    chains(data.1);
    hybrid_line(data.1, usize::from(data.0));
});
