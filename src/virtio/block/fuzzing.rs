//! What the fuzz targets reach of this room. Only in tests and with the feature `fuzzing`.
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up shall say so")]

use std::fs::File;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{disk::DiskFile, request::Request};
use crate::vmm::memory::GuestRam;

/// Bytes of the little guest memory in which the queue of [`requests`] lies.
pub const MEMORY: usize = 0x1_0000;

/// Requests in any guest memory: `bytes` are its beginning, with the descriptor table at 0, the available ring at 0x100
/// and the used ring at 0x200. The disk is `file`, whose length must not change.
pub fn requests(file: &File, readonly: bool, bytes: &[u8]) {
    let before = file.metadata().unwrap().len();
    let disk = DiskFile::new(file.try_clone().unwrap(), readonly, "fuzz").unwrap();
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    memory.write_slice(&bytes[..bytes.len().min(MEMORY)], GuestAddress(0)).unwrap();
    let mut queue = Queue::new(16).unwrap();
    queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(0x100)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(0x200)).unwrap();
    queue.set_ready(true);
    for _ in 0..16 {
        let Some(chain) = queue.pop_descriptor_chain(&memory) else { break };
        let head = chain.head_index();
        let written = Request::parse(chain, &memory).map_or(0, |request| request.execute(&disk, &memory));
        let _ = queue.add_used(&memory, head, written);
    }
    assert_eq!(file.metadata().unwrap().len(), before);
}
