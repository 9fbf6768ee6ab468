//! Takes frames whose data is read straight into the guest's buffers.

use std::io;

use vm_memory::VolatileSlice;

use super::offload::Head;

/// Whoever takes frames for the guest.
pub(super) trait Receiver {
    /// Takes a frame of `head` bytes of headers and at most `most` bytes of data, which `read` writes to where they
    /// belong and whose headers `seal` makes. What `read` says, also when it fails or is without data: then there is no
    /// frame. `None` when the guest has offered too little room.
    fn take(
        &mut self,
        head: usize,
        most: usize,
        read: &mut dyn FnMut(&[VolatileSlice<'_>]) -> io::Result<usize>,
        seal: &mut dyn FnMut(usize) -> Head,
    ) -> Option<io::Result<usize>>;
}
