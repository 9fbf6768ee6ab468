//! Takes frames for the guest whose data is read straight into the guest's buffers.

use std::io;

use vm_memory::VolatileSlice;

use super::offload::Head;

/// A consumer of such frames: the receive queue, or a list in tests.
pub(super) trait FrameSink {
    /// Takes a frame of `head` bytes of headers and at most `most` bytes of data. `read` writes the data to where it
    /// belongs and returns its length; `seal` makes the headers for a length.
    ///
    /// Returns the result of `read`. After an error, and without data, there is no frame. `None` when the guest offers
    /// too little room; then `read` was not called.
    fn take(
        &mut self,
        head: usize,
        most: usize,
        read: &mut dyn FnMut(&[VolatileSlice<'_>]) -> io::Result<usize>,
        seal: &mut dyn FnMut(usize) -> Head,
    ) -> Option<io::Result<usize>>;
}
