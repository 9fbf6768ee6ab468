//! A queue in arbitrary guest memory, for fuzz targets and property tests.
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up has to fail")]

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::GuestRam;

/// Size of the guest memory in bytes.
pub const MEMORY: usize = 0x1_0000;
/// Size of the queue in descriptors.
pub const SIZE: u16 = 16;

/// Creates a guest memory of [`MEMORY`] bytes that starts with `bytes`.
pub fn memory(bytes: &[u8]) -> GuestRam {
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    memory.write_slice(&bytes[..bytes.len().min(MEMORY)], GuestAddress(0)).unwrap();
    memory
}

/// Places the queue: the descriptor table at 0, the available ring at 0x100 and the used ring at 0x200.
pub fn lay_out(queue: &mut Queue) {
    // Low addresses, so that short inputs of a fuzzer reach descriptors, rings and buffers alike.
    queue.set_size(SIZE);
    queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(0x100)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(0x200)).unwrap();
    queue.set_ready(true);
}

/// Creates a queue with the layout of [`lay_out`].
pub fn queue() -> Queue {
    let mut queue = Queue::new(SIZE).unwrap();
    lay_out(&mut queue);
    queue
}
