//! The guest memory of a descriptor chain, as a list of slices for vectored system calls.
//!
//! Slices are addresses in this process with a length, not references: the guest may change the memory at any time.

pub(super) use bulkhead_queue::segments::{Segment, copy_in, copy_out, total, window};
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, Permissions};

use crate::memory::GuestRam;

/// Maximum length of a chain in descriptors: drivers must not build one longer than the queue (virtio 1.3, 2.7.5.3.1).
pub(super) const MAX_DESCRIPTORS: usize = 256;

/// A selection of a chain's descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Those the device reads.
    Readable,
    /// Those the device writes.
    Writable,
}

/// The chain is too long or points outside guest memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// Collects the chain's memory into `out` and returns its length in bytes. The descriptors are read exactly once.
pub(super) fn gather<'m>(
    memory: &'m GuestRam,
    chain: DescriptorChain<&'m GuestRam>,
    access: Access,
    out: &mut Vec<Segment<'m>>,
) -> Result<usize, Malformed> {
    out.clear();
    let permissions = match access {
        Access::Readable => Permissions::Read,
        Access::Writable => Permissions::Write,
    };
    let mut total = 0_usize;
    for (index, descriptor) in chain.enumerate() {
        // An indirect table of the guest may have up to 65535 descriptors.
        if index >= MAX_DESCRIPTORS {
            return Err(Malformed);
        }
        // A transmit chain may have writable descriptors and a receive chain readable ones: they are skipped, not
        // trusted.
        let wanted = descriptor.is_write_only() == (access == Access::Writable);
        if !wanted || descriptor.len() == 0 {
            continue;
        }
        // One slice as a rule, two where the descriptor crosses the border of two memory regions. A range outside of
        // memory is an error before a byte of it is touched.
        let len = descriptor.len() as usize;
        let slices = memory.get_slices(descriptor.addr(), len, permissions).map_err(|_| Malformed)?;
        for slice in slices {
            out.push(slice.map_err(|_| Malformed)?);
        }
        // Descriptors may overlap, so their sum may be more than the guest's memory.
        total = total.checked_add(len).ok_or(Malformed)?;
    }
    Ok(total)
}
