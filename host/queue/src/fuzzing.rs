//! A queue in any guest memory, for the fuzz targets. Only in tests and with the feature `fuzzing`.
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up shall say so")]

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::GuestRam;

/// Bytes of the little guest memory.
pub const MEMORY: usize = 0x1_0000;
/// Descriptors of the queue.
pub const SIZE: u16 = 16;

/// A little guest memory that begins with `bytes`.
pub fn memory(bytes: &[u8]) -> GuestRam {
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    memory.write_slice(&bytes[..bytes.len().min(MEMORY)], GuestAddress(0)).unwrap();
    memory
}

/// Lays the queue out there: the descriptor table at 0, the available ring at 0x100 and the used ring at 0x200.
pub fn lay_out(queue: &mut Queue) {
    queue.set_size(SIZE);
    queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(0x100)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(0x200)).unwrap();
    queue.set_ready(true);
}

/// Such a queue.
pub fn queue() -> Queue {
    let mut queue = Queue::new(SIZE).unwrap();
    lay_out(&mut queue);
    queue
}
